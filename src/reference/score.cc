// score: the dot products of the group's queries with every centroid, and what is readable.
#include "reference/steps.h"

namespace tactic::reference {

HeadSelection readable(const IndexState& index, int32_t head, const RowFilter& filter) {
  HeadSelection all;
  int32_t base = 0;
  for (const Segment& segment : index.segments) {
    size_t member = 0;
    for (int32_t c = 0; c < segment.num_clusters; ++c) {
      for (int32_t i = 0; i < segment.heads[head].sizes[c]; ++i) {
        const int64_t row = segment.row_begin + segment.heads[head].members[member++];
        if (!filter.reads_indexed(row)) continue;
        all.tokens.push_back(static_cast<int32_t>(row));
        all.clusters.push_back(base + c);
      }
    }
    base += padded_clusters(segment.num_clusters);
  }
  all.log_weights.assign(all.tokens.size(), 0.0f);
  all.num_certain = static_cast<int64_t>(all.tokens.size());
  return all;
}

void score(const IndexState& index, int32_t head, const RowFilter& filter, const float* q, int32_t group_size,
           ClusterScores& out) {
  const int32_t total = index.total_clusters(), dim = index.shape.head_dim;
  out = {total, std::vector<float>(static_cast<size_t>(group_size) * total), std::vector<float>(total),
         std::vector<float>(total)};
  for (const int32_t c : readable(index, head, filter).clusters) out.sizes[c] += 1;
  int32_t base = 0;
  for (const Segment& segment : index.segments) {
    const HeadClusters& clusters = segment.heads[head];
    for (int32_t c = 0; c < segment.num_clusters; ++c) {
      out.spreads[base + c] = clusters.spreads[c];
      for (int32_t g = 0; g < group_size; ++g) {
        double dot = 0;
        for (int32_t d = 0; d < dim; ++d) {
          const int8_t residual =
              clusters
                  .residuals[static_cast<size_t>(c / kCentroidBlock * dim + d) * kCentroidBlock + c % kCentroidBlock];
          dot += q[g * dim + d] * (clusters.mean[d] + static_cast<double>(clusters.scales[c]) * residual);
        }
        out.dots[static_cast<size_t>(g) * total + base + c] = static_cast<float>(dot);
      }
    }
    base += padded_clusters(segment.num_clusters);
  }
}

}  // namespace tactic::reference
