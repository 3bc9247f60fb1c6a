// refine: clusters that the draw found underestimated are read whole.
#include <algorithm>
#include <cmath>

#include "core/read_on.h"
#include "reference/steps.h"

namespace tactic::reference {

int64_t refine(const IndexState& index, int32_t head, const RowFilter& filter, const RowsView& k, const float* q,
               int32_t head_dim, int32_t group_size, const Inclusion& inclusion, const DecodeOptions& options,
               HeadSelection& selection) {
  std::vector<int32_t> found;
  for (int32_t g = 0; g < group_size; ++g) {
    for (size_t i = selection.num_certain; i < selection.tokens.size(); ++i) {
      const double score = dot_row(k, head, selection.tokens[i], q + g * head_dim, head_dim) + selection.log_weights[i];
      if (score > std::log(refine_limit(options, inclusion, g)) + inclusion.log_totals[g])
        found.push_back(selection.clusters[i]);
    }
  }
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  read_whole(index, head, filter, found, selection);
  return static_cast<int64_t>(found.size());
}

void read_whole(const IndexState& index, int32_t head, const RowFilter& filter, const std::vector<int32_t>& clusters,
                HeadSelection& selection) {
  std::vector<bool> certain(index.total_clusters()), added(index.total_clusters());
  for (const int32_t c : clusters) added[c] = true;
  for (int64_t i = 0; i < selection.num_certain; ++i) certain[selection.clusters[i]] = true;
  const HeadSelection all = readable(index, head, filter), before = selection;
  std::vector<bool> kept(all.tokens.size());
  for (size_t i = 0; i < kept.size(); ++i) kept[i] = certain[all.clusters[i]] || added[all.clusters[i]];
  keep(all, kept, selection);
  for (size_t i = before.num_certain; i < before.tokens.size(); ++i) {
    if (added[before.clusters[i]]) continue;
    selection.tokens.push_back(before.tokens[i]);
    selection.log_weights.push_back(before.log_weights[i]);
    selection.clusters.push_back(before.clusters[i]);
  }
}

}  // namespace tactic::reference
