// score: log2 weights of clusters from their 8-bit centroids, sixteen at a time and one warp each, for all query heads.
//
// The query is quantized too, as high + low parts of eight bits each, which stand in neighbouring columns of an integer
// tensor-core product: exact sums, and an error of 1/64000 of the query's largest element.
#pragma once

#include "core/steps.h"
#include "cuda/attend.cuh"
#include "cuda/device.cuh"
#include "cuda/launch_config.h"
#include "cuda/segments.h"
#include "cuda/staging.cuh"

namespace tactic::cuda {

/// Into L2, as these are the first that everyone waits for. Whether they are written yet does not matter. pair:
/// (sequence, KV head).
__device__ __forceinline__ void prefetch_queries(const DecodeBatch& batch, const IndexView& index, int group, int dim,
                                                 int sequence, int64_t pair) {
  const int bytes = group * dim * (batch.q_dtype == DType::kF32 ? 4 : 2), lines = (bytes + 127) / 128;
  const auto* first = static_cast<const std::byte*>(batch.q) + pair * bytes;
  const int i = static_cast<int>(threadIdx.x);
  if (i < lines) prefetch(first + min(128 * i, bytes - 1));
  if (i == lines) prefetch(batch.kv_lens + sequence);
  if (i == lines + 1) prefetch(index.calibration + pair);
}

/// The group's queries quantized, in shared memory. `codes`: [heads][high, low][dims / 4] of four signed bytes.
template <int kDim, int kHeads>
struct QuantizedQueries {
  static constexpr int kWords = (kDim + 63) / 64 * 16;
  uint32_t codes[kHeads][2][kWords];
  float step[kHeads];   // of the high part; that of the low part is 1 / kLowUnits of it
  float norm2[kHeads];  // |q|^2
};

/// One warp, one head below 8; q(d): an element, 0 for a head that is none. Quantized only below kHeads.
template <bool kBf16, int kDim, int kHeads, class Query>
__device__ __forceinline__ void quantize_query(Query q, int head, QuantizedQueries<kDim, kHeads>& out,
                                               const SharedFragments<kDim>& fragments) {
  constexpr int kWords = QuantizedQueries<kDim, kHeads>::kWords, kPerLane = (kWords + 31) / 32;
  const int lane = threadIdx.x & 31;
  float x[kPerLane][4], largest = 0, norm2 = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int d = (32 * i + lane) * 4 + j;
      x[i][j] = d < kDim ? q(d) : 0.0f;
      largest = fmaxf(largest, fabsf(x[i][j]));
      norm2 += x[i][j] * x[i][j];
    }
  }
  constexpr int kFragmentDims = QueryFragments<kDim>::kLoads * 32;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if ((32 * i + lane) * 4 < kFragmentDims) fragments.template store<kBf16>(head, (32 * i + lane) * 4, x[i]);
  }
  if (head >= kHeads) return;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    largest = fmaxf(largest, shuffle_xor(largest, step));
    norm2 += shuffle_xor(norm2, step);
  }
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    uint32_t high = 0, low = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const SplitCode code = split_code(x[i][j] * inverse);
      high |= static_cast<uint32_t>(static_cast<uint8_t>(code.high)) << (8 * j);
      low |= static_cast<uint32_t>(static_cast<uint8_t>(code.low)) << (8 * j);
    }
    if (32 * i + lane < kWords) {
      out.codes[head][0][32 * i + lane] = high;
      out.codes[head][1][32 * i + lane] = low;
    }
  }
  if (lane == 0) {
    out.step[head] = largest / 127.0f;
    out.norm2[head] = norm2;
  }
}

/// Some warps score clusters, the last ones read sinks and recent rows meanwhile: about as many as have that share of
/// the bytes, a tile of rows being four times a tile of centroids, when half a provisional segment is recent.
__device__ __forceinline__ int num_score_warps(const OwnSegments& own, int splits) {
  const IndexGeometry& g = own.geometry;
  const int tiles = own.clusters() / kTileClusters;
  const int exact_tiles = (g.provisional_tokens / 2 + g.sink_tokens) / 16 / splits + 1;
  const int exact_warps = static_cast<int>(__fdividef(kWarps * 4.0f * exact_tiles, 4.0f * exact_tiles + tiles) + 0.5f);
  return tiles > 0 ? kWarps - min(max(exact_warps, 1), kWarps - 1) : 0;
}

/// What a warp needs of them for its integer products, four heads to a set. Lane (g, t) holds the high (g even) or low
/// part of head 4 set + g / 2, and the factors of head 4 set + t.
template <int kDim, int kHeads>
struct CentroidQuery {
  static constexpr int kSets = kHeads / 4, kLoads = (kDim + 63) / 64;
  uint32_t codes[kSets][kLoads][4];
  float high[kSets], low[kSets];  // times the code's scale and sum: the log2 score
  float norm2[kSets];             // |sm_scale * q|^2
};

template <int kDim, int kHeads>
__device__ __forceinline__ void load_centroid_query(const QuantizedQueries<kDim, kHeads>& from, float sm_scale,
                                                    CentroidQuery<kDim, kHeads>& out) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int set = 0; set < kHeads / 4; ++set) {
#pragma unroll
    for (int i = 0; i < CentroidQuery<kDim, kHeads>::kLoads; ++i) {
#pragma unroll
      for (int word = 0; word < 4; ++word)
        out.codes[set][i][word] = from.codes[4 * set + (g >> 1)][g & 1][16 * i + 4 * t + word];
    }
    out.high[set] = from.step[4 * set + t] * sm_scale * kLog2E;
    out.low[set] = out.high[set] * (1 / kLowUnits);
    out.norm2[set] = from.norm2[4 * set + t] * sm_scale * sm_scale;
  }
}

/// Running softmax of a lane: log2 maximum and sum.
struct RunningSum {
  float max = kLowest, sum = 0;

  __device__ __forceinline__ void add(float other_max, float other_sum) {
    const float top = fmaxf(max, other_max);
    sum = sum * exp2_fast(max - top) + other_sum * exp2_fast(other_max - top);
    max = top;
  }
};

/// Half the variance of a cluster's scores as in core: s^2 = spread * |q|^2 up to s = sqrt(2 ln size), then linear in
/// s.
__device__ __forceinline__ float growth(float s2, float size) {
  const float cap2 = 2 * kLn2 * log2_fast(fmaxf(size, 2.0f));
  return s2 <= cap2 ? 0.5f * s2 : sqrt_fast(cap2 * s2) - 0.5f * cap2;
}

/// log2 of the root mean square weight of a cluster's member from that of the mean weight and the spread term in it.
__device__ __forceinline__ float rms_exponent(float mean, float spread) { return mean + spread; }

/// Scores the tile: adds the estimates of all that its clusters hold to `sums` (lane (g, t): head 4 set + t), and
/// writes exponents[head * stride + cluster], log2 of the root mean square weight of a member, and places[cluster].
/// after_load() runs when the tile's memory is no longer needed.
template <int kDim, int kHeads, class AfterLoad>
__device__ __forceinline__ void score_tile(const CentroidTile<kDim>& tile, const CentroidQuery<kDim, kHeads>& q,
                                           float beta, float* exponents, int32_t stride, uint32_t* places,
                                           RunningSum (&sums)[kHeads / 4], AfterLoad after_load) {
  constexpr int kLoads = CentroidTile<kDim>::kLoads;
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  uint4 low[kLoads], high[kLoads], mean[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    low[i] = tile.load(g, t + 4 * i);
    high[i] = tile.load(8 + g, t + 4 * i);
    mean[i] = g < 2 ? tile.load(16 + g, t + 4 * i) : uint4{};
  }
  const ClusterFacts facts[2] = {tile.facts[g], tile.facts[8 + g]};
  const uint32_t placed[2] = {tile.places[g], tile.places[8 + g]};
  const float mean_step = g == 0 ? tile.mean_step : tile.mean_step * (1 / kLowUnits);
  after_load();
#pragma unroll
  for (int set = 0; set < kHeads / 4; ++set) {
    int32_t c[4] = {}, m[4] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const uint32_t(&codes)[4] = q.codes[set][i];
      mma_s8(c, low[i].x, high[i].x, low[i].y, high[i].y, codes[0], codes[1]);
      mma_s8(c, low[i].z, high[i].z, low[i].w, high[i].w, codes[2], codes[3]);
      mma_s8(m, mean[i].x, 0, mean[i].y, 0, codes[0], codes[1]);
      mma_s8(m, mean[i].z, 0, mean[i].w, 0, codes[2], codes[3]);
    }
    const auto score = [&](int32_t by_high, int32_t by_low) {
      return q.high[set] * static_cast<float>(by_high) + q.low[set] * static_cast<float>(by_low);
    };
    // Lanes of g = 0 and 1 have the products of the mean's two parts.
    const float part = mean_step * score(m[0], m[1]), mean_dot = shuffle(part, t) + shuffle(part, 4 + t);
    float means[2], sizes[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sizes[i] = static_cast<float>(placed[i] & 0xFFFFu);
      const float dot = score(c[2 * i], c[2 * i + 1]) * facts[i].scale + mean_dot;
      const float spread = beta * kLog2E * growth(facts[i].spread * q.norm2[set], sizes[i]);
      means[i] = sizes[i] > 0 ? dot + spread : kLowest;
      exponents[(4 * set + t) * stride + g + 8 * i] = sizes[i] > 0 ? rms_exponent(means[i], spread) : kLowest;
    }
    const float top = fmaxf(fmaxf(means[0], means[1]), sums[set].max);
    sums[set].sum = sums[set].sum * exp2_fast(sums[set].max - top) + sizes[0] * exp2_fast(means[0] - top) +
                    sizes[1] * exp2_fast(means[1] - top);
    sums[set].max = top;
  }
  if (t < 2) places[g + 8 * t] = t == 0 ? placed[0] : placed[1];
}

}  // namespace tactic::cuda
