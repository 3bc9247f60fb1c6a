// measure: what a draw says of the sum it stands for, so that a step knows how sure its mass is (docs/method.md,
// measuring itself; core/drawn_variance.h). Neighbors whose difference shows the scatter are the drawn ones among the
// four rows of a tile that a lane weighs.
#pragma once

#include "core/drawn_variance.h"
#include "cuda/merge.cuh"
#include "cuda/select_sample.cuh"

namespace tactic::cuda {

/// Of one query head. Weights are relative to the estimate of all weights and divided by their probabilities.
struct alignas(16) DrawSums {
  float drawn = 0;           // sum of the weights drawn, whether or not their clusters were read whole afterwards
  float refined = 0;         // true weights of the rows in clusters that were
  float differences = 0;     // between neighbors, squared, times 1 - their mean probability
  float squares = 0;         // of those terms
  float pairs = 0;           // number of them
  float rows = 0;            // drawn
  float count_variance = 0;  // of the number of rows drawn
  float clusters = 0;        // not meant to be read whole

  __device__ __forceinline__ void add(const DrawSums& x) {
    drawn += x.drawn;
    refined += x.refined;
    differences += x.differences;
    squares += x.squares;
    pairs += x.pairs;
    rows += x.rows;
    count_variance += x.count_variance;
    clusters += x.clusters;
  }
  /// Neighbors, and 1 - their probabilities.
  __device__ __forceinline__ void add_pair(float weight, float rest, float other, float other_rest) {
    const float square = 0.5f * (rest + other_rest) * (weight - other) * (weight - other);
    differences += square;
    squares += square * square;
    pairs += 1;
  }
  /// What a warp knows before the draw, for every head.
  __device__ __forceinline__ void foresee(const Foreseen& foreseen) {
    const float part = (threadIdx.x & 3) == 0 ? 1 : 0;  // one lane a head
    count_variance = part * warp_sum(foreseen.count_variance);
    clusters = part * static_cast<float>(__reduce_add_sync(kAllLanes, foreseen.clusters));
  }
  /// A lane's rows of a tile, as attend_tile has them. `estimate`: log2 of all weights of the lane's head.
  __device__ __forceinline__ void add_rows(const float (&scores)[4], const float (&log_weights)[4], float estimate) {
    float last = 0, left_out = 0;  // 1 - probability
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (!(log_weights[j] > 0)) continue;
      const float weight = exp2_fast(fminf(scores[j] + log_weights[j] - estimate, 24.0f)),
                  rest = 1 - exp2_fast(-log_weights[j]);
      if (left_out > 0) add_pair(weight, rest, last, left_out);
      drawn += weight;
      rows += 1;
      last = weight;
      left_out = rest;
    }
  }
  /// A lane's rows of a cluster that is read whole because of the draw; kLowest: none.
  __device__ __forceinline__ void add_refined(const float (&scores)[4], float estimate) {
#pragma unroll
    for (int j = 0; j < 4; ++j) refined += exp2_fast(fminf(scores[j] - estimate, 24.0f));
  }
};

/// In shared memory.
struct MeasureBuffers {
  DrawSums of_blocks[kMaxSplits][kMaxGroup];  // of the first block, written by the cluster's blocks
  DrawSums of_warps[kWarps][kMaxGroup];
};
static_assert(sizeof(MeasureBuffers) == kMeasureBytes);

/// A warp's sums, of whose lanes each has a part of head lane / 4.
__device__ __forceinline__ void store_draw(MeasureBuffers& buffers, DrawSums sums) {
  float* values = reinterpret_cast<float*>(&sums);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(DrawSums) / sizeof(float)); ++i) {
    values[i] += shuffle_xor(values[i], 1);
    values[i] += shuffle_xor(values[i], 2);
  }
  const int lane = threadIdx.x & 31;
  if ((lane & 3) == 0) buffers.of_warps[threadIdx.x >> 5][lane >> 2] = sums;
}

/// What a block sends the first one of its cluster with its outputs.
inline constexpr uint32_t kDrawBytes = kMaxGroup * sizeof(DrawSums);
__device__ __forceinline__ void send_draw(MeasureBuffers& buffers, int rank, uint64_t* box) {
  const int h = threadIdx.x;
  if (h >= kMaxGroup) return;
  DrawSums sums;
  for (int w = 0; w < kWarps; ++w) sums.add(buffers.of_warps[w][h]);
  const auto* halves = reinterpret_cast<const float4*>(&sums);
  auto* to = reinterpret_cast<float4*>(&buffers.of_blocks[rank][h]);
  Mailbox::send(to, halves[0], 0, box);
  Mailbox::send(to + 1, halves[1], 0, box);
}

struct MeasuredMass {
  float mass = 1;         // share of the rows read for certain
  float variance = 0;     // of that
  float relative = 0;     // of the draw: variance over squared sum; 0: it cannot tell
  float independent = 0;  // of all weights, relative, had the draws been independent
  float freedom = 1;      // degrees of freedom behind the variance
  float total = 0;        // all weights, relative to the estimate
  float rows = 0;         // drawn
};

/// As core's DrawnVariance. `certain`: the weight of the rows read for certain, `independent`: the variance of
/// independent draws, both relative to the estimate; `all_read`: nothing is left that the draw speaks for; `usual`:
/// what `relative` was in earlier steps, 0: nothing.
__device__ __forceinline__ MeasuredMass measure(const DrawSums& draw, float certain, float independent, bool all_read,
                                                float tau, float usual) {
  constexpr auto kUsualFreedom = static_cast<float>(DrawnVariance::kUsualFreedom);
  const float total = certain + (all_read ? 0.0f : fmaxf(draw.drawn - draw.refined, 0.0f));
  const bool several = draw.pairs > 0;
  const float mean = draw.rows > 0 ? draw.drawn / draw.rows : total / tau,
              from_count = mean * mean * draw.count_variance;
  const float unseen = total / tau * (total / tau);
  float variance = fmaxf(independent, from_count), relative = 0, freedom = 1;
  if (several) {
    variance = draw.differences * draw.rows / (2 * draw.pairs) + from_count;
    relative = variance / (draw.drawn * draw.drawn);
    freedom = fmaxf(1.0f, draw.squares > 0 ? 2 * draw.differences * draw.differences / draw.squares : 1.0f);
    if (usual > 0) {
      variance = fmaxf(variance, usual * draw.drawn * draw.drawn);
      freedom += kUsualFreedom;
    }
  }
  if (!(total > 0)) return {};
  const float mass = certain / total;
  return {mass,     all_read || draw.clusters == 0 ? 0.0f : mass * mass * (variance + unseen) / (total * total),
          relative, independent / (total * total),
          freedom,  total,
          draw.rows};
}

}  // namespace tactic::cuda
