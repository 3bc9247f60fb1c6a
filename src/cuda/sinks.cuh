// Sinks: what share of a head's weights they have, which decides how much it reads (core's sink_factor).
#pragma once

#include "core/steps.h"
#include "cuda/device.cuh"

namespace tactic::cuda {

/// A warp's tile of rows 0 to 15, of which the first `num_sinks` are sinks. scores: log2, as attend_tile has them. out:
/// [kHeads] maximum and sum of those that count.
template <int kHeads>
__device__ __forceinline__ void weigh_sinks(const float (&scores)[4], int32_t num_sinks, float2* out) {
  const int lane = threadIdx.x & 31, t = lane & 3;
  const auto is_sink = [&](int j) { return 2 * t + (j & 1) + 8 * (j >> 1) < min(num_sinks, kCountedSinks); };
  float top = kLowest, sum = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) top = is_sink(j) ? fmaxf(top, scores[j]) : top;
  top = fmaxf(top, shuffle_xor(top, 1));
  top = fmaxf(top, shuffle_xor(top, 2));
#pragma unroll
  for (int j = 0; j < 4; ++j) sum += is_sink(j) ? exp2_fast(scores[j] - top) : 0.0f;
  sum += shuffle_xor(sum, 1);
  sum += shuffle_xor(sum, 2);
  if (t == 0 && (lane >> 2) < kHeads) out[lane >> 2] = {top, sum};
}

/// The share of the other rows, no less than counts. sinks: maximum and sum; normalizer: log2 of all weights. Its
/// inverse root is core's sink_factor.
__device__ __forceinline__ float weight_beside_sinks(float2 sinks, float normalizer) {
  return fmaxf(1 - sinks.y * exp2_fast(sinks.x - normalizer), kLeastBesideSinks);
}

}  // namespace tactic::cuda
