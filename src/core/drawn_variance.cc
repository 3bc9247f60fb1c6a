#include "core/drawn_variance.h"

namespace tactic {

Undrawn undrawn_rows(const IndexState& index, const std::vector<float>& sizes, const std::vector<float>& probability,
                     const std::vector<Reading>& readings, bool alone) {
  Undrawn rows;
  size_t c = 0;
  for (const Segment& segment : index.segments) {
    double expected = 0;
    for (const size_t end = c + static_cast<size_t>(padded_clusters(segment.num_clusters)); c < end; ++c) {
      if (speaks(readings[c], alone)) expected += double{sizes[c]} * probability[c];
    }
    rows.add(expected);
  }
  return rows;
}

bool all_read(const std::vector<float>& sizes, const std::vector<Reading>& readings) {
  for (size_t c = 0; c < sizes.size(); ++c) {
    if (sizes[c] > 0 && readings[c] == Reading::kDrawn) return false;
  }
  return true;
}

}  // namespace tactic
