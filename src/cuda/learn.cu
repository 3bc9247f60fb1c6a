// learn: what a step says of the index's estimates, as on the CPU: pairs of spread term and true log mean weight of the
// clusters that were read whole give beta, measured over predicted variance the ratio that tau depends on. A kernel of
// its own, which does its work at every eighth position and scores the clusters anew, so that steps that do not learn
// pay nothing.
#include "cuda/launch.h"
#include "cuda/merge.cuh"
#include "cuda/select_sample.cuh"

namespace tactic::cuda {

namespace {

constexpr int kLearnThreads = 256, kLearnWarps = kLearnThreads / 32;
constexpr int kLearnEvery = 8;
constexpr float kForget = 0.98f;            // of pairs, at each of those positions
constexpr float kRatioRate = 1 - 0.85076f;  // 0.98^8: the CPU adjusts the ratio at every position

struct LearnSums {
  float xx = 0, xy = 0;
  float variance = 0;  // times tau^2
};

template <DType kDType, int kDim>
__global__ void __launch_bounds__(kLearnThreads) learn_kernel(const __grid_constant__ DecodeParams p) {
  __shared__ float q[kMaxGroup * kDim];
  __shared__ float norms2[kMaxGroup];
  __shared__ LearnSums sums_of[kLearnWarps];
  const DecodeBatch& b = p.batch;
  const int pair = blockIdx.x, heads = b.num_kv_heads, group = b.num_q_heads / heads;
  const int sequence = pair / heads, head = pair % heads, warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int32_t kv_len = b.kv_lens[sequence];
  if (kv_len < 1 || (static_cast<int64_t>(kv_len) - 1 + b.layer) % kLearnEvery != 0) return;
  for (int i = threadIdx.x; i < group * kDim; i += kLearnThreads)
    q[i] = load_query(b.q, b.q_dtype, static_cast<int64_t>(pair) * group * kDim + i) * b.sm_scale;
  __syncthreads();
  for (int h = warp; h < group; h += kLearnWarps) {
    float norm2 = 0;
    for (int d = lane; d < kDim; d += 32) norm2 += q[h * kDim + d] * q[h * kDim + d];
    for (int step = 16; step > 0; step /= 2) norm2 += shuffle_xor(norm2, step);
    if (lane == 0) norms2[h] = norm2;
  }
  __syncthreads();
  const int32_t* pages =
      b.page_tables == nullptr ? nullptr : b.page_tables + static_cast<int64_t>(sequence) * b.max_pages;
  const std::byte* k = static_cast<const std::byte*>(b.k.data) +
                       (pages == nullptr ? sequence * b.k.sequence_stride_bytes : 0) + head * b.k.head_stride_bytes;
  const float k_scale = head_scale<kDType>(b.k, head);
  const IndexGeometry& g = p.index.geometry;
  const SequenceState state = p.index.states[sequence];
  const uint16_t* members = p.index.members + static_cast<int64_t>(pair) * g.max_rows;
  const StepFacts& facts = p.facts[pair];

  LearnSums sums;  // every lane of a warp has the same
  for (int c = warp; c < g.max_clusters; c += kLearnWarps) {
    const ClusterPlace place(g, state, c);
    const TileView tile = tile_of(p.index, pair, c);
    const uint32_t placed = place.slot >= 0 ? tile.place(c) : 0;
    const int32_t size = placed & 0xFFFFu;
    if (size == 0) continue;
    float dots[kMaxGroup] = {}, terms[kMaxGroup] = {}, p2 = 0;
    for (int d = lane; d < kDim; d += 32) {
      const float x = tile.centroid(c, d);
#pragma unroll
      for (int h = 0; h < kMaxGroup; ++h) {
        if (h < group) dots[h] += q[h * kDim + d] * x;
      }
    }
#pragma unroll
    for (int h = 0; h < kMaxGroup; ++h) {
      if (h >= group) continue;
      for (int step = 16; step > 0; step /= 2) dots[h] += shuffle_xor(dots[h], step);
      terms[h] = growth(tile.facts(c).spread * norms2[h], static_cast<float>(size));
      const float spread = facts.beta * kLog2E * terms[h];
      p2 += exp2_fast(2 * (rms_exponent(dots[h] * kLog2E + spread, spread) - facts.shifts[h]));
    }
    const float probability = sqrt_fast(p2);
    if (probability < 1) {
      sums.variance += static_cast<float>(size) * probability * (1 - probability);
      continue;
    }
    if (size < 2) continue;
    float weights[kMaxGroup] = {};  // relative to the centroid's
    for (int32_t m = 0; m < size; ++m) {
      const int32_t row = place.first_row + members[place.first_row + (placed >> 16) + m];
      const std::byte* data = k + row_offset(b.k, pages, row);
      float scores[kMaxGroup] = {};
      for (int chunk = lane; chunk < kDim / 8; chunk += 32) {
        float x[8];
        to_floats<kDType>(Chunk<kDType>::load(data, chunk), x);
#pragma unroll
        for (int h = 0; h < kMaxGroup; ++h) {
          if (h >= group) continue;
          for (int j = 0; j < 8; ++j) scores[h] += q[h * kDim + 8 * chunk + j] * x[j];
        }
      }
#pragma unroll
      for (int h = 0; h < kMaxGroup; ++h) {
        if (h >= group) continue;
        for (int step = 16; step > 0; step /= 2) scores[h] += shuffle_xor(scores[h], step);
        weights[h] += exp2_fast((scores[h] * k_scale - dots[h]) * kLog2E);
      }
    }
#pragma unroll
    for (int h = 0; h < kMaxGroup; ++h) {
      if (h >= group) continue;
      const float y = kLn2 * log2_fast(weights[h] / static_cast<float>(size));
      if (!isfinite(y)) continue;
      sums.xx += terms[h] * terms[h];
      sums.xy += terms[h] * y;
    }
  }
  if (lane == 0) sums_of[warp] = sums;
  __syncthreads();
  if (threadIdx.x != 0) return;
  HeadCalibration known = p.index.calibration[pair];
  LearnSums total;
  for (const LearnSums& part : sums_of) {
    total.xx += part.xx;
    total.xy += part.xy;
    total.variance += part.variance;
  }
  const float predicted = total.variance / (facts.tau * facts.tau);
  if (facts.measured_variance > 0 && predicted > 0) {
    const float ratio = fminf(fmaxf(facts.measured_variance / predicted, 0.05f), 20.0f);
    known.variance_ratio =
        fminf(fmaxf(known.variance_ratio * powf(ratio / known.variance_ratio, kRatioRate), 0.1f), 10.0f);
  }
  known.sum_xx = kForget * known.sum_xx + total.xx;
  known.sum_xy = kForget * known.sum_xy + total.xy;
  const float slope = (known.sum_xy + static_cast<float>(kPriorWeight * kPriorSlope)) /
                      (known.sum_xx + static_cast<float>(kPriorWeight));
  known.beta = fminf(fmaxf(slope, 0.0f), 2.0f);
  p.index.calibration[pair] = known;
}

}  // namespace

void launch_learn(const DecodeParams& params, cudaStream_t stream) {
  dispatch(params.batch, [&]<DType kDType, int kDim, int kHeads>() {
    const auto pairs = static_cast<unsigned>(params.batch.num_sequences * params.batch.num_kv_heads);
    learn_kernel<kDType, kDim><<<pairs, kLearnThreads, 0, stream>>>(params);
    check(cudaGetLastError(), "learn");
  });
}

}  // namespace tactic::cuda
