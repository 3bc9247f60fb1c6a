// select_topk: the best-ranked clusters of each head, and the union over the group.
#include "cpu/ranking.h"
#include "cpu/steps.h"

namespace tactic::cpu {

void select_topk(const IndexState& index, int32_t head, const RowFilter& filter, const ClusterScores& scores,
                 int32_t group_size, int32_t budget, HeadSelection& out) {
  Ranking ranking(scores);
  std::vector<int32_t> taken(static_cast<size_t>(scores.num_clusters));
  for (int32_t g = 0; g < group_size; ++g) {
    ranking.rank(scores.dots.data() + static_cast<size_t>(g) * static_cast<size_t>(scores.num_clusters));
    ranking.visit(0, std::min<int64_t>(budget, ranking.num_tokens()), false, [&](int32_t c, int64_t, int64_t count) {
      int32_t& most = taken[static_cast<size_t>(c)];
      most = std::max(most, static_cast<int32_t>(count));
    });
  }
  take_members(index, head, filter, scores, taken, out);
}

}  // namespace tactic::cpu
