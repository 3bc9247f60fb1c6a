// mean_keys: scores of the mean keys of a block's segments, which its centroids are residuals from. A part of score.
#pragma once

#include "cuda/launch_config.h"
#include "cuda/score.cuh"
#include "cuda/segments.h"

namespace tactic::cuda {

/// What one of the `score_warps` first warps does of it. The first kHeads warps quantize the queries meanwhile, where
/// there are enough others.
template <int kDim, int kHeads>
struct MeanKeys {
  static constexpr int kLines = (kDim + 31) / 32, kLoads = (kDim + 127) / 128;  // of a mean key
  static constexpr int kAtOnce = 2;                                             // on their way

  const float* means;  // of the head, [all segments, kDim]
  const OwnSegments& own;
  int k_own, step;  // the next own segment of this warp, and from one to the next
  float4 next[kAtOnce][kLoads];

  __device__ MeanKeys(const IndexView& index, const OwnSegments& segments, int64_t row_of_head, int warp,
                      int score_warps)
      : means(index.means + row_of_head * index.geometry.all_segments * kDim), own(segments) {
    const int first = score_warps >= 2 * kHeads ? kHeads : 0;
    k_own = warp - first;
    step = score_warps - first;
  }

  /// All threads: into L2.
  __device__ void prefetch_all() const {
    for (int i = threadIdx.x; i < own.count() * kLines; i += kThreads)
      prefetch(means + own.at(i / kLines).slot * kDim + i % kLines * 32);
  }

  __device__ void load() {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int k = k_own + n * step;
      if (k < 0 || k >= own.count()) continue;
      const float* from = means + own.at(k).slot * kDim;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (128 * i + 4 * lane < kDim) next[n][i] = __ldg(reinterpret_cast<const float4*>(from + 128 * i) + lane);
      }
    }
  }

  /// After load(). q: [group, kDim] in shared memory; dots: [segments, kHeads] get the products times `scale`.
  __device__ void score(const float* q, int group, float scale, float* dots) {
    const int lane = threadIdx.x & 31;
    while (k_own >= 0 && k_own < own.count()) {
      float sums[kAtOnce][kHeads] = {};
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (128 * i + 4 * lane >= kDim) continue;
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          if (h >= group) continue;
          const float4 x = *reinterpret_cast<const float4*>(q + h * kDim + 128 * i + 4 * lane);
#pragma unroll
          for (int n = 0; n < kAtOnce; ++n) {
            const float4& m = next[n][i];
            sums[n][h] += x.x * m.x + x.y * m.y + x.z * m.z + x.w * m.w;
          }
        }
      }
      const int done = k_own;
      k_own += kAtOnce * step;
      load();
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const float dot = sum_by_head<kHeads>(sums[n]);
        const int k = done + n * step;
        if (k < own.count() && lane % (32 / kHeads) == 0) dots[k * kHeads + lane / (32 / kHeads)] = dot * scale;
      }
    }
  }
};

}  // namespace tactic::cuda
