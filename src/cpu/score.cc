// score: the dot products of the group's queries with every centroid, from 8-bit residuals.
#include <algorithm>

#include "cpu/steps.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/score.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace tactic::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// One block of 16 centroids against kHeads queries: dots[g * stride + lane].
template <int kHeads>
void score_block(const int8_t* residuals, const float* scales, size_t dim, const float* q, const float* mean_dots,
                 float* dots, size_t stride) {
  const hn::CappedTag<float, kCentroidBlock> df;
  using V = hn::Vec<decltype(df)>;
  const hn::Rebind<int8_t, decltype(df)> di8;
  const hn::Rebind<int32_t, decltype(df)> di32;
  const size_t lanes = hn::Lanes(df);
  for (size_t part = 0; part < kCentroidBlock; part += 2 * lanes) {
    const bool two = part + lanes < kCentroidBlock;
    const size_t second = two ? part + lanes : part;
    V sums[kHeads][2];
    for (int g = 0; g < kHeads; ++g) sums[g][0] = sums[g][1] = hn::Zero(df);
    for (size_t d = 0; d < dim; ++d) {
      const int8_t* row = residuals + d * kCentroidBlock;
      const V c0 = hn::ConvertTo(df, hn::PromoteTo(di32, hn::LoadU(di8, row + part)));
      const V c1 = hn::ConvertTo(df, hn::PromoteTo(di32, hn::LoadU(di8, row + second)));
      for (int g = 0; g < kHeads; ++g) {
        const V qv = hn::Set(df, q[static_cast<size_t>(g) * dim + d]);
        sums[g][0] = hn::MulAdd(qv, c0, sums[g][0]);
        sums[g][1] = hn::MulAdd(qv, c1, sums[g][1]);
      }
    }
    for (int half = 0; half < (two ? 2 : 1); ++half) {
      const size_t at = half == 0 ? part : second;
      const V scale = hn::LoadU(df, scales + at);
      for (int g = 0; g < kHeads; ++g) {
        hn::StoreU(hn::MulAdd(sums[g][half], scale, hn::Set(df, mean_dots[g])), df,
                   dots + static_cast<size_t>(g) * stride + at);
      }
    }
  }
}

// Blocks [begin, end) of one segment, at most four heads at a time.
void score_segment(const HeadClusters& clusters, size_t dim, int32_t begin, int32_t end, const float* q,
                   int32_t group_size, float* dots, size_t stride) {
  for (int32_t first = 0; first < group_size; first += 4) {
    const int32_t heads = std::min(4, group_size - first);
    const float* queries = q + static_cast<size_t>(first) * dim;
    float mean_dots[4] = {};
    for (int32_t g = 0; g < heads; ++g) {
      for (size_t d = 0; d < dim; ++d) mean_dots[g] += queries[static_cast<size_t>(g) * dim + d] * clusters.mean[d];
    }
    for (int32_t c = begin; c < end; c += kCentroidBlock) {
      const int8_t* residuals = clusters.residuals.data() + static_cast<size_t>(c) * dim;
      const float* scales = clusters.scales.data() + c;
      float* out = dots + static_cast<size_t>(first) * stride + static_cast<size_t>(c - begin);
      switch (heads) {
        case 4: score_block<4>(residuals, scales, dim, queries, mean_dots, out, stride); break;
        case 3: score_block<3>(residuals, scales, dim, queries, mean_dots, out, stride); break;
        case 2: score_block<2>(residuals, scales, dim, queries, mean_dots, out, stride); break;
        default: score_block<1>(residuals, scales, dim, queries, mean_dots, out, stride); break;
      }
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace tactic::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tactic::cpu {

HWY_EXPORT(score_segment);

namespace {

// How many members of each cluster the query may read.
void count_readable(const Segment& segment, const HeadClusters& clusters, const RowFilter& filter, int32_t begin,
                    int32_t end, float* sizes) {
  const int64_t rows_end = segment.row_begin + segment.num_rows;
  const int64_t readable = filter.count_indexed(segment.row_begin, rows_end);
  const bool all = readable == segment.num_rows - segment.num_sinks;
  size_t member = 0;
  if (!all && readable > 0) {
    for (int32_t c = 0; c < begin; ++c) member += clusters.sizes[static_cast<size_t>(c)];
  }
  for (int32_t c = begin; c < end; ++c) {
    const size_t size = clusters.sizes[static_cast<size_t>(c)];
    if (all) {
      sizes[c - begin] = static_cast<float>(size);
    } else if (readable == 0) {
      sizes[c - begin] = 0;
    } else {
      int32_t count = 0;
      for (size_t m = member; m < member + size; ++m)
        count += filter.reads_indexed(segment.row_begin + clusters.members[m]);
      sizes[c - begin] = static_cast<float>(count);
      member += size;
    }
  }
}

}  // namespace

void score(const IndexState& index, int32_t head, const RowFilter& filter, const float* q, int32_t group_size,
           int32_t begin, int32_t end, ClusterScores& out) {
  const auto score_part = HWY_DYNAMIC_DISPATCH(score_segment);
  int32_t base = 0;
  for (const Segment& segment : index.segments) {
    const int32_t padded = padded_clusters(segment.num_clusters);
    const int32_t first = std::max(begin, base), last = std::min(end, base + padded);
    if (first < last) {
      const HeadClusters& clusters = segment.heads[static_cast<size_t>(head)];
      count_readable(segment, clusters, filter, first - base, last - base, out.sizes.data() + first);
      std::copy_n(clusters.spreads.data() + (first - base), last - first, out.spreads.data() + first);
      score_part(clusters, static_cast<size_t>(index.shape.head_dim), first - base, last - base, q, group_size,
                 out.dots.data() + first, static_cast<size_t>(out.num_clusters));
    }
    base += padded;
  }
}

}  // namespace tactic::cpu
#endif
