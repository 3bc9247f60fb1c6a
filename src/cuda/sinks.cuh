// Sinks: what share of a head's weights they have, which decides how much it reads (core's sink_factor).
#pragma once

#include "core/steps.h"
#include "cuda/merge.cuh"

namespace tactic::cuda {

/// The warp that reads the tile with the first 16 rows leaves their scores (log2, as attend_tile has them) for another,
/// which has time: scores [kHeads, 16] in shared memory.
template <int kHeads>
__device__ __forceinline__ void leave_scores(const float (&x)[4], float* scores) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  if (g >= kHeads) return;
  *reinterpret_cast<float2*>(scores + 16 * g + 2 * t) = {x[0], x[1]};
  *reinterpret_cast<float2*>(scores + 16 * g + 8 + 2 * t) = {x[2], x[3]};
}

/// A warp of the cluster's first block, after a block barrier: maximum and sum of the sinks that count, by head, to
/// every block.
template <int kHeads>
__device__ __forceinline__ void share_sinks(MergeBuffers<kHeads>& buffers, const float* scores, int32_t num_sinks,
                                            int splits) {
  const int lane = threadIdx.x & 31;
  RunningSum total;
#pragma unroll 1
  for (int i = 0; i < min(num_sinks, kCountedSinks); ++i) total.add(scores[16 * (lane % kHeads) + i], 1);
  __syncwarp();  // who gets a state may send its output to where the scores lie
  for (int other = lane / kHeads; other < splits; other += 32 / kHeads)
    Mailbox::send(&buffers.sinks[lane % kHeads], float2{total.max, total.sum}, other, &buffers.mailboxes[0]);
}

/// The share of the other rows, no less than counts. sinks: maximum and sum; normalizer: log2 of all weights. Its
/// inverse root is core's sink_factor.
__device__ __forceinline__ float weight_beside_sinks(float2 sinks, float normalizer) {
  return fmaxf(1 - sinks.y * exp2_fast(sinks.x - normalizer), kLeastBesideSinks);
}

}  // namespace tactic::cuda
