// select_topk: the best-ranked clusters of each head, and the union over the group.
#include <algorithm>

#include "reference/steps.h"

namespace tactic::reference {

std::vector<size_t> rank(const HeadSelection& all, const float* dots) {
  std::vector<size_t> order(all.tokens.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return dots[all.clusters[a]] > dots[all.clusters[b]]; });
  return order;
}

void keep(const HeadSelection& all, const std::vector<bool>& kept, HeadSelection& out) {
  out.clear();
  for (size_t i = 0; i < kept.size(); ++i) {
    if (!kept[i]) continue;
    out.tokens.push_back(all.tokens[i]);
    out.clusters.push_back(all.clusters[i]);
  }
  out.num_certain = static_cast<int64_t>(out.tokens.size());
  out.log_weights.assign(out.tokens.size(), 0.0f);
}

void select_topk(const IndexState& index, int32_t head, const RowFilter& filter, const ClusterScores& scores,
                 int32_t group_size, int32_t budget, HeadSelection& out) {
  const HeadSelection all = readable(index, head, filter);
  std::vector<bool> kept(all.tokens.size());
  for (int32_t g = 0; g < group_size; ++g) {
    const std::vector<size_t> order = rank(all, scores.dots.data() + static_cast<size_t>(g) * scores.num_clusters);
    for (size_t i = 0; i < order.size() && i < static_cast<size_t>(budget); ++i) kept[order[i]] = true;
  }
  keep(all, kept, out);
}

}  // namespace tactic::reference
