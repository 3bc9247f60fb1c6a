// learn: what a step says of the index's estimates, as on the CPU: pairs of spread term and true log mean weight of the
// clusters that were read whole give beta, measured over predicted variance the ratio that tau depends on. At every
// eighth position, when the answer is written, each block looks at its own clusters, and the first of a thread-block
// cluster adds up what all have found.
#pragma once

#include "core/index_state.h"
#include "cuda/merge.cuh"
#include "cuda/select_sample.cuh"

namespace tactic::cuda {

inline constexpr int kLearnEvery = 8;
inline constexpr float kForget = 0.98f;            // of pairs, at each of those positions
inline constexpr float kRatioRate = 1 - 0.85076f;  // 0.98^8: the CPU adjusts the ratio at every position

/// Least squares of a mean weight's logarithm against the spread term, and the predicted variance times tau^2.
struct alignas(16) LearnSums {
  float xx, xy, variance, unused;
};

/// In shared memory.
struct LearnBuffers {
  LearnSums of_blocks[kMaxSplits];  // written by the cluster's blocks
  LearnSums of_warps[kWarps];       // variance: since select
};
static_assert(sizeof(LearnBuffers) == kLearnBytes);

/// One thread: what earlier steps have learned, and what the query says to it.
template <int kHeads>
__device__ __forceinline__ void recall(MergeBuffers<kHeads>& buffers, const DecodeParams& p, int sequence,
                                       int64_t pair) {
  const HeadCalibration& known = p.index.calibration[pair];
  buffers.beta = p.beta > 0 ? p.beta : known.beta;
  buffers.variance_ratio = p.tau > 0 ? 1.0f : known.variance_ratio;
  buffers.tau_factor = p.batch.tau_factors != nullptr ? p.batch.tau_factors[sequence] : 1.0f;
}

/// Whether a sequence of kv_len rows learns in this step.
__device__ __forceinline__ bool learns_at(int32_t kv_len, int32_t layer) {
  return kv_len > 0 && (static_cast<int64_t>(kv_len) - 1 + layer) % kLearnEvery == 0;
}

/// A block's clusters that were read whole. q: [group, kDim] f32 in shared memory, times sm_scale; norms2: [group] of
/// it. `key_scale`: of the stored keys.
template <DType kDType, int kDim, int kHeads>
struct WholeClusters {
  const DecodeParams& p;
  const OwnSegments& own;
  const SelectTables& tables;
  const uint16_t* members;
  const std::byte* k;
  const int32_t* pages;
  int64_t pair;
  float key_scale;
  int group;
  const float *q, *norms2;

  /// One warp, cluster number c of the block: the same in every lane.
  __device__ void add(int32_t c, LearnSums& sums) const {
    const int lane = threadIdx.x & 31;
    const ClusterMembers rows(tables, own, members, c);
    const int32_t cluster = rows.segment.cluster + c - rows.segment.local_cluster, size = rows.size;
    const TileView tile = tile_of(p.index, pair, cluster);
    float dots[kHeads] = {}, weights[kHeads] = {};  // of the centroid; relative to the centroid's
    for (int d = lane; d < kDim; d += 32) {
      const float x = tile.centroid(cluster, d);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        if (h < group) dots[h] += q[h * kDim + d] * x;
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) dots[h] = warp_sum(dots[h]);
    for (int32_t m = lane; m < size; m += 32) {  // a lane a row
      const std::byte* row = k + row_offset(p.batch.k, pages, rows.row(m));
      float scores[kHeads] = {};
#pragma unroll 4
      for (int chunk = 0; chunk < kDim / 8; ++chunk) {
        float x[8];
        load_floats<kDType>(row, chunk, x);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          if (h >= group) continue;
#pragma unroll
          for (int j = 0; j < 8; ++j) scores[h] += q[h * kDim + 8 * chunk + j] * x[j];
        }
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) weights[h] += exp2_fast((scores[h] * key_scale - dots[h]) * kLog2E);
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float weight = warp_sum(weights[h]);
      if (h >= group) continue;
      const float x = growth(tile.facts(cluster).spread * norms2[h], static_cast<float>(size)),
                  y = kLn2 * log2_fast(weight / static_cast<float>(size));
      if (!isfinite(y) || !(x < static_cast<float>(kMaxTerm))) continue;
      sums.xx += x * x;
      sums.xy += x * y;
    }
  }

  /// One warp's share.
  __device__ LearnSums all() const {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    LearnSums sums{};
    for (int32_t first = warp; first < own.clusters(); first += 32 * kWarps) {
      const int32_t mine = first + lane * kWarps;
      const bool whole =
          mine < own.clusters() && tables.probabilities[mine] == kCertain && (tables.places[mine] & 0xFFFFu) > 1;
      for (uint32_t lanes = __ballot_sync(kAllLanes, whole); lanes != 0; lanes &= lanes - 1)
        add(first + (__ffs(lanes) - 1) * kWarps, sums);
    }
    return sums;
  }
};

/// Into what a head knows. measured: its variance, relative, had the draws been independent.
__device__ __forceinline__ void add_learned(HeadCalibration& known, const LearnSums& sums, float tau, float measured) {
  const float predicted = sums.variance / (tau * tau);
  if (measured > 0 && predicted > 0) {
    const float ratio = fminf(fmaxf(measured / predicted, 0.05f), 20.0f);
    known.variance_ratio =
        fminf(fmaxf(known.variance_ratio * powf(ratio / known.variance_ratio, kRatioRate), 0.1f), 10.0f);
  }
  known.sum_xx = kForget * known.sum_xx + sums.xx;
  known.sum_xy = kForget * known.sum_xy + sums.xy;
  const float slope = (known.sum_xy + static_cast<float>(kPriorWeight * kPriorSlope)) /
                      (known.sum_xx + static_cast<float>(kPriorWeight));
  known.beta = fminf(fmaxf(slope, 0.0f), 2.0f);
}

/// All blocks of a thread-block cluster, when nobody needs the shared memory at `memory` any more: what the warps found
/// in `whole` clusters goes into the head's calibration. independent(): of head lane, the variance of all weights,
/// relative, had the draws been independent; asked by one warp.
template <DType kDType, int kDim, int kHeads, class Independent>
__device__ __forceinline__ void learn(const DecodeParams& p, WholeClusters<kDType, kDim, kHeads> whole,
                                      MergeBuffers<kHeads>& buffers, LearnBuffers& found, float* memory, int rank,
                                      float tau, Independent independent) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = whole.group;
  float* norms2 = memory + group * kDim;
  uint64_t* box = &buffers.mailboxes[0];
  __syncthreads();
  if (rank == 0 && threadIdx.x == 0) Mailbox::open_again(box, p.splits * sizeof(LearnSums));
  for (int i = threadIdx.x; i < group * kDim; i += kThreads)
    memory[i] = load_query(p.batch.q, p.batch.q_dtype, whole.pair * group * kDim + i) * p.batch.sm_scale;
  __syncthreads();
  if (warp < group) {
    float norm2 = 0;
    for (int d = lane; d < kDim; d += 32) norm2 += memory[warp * kDim + d] * memory[warp * kDim + d];
    norm2 = warp_sum(norm2);
    if (lane == 0) norms2[warp] = norm2;
  }
  __syncthreads();
  whole.q = memory;
  whole.norms2 = norms2;
  const LearnSums sums = whole.all();
  if (lane == 0) {
    found.of_warps[warp].xx = sums.xx;
    found.of_warps[warp].xy = sums.xy;
  }
  __syncthreads();
  const auto add = [](const LearnSums* parts, int n) {
    LearnSums total{};
    for (int i = 0; i < n; ++i) {
      total.xx += parts[i].xx;
      total.xy += parts[i].xy;
      total.variance += parts[i].variance;
    }
    return total;
  };
  if (threadIdx.x == 0) Mailbox::send(&found.of_blocks[rank], add(found.of_warps, kWarps), 0, box);
  if (rank != 0) return;
  Mailbox::receive(box, 1);
  if (warp != 0) return;
  const float measured = warp_sum(lane < group ? independent() : 0.0f) / static_cast<float>(group);
  if (lane == 0) add_learned(p.index.calibration[whole.pair], add(found.of_blocks, p.splits), tau, measured);
}

}  // namespace tactic::cuda
