// score: the dot products of the group's queries with every centroid, from 8-bit residuals.
#include <algorithm>

#include "cpu/prefetch.h"
#include "cpu/steps.h"

#ifndef TACTIC_CPU_SCORE_PART_
#define TACTIC_CPU_SCORE_PART_
namespace tactic::cpu {
// Clusters [begin, end) of one segment and head, whole blocks.
struct ScorePart {
  const HeadClusters* clusters = nullptr;
  int32_t begin = 0, end = 0;
};
}  // namespace tactic::cpu
#endif

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/score.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace tactic::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Tag = hn::CappedTag<float, kCentroidBlock>;
using V = hn::Vec<Tag>;

// A vector of centroids: where their residuals, scales and dots are. In a block those of one dimension follow one
// another.
struct CentroidVector {
  const int8_t* residuals;
  const float* scales;
  float* dots;
};

// kHeads queries against two vectors of centroids, since one alone would wait for its sums.
template <int kHeads>
void score_two(const CentroidVector& first, const CentroidVector& second, size_t dim, const float* q,
               const float* mean_dots, size_t stride) {
  const Tag df;
  const hn::Rebind<int8_t, Tag> di8;
  const hn::Rebind<int32_t, Tag> di32;
  V sums[kHeads][2];
  for (int g = 0; g < kHeads; ++g) sums[g][0] = sums[g][1] = hn::Zero(df);
  for (size_t d = 0; d < dim; ++d) {
    const V c0 = hn::ConvertTo(df, hn::PromoteTo(di32, hn::LoadU(di8, first.residuals + d * kCentroidBlock)));
    const V c1 = hn::ConvertTo(df, hn::PromoteTo(di32, hn::LoadU(di8, second.residuals + d * kCentroidBlock)));
    for (int g = 0; g < kHeads; ++g) {
      const V qv = hn::Set(df, q[static_cast<size_t>(g) * dim + d]);
      sums[g][0] = hn::MulAdd(qv, c0, sums[g][0]);
      sums[g][1] = hn::MulAdd(qv, c1, sums[g][1]);
    }
  }
  for (int g = 0; g < kHeads; ++g) {
    const V mean = hn::Set(df, mean_dots[g]);
    const size_t at = static_cast<size_t>(g) * stride;
    hn::StoreU(hn::MulAdd(sums[g][0], hn::LoadU(df, first.scales), mean), df, first.dots + at);
    hn::StoreU(hn::MulAdd(sums[g][1], hn::LoadU(df, second.scales), mean), df, second.dots + at);
  }
}

float dot(const float* a, const float* b, size_t dim) {  // a multiple of 16 of them
  const Tag df;
  V sum = hn::Zero(df);
  for (size_t d = 0; d < dim; d += hn::Lanes(df)) sum = hn::MulAdd(hn::LoadU(df, a + d), hn::LoadU(df, b + d), sum);
  return hn::GetLane(hn::SumOfLanes(df, sum));
}

// At most four heads at a time. `next` is asked for meanwhile, as far as it is as long: a hundred lines at once would
// only queue.
void score_segment(const ScorePart& part, const ScorePart& next, size_t dim, const float* q, int32_t group_size,
                   float* dots, size_t stride) {
  const HeadClusters& clusters = *part.clusters;
  const auto lanes = static_cast<int32_t>(hn::Lanes(Tag()));
  for (int32_t first = 0; first < group_size; first += 4) {
    const int32_t heads = std::min(4, group_size - first);
    const float* queries = q + static_cast<size_t>(first) * dim;
    float mean_dots[4] = {};
    for (int32_t g = 0; g < heads; ++g)
      mean_dots[g] = dot(queries + static_cast<size_t>(g) * dim, clusters.mean.data(), dim);
    const auto vector_at = [&](int32_t c) -> CentroidVector {
      const auto block = static_cast<size_t>(c / kCentroidBlock * kCentroidBlock);
      return {clusters.residuals.data() + block * dim + static_cast<size_t>(c % kCentroidBlock),
              clusters.scales.data() + c, dots + static_cast<size_t>(first) * stride + (c - part.begin)};
    };
    for (int32_t c = part.begin; c < part.end; c += 2 * lanes) {
      const int32_t ahead = next.begin + c - part.begin, asked = std::clamp(next.end - ahead, 0, 2 * lanes);
      if (first == 0 && asked > 0)
        fetch_to_l2(next.clusters->residuals.data() + static_cast<size_t>(ahead) * dim,
                    static_cast<size_t>(asked) * dim);
      const CentroidVector one = vector_at(c), two = c + lanes < part.end ? vector_at(c + lanes) : one;
      switch (heads) {
        case 4: score_two<4>(one, two, dim, queries, mean_dots, stride); break;
        case 3: score_two<3>(one, two, dim, queries, mean_dots, stride); break;
        case 2: score_two<2>(one, two, dim, queries, mean_dots, stride); break;
        default: score_two<1>(one, two, dim, queries, mean_dots, stride); break;
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
  if (readable == segment.num_rows - segment.num_sinks) {
    for (int32_t c = begin; c < end; ++c) sizes[c - begin] = clusters.sizes[static_cast<size_t>(c)];
    return;
  }
  std::fill_n(sizes, end - begin, 0.0f);
  if (readable == 0) return;
  size_t member = 0;
  for (int32_t c = 0; c < begin; ++c) member += clusters.sizes[static_cast<size_t>(c)];
  for (int32_t c = begin; c < end; ++c) {
    for (const size_t last = member + clusters.sizes[static_cast<size_t>(c)]; member < last; ++member)
      sizes[c - begin] += filter.reads_indexed(segment.row_begin + clusters.members[member]) ? 1.0f : 0.0f;
  }
}

}  // namespace

void score(const IndexState& index, int32_t head, const RowFilter& filter, const float* q, int32_t group_size,
           int32_t begin, int32_t end, ClusterScores& out) {
  const auto score_part = HWY_DYNAMIC_DISPATCH(score_segment);
  const auto part_of = [&](size_t s, int32_t base) -> ScorePart {
    if (s >= index.segments.size()) return {};
    const Segment& segment = index.segments[s];
    return {&segment.heads[static_cast<size_t>(head)], std::max(begin - base, 0),
            std::min(end - base, padded_clusters(segment.num_clusters))};
  };
  int32_t base = 0;
  for (size_t s = 0; s < index.segments.size(); ++s) {
    const Segment& segment = index.segments[s];
    const int32_t padded = padded_clusters(segment.num_clusters);
    const ScorePart part = part_of(s, base);
    if (part.begin < part.end) {
      const auto first = static_cast<size_t>(base + part.begin);
      count_readable(segment, *part.clusters, filter, part.begin, part.end, out.sizes.data() + first);
      std::copy_n(part.clusters->spreads.data() + part.begin, part.end - part.begin, out.spreads.data() + first);
      score_part(part, part_of(s + 1, base + padded), static_cast<size_t>(index.shape.head_dim), q, group_size,
                 out.dots.data() + first, static_cast<size_t>(out.num_clusters));
    }
    base += padded;
  }
}

}  // namespace tactic::cpu
#endif
