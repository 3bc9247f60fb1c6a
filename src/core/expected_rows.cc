#include "core/expected_rows.h"

#include <algorithm>

namespace tactic {

namespace {

// The cluster that `row` stands in; -1: none.
int32_t cluster_of(const IndexState& index, int32_t head, int64_t row) {
  int32_t base = 0;
  for (const Segment& segment : index.segments) {
    if (row < segment.row_begin) break;
    if (row < segment.row_begin + segment.num_rows) {
      const HeadClusters& clusters = segment.heads[static_cast<size_t>(head)];
      const auto found =
          std::find(clusters.members.begin(), clusters.members.end(), static_cast<uint16_t>(row - segment.row_begin));
      if (found == clusters.members.end()) return -1;
      auto before = found - clusters.members.begin();
      int32_t c = 0;
      for (; before >= clusters.sizes[static_cast<size_t>(c)]; ++c) before -= clusters.sizes[static_cast<size_t>(c)];
      return base + c;
    }
    base += padded_clusters(segment.num_clusters);
  }
  return -1;
}

}  // namespace

void expected_rows(const IndexState& index, int32_t head, const RowFilter& filter, std::span<const int32_t> likely,
                   std::vector<int32_t>& out) {
  const Calibration& known = index.calibration[static_cast<size_t>(head)];
  out.assign(likely.begin(), likely.end());
  out.insert(out.end(), known.expected.begin(), known.expected.end());
  out.insert(out.end(), known.heavy.begin(), known.heavy.end());
  const std::vector<int32_t> sinks = filter.first_visible(index.options.sink_tokens);
  out.insert(out.end(), sinks.begin(), sinks.end());
  std::sort(out.begin(), out.end());
  out.erase(std::unique(out.begin(), out.end()), out.end());
  size_t kept = 0;
  auto segment = index.segments.begin();
  for (const int32_t row : out) {
    if (!filter.reads_indexed(row)) continue;
    while (segment != index.segments.end() && row >= segment->row_begin + segment->num_rows) ++segment;
    if (segment == index.segments.end()) break;
    const std::vector<uint16_t>& unclustered = segment->heads[static_cast<size_t>(head)].not_finite;
    const auto place = static_cast<uint16_t>(row - segment->row_begin);
    if (!std::binary_search(unclustered.begin(), unclustered.end(), place)) out[kept++] = row;
  }
  out.resize(kept);
}

Sinks counted_sinks(const IndexState& index, int32_t head, const RowFilter& filter) {
  Sinks sinks{filter.first_visible(std::min(index.options.sink_tokens, kCountedSinks)), {}};
  for (const int32_t row : sinks.rows) {
    if (!filter.reads_indexed(row)) continue;
    if (const int32_t c = cluster_of(index, head, row); c >= 0) sinks.clusters.push_back(c);
  }
  return sinks;
}

void leave_out(const std::vector<int32_t>& rows, HeadSelection& selection) {
  if (rows.empty()) return;
  uint64_t low_bits[128] = {};  // nearly all rows are told apart by these
  for (const int32_t row : rows) low_bits[(row >> 6) & 127] |= uint64_t{1} << (row & 63);
  const auto leaves = [&](int32_t row) {
    return ((low_bits[(row >> 6) & 127] >> (row & 63)) & 1) != 0 && std::binary_search(rows.begin(), rows.end(), row);
  };
  const size_t size = selection.tokens.size();
  size_t kept = 0;
  while (kept < size && !leaves(selection.tokens[kept])) ++kept;
  int64_t certain = std::min(selection.num_certain, static_cast<int64_t>(kept));
  for (size_t i = kept; i < size; ++i) {
    const int32_t row = selection.tokens[i];
    if (leaves(row)) continue;
    certain += static_cast<int64_t>(i) < selection.num_certain;
    selection.tokens[kept] = row;
    selection.log_weights[kept] = selection.log_weights[i];
    selection.clusters[kept++] = selection.clusters[i];
  }
  selection.tokens.resize(kept);
  selection.log_weights.resize(kept);
  selection.clusters.resize(kept);
  selection.num_certain = certain;
}

}  // namespace tactic
