// attend: softmax over listed rows, sixteen at a time and one warp each, for all query heads of a KV head at once.
//
// Scores are a product of the queries [8 heads, head_dim] with the rows' keys, outputs one of the values with the
// weights [rows, 8 heads]: the fragment that the first leaves in registers is the one that the second needs. Dimensions
// may come in any order in a dot product, so a lane loads eight neighbouring elements (16 bytes) and they stand where
// they lie.
#pragma once

#include "cuda/rows.cuh"

namespace tactic::cuda {

/// The group's queries as fragments of a warp: lane (g, t) holds elements [32 i + 8 t, + 8) of head g.
template <int kDim>
struct QueryFragments {
  static constexpr int kLoads = (kDim + 31) / 32;
  uint4 parts[kLoads];

  __device__ __forceinline__ uint4 part(int i) const { return parts[i]; }
};

/// The same in shared memory, [kLoads][32 lanes], where registers are too few.
template <int kDim>
struct SharedFragments {
  uint4* parts;

  __device__ __forceinline__ uint4 part(int i) const { return parts[32 * i + (threadIdx.x & 31)]; }
  /// Elements d to d + 3 of a head below 8, d being a multiple of 4.
  template <bool kBf16>
  __device__ __forceinline__ void store(int head, int d, const float (&x)[4]) const {
    auto* to = reinterpret_cast<uint2*>(parts + 32 * (d / 32) + 4 * head + d % 32 / 8) + d % 8 / 4;
    *to = {pack<kBf16>(x[0], x[1]), pack<kBf16>(x[2], x[3])};
  }
};

/// q: [group_size, kDim] f32 in shared memory.
template <bool kBf16, int kDim>
__device__ __forceinline__ void make_query_fragments(const float* q, int group_size, QueryFragments<kDim>& out) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int i = 0; i < QueryFragments<kDim>::kLoads; ++i) {
    const int begin = 32 * i + 8 * t;
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool real = g < group_size && begin < kDim;
      words[j] = real ? pack<kBf16>(q[g * kDim + begin + 2 * j], q[g * kDim + begin + 2 * j + 1]) : 0;
    }
    out.parts[i] = {words[0], words[1], words[2], words[3]};
  }
}

/// What a warp has read so far. Lane (g, t): max and sum are of head g, the sum over the rows this lane weighed alone.
/// acc[p][i]: elements 64 p + 8 g + 2 i and + 1 of heads 2 t and 2 t + 1.
template <int kDim>
struct AttendState {
  static constexpr int kParts = (kDim + 63) / 64;
  float max = kLowest, sum = 0;
  float sampled_sum = 0, sampled_variance = 0;
  float acc[kParts][4][4] = {};
};

/// A tile of 16 rows for one warp. Lane l holds row l & 15: its offsets, and log2 of its weight (kLowest: none).
struct RowTile {
  int64_t k_offset, v_offset;
  float log_weight;
};

/// Asks for a tile's rows: two lanes a row, 128 bytes each; of longer rows the rest comes with the loads.
template <DType kDType, int kDim>
__device__ __forceinline__ void prefetch_tile(const std::byte* k, const std::byte* v, const RowTile& tile) {
  constexpr auto kBytes = static_cast<int>(stored_bytes<kDType>(kDim));
  const int half = static_cast<int>(threadIdx.x & 16) * 8;
  if (half < kBytes) {
    prefetch(k + tile.k_offset + half);
    prefetch(v + tile.v_offset + half);
  }
}

template <DType kDType, int kDim>
__device__ __forceinline__ void load_keys(const std::byte* k, const RowTile& tile,
                                          uint4 (&low)[QueryFragments<kDim>::kLoads],
                                          uint4 (&high)[QueryFragments<kDim>::kLoads]) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const std::byte* k_low = k + shuffle(tile.k_offset, g);
  const std::byte* k_high = k + shuffle(tile.k_offset, g + 8);
#pragma unroll
  for (int i = 0; i < QueryFragments<kDim>::kLoads; ++i) {
    const bool real = kDim % 32 == 0 || 32 * i + 8 * t < kDim;
    low[i] = real ? Chunk<kDType>::load(k_low, 4 * i + t) : uint4{};
    high[i] = real ? Chunk<kDType>::load(k_high, 4 * i + t) : uint4{};
  }
}

template <DType kDType, int kDim>
__device__ __forceinline__ void load_values(const std::byte* v, const RowTile& tile,
                                            uint4 (&values)[AttendState<kDim>::kParts][4]) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const std::byte* row = v + shuffle(tile.v_offset, row_in_tile(t, j));
#pragma unroll
    for (int p = 0; p < AttendState<kDim>::kParts; ++p) {
      const bool real = kDim % 64 == 0 || 64 * p + 8 * g < kDim;
      values[p][j] = real ? Chunk<kDType>::load(row, 8 * p + g) : uint4{};
    }
  }
}

/// scores[j], lane (g, t): log2 score of head g and row_in_tile(t, j). `scale` includes log2(e).
/// kApart: each is rounded by itself, so that a row has the same score wherever it is read, and is not part of a sum.
template <DType kDType, int kDim, bool kApart, class Fragments>
__device__ __forceinline__ void score_rows(const Fragments& q, const uint4 (&low)[QueryFragments<kDim>::kLoads],
                                           const uint4 (&high)[QueryFragments<kDim>::kLoads], float scale,
                                           float (&scores)[4]) {
  constexpr bool kBf16 = Chunk<kDType>::kBf16;
  float c_low[4] = {}, c_high[4] = {};
#pragma unroll
  for (int i = 0; i < QueryFragments<kDim>::kLoads; ++i) {
    const uint4 part = q.part(i);
    mma_top<kBf16>(c_low, part.x, part.y, low[i].x, low[i].y);
    mma_top<kBf16>(c_high, part.x, part.y, high[i].x, high[i].y);
    mma_top<kBf16>(c_low, part.z, part.w, low[i].z, low[i].w);
    mma_top<kBf16>(c_high, part.z, part.w, high[i].z, high[i].w);
  }
  const auto scaled = [&](float x) { return kApart ? __fmul_rn(x, scale) : x * scale; };
  scores[0] = scaled(c_low[0]);
  scores[1] = scaled(c_low[1]);
  scores[2] = scaled(c_high[0]);
  scores[3] = scaled(c_high[1]);
}

/// The scores alone of a tile's rows, as where their values are read too. k_offset: the row of lane & 15.
template <DType kDType, int kDim, class Fragments>
__device__ __forceinline__ void score_keys(const Fragments& q, const std::byte* k, int64_t k_offset, float scale,
                                           float (&scores)[4]) {
  uint4 low[QueryFragments<kDim>::kLoads], high[QueryFragments<kDim>::kLoads];
  load_keys<kDType, kDim>(k, {k_offset, 0, 0}, low, high);
  score_rows<kDType, kDim, true>(q, low, high, scale, scores);
}

/// acc += weights x values.
template <bool kBf16, int kDim>
__device__ __forceinline__ void add_values(AttendState<kDim>& state,
                                           const uint4 (&values)[AttendState<kDim>::kParts][4],
                                           const float (&weights)[4]) {
  const uint32_t b0 = pack<kBf16>(weights[0], weights[1]), b1 = pack<kBf16>(weights[2], weights[3]);
#pragma unroll
  for (int p = 0; p < AttendState<kDim>::kParts; ++p) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t w0 = (&values[p][0].x)[i], w1 = (&values[p][1].x)[i], w2 = (&values[p][2].x)[i],
                     w3 = (&values[p][3].x)[i];
      const uint32_t a[4] = {__byte_perm(w0, w1, 0x5410), __byte_perm(w0, w1, 0x7632), __byte_perm(w2, w3, 0x5410),
                             __byte_perm(w2, w3, 0x7632)};
      mma<kBf16>(state.acc[p][i], a, b0, b1);
    }
  }
}

/// Raises the state's maximum to a whole number that covers `scores` and rescales what it holds. A whole number, so
/// that a row's weight is rounded alike whatever else the warp has read, and can be taken back (attend_rest).
template <int kDim>
__device__ __forceinline__ void raise_max(AttendState<kDim>& state, const float (&scores)[4]) {
  const int t = threadIdx.x & 3;
  float top = fmaxf(fmaxf(scores[0], scores[1]), fmaxf(scores[2], scores[3]));
  top = fmaxf(top, shuffle_xor(top, 1));
  top = fmaxf(top, shuffle_xor(top, 2));
  top = fmaxf(ceilf(top), state.max);
  const float factor = exp2_fast(state.max - top);
  state.max = top;
  state.sum *= factor;
  state.sampled_sum *= factor;
  state.sampled_variance *= factor * factor;
  const float f0 = shuffle(factor, 8 * t), f1 = shuffle(factor, 8 * t + 4);
#pragma unroll
  for (int p = 0; p < AttendState<kDim>::kParts; ++p) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      state.acc[p][i][0] *= f0;
      state.acc[p][i][1] *= f1;
      state.acc[p][i][2] *= f0;
      state.acc[p][i][3] *= f1;
    }
  }
}

/// Reads a tile of rows. Rows of log weight 0 are certain, of a greater one sampled. Returns whether a sampled row that
/// this lane weighed stands for more than `limit` (log2, of the lane's head), as a bit per row. meanwhile() runs while
/// the rows are on their way, scored(scores, log_weights) sees their own scores, as score_rows has them.
template <DType kDType, int kDim, class Meanwhile, class Scored>
__device__ __forceinline__ uint32_t attend_tile(AttendState<kDim>& state, const std::byte* k, const std::byte* v,
                                                const RowTile& tile, const SharedFragments<kDim>& q, float scale,
                                                float limit, Meanwhile meanwhile, Scored scored) {
  uint4 low[QueryFragments<kDim>::kLoads], high[QueryFragments<kDim>::kLoads], values[AttendState<kDim>::kParts][4];
  load_keys<kDType, kDim>(k, tile, low, high);
  load_values<kDType, kDim>(v, tile, values);
  meanwhile();
  float x[4];
  score_rows<kDType, kDim, true>(q, low, high, scale, x);
  const int t = threadIdx.x & 3;
  float log_weights[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) log_weights[j] = shuffle(tile.log_weight, row_in_tile(t, j));
  scored(x, log_weights);
#pragma unroll
  for (int j = 0; j < 4; ++j) x[j] += log_weights[j];
  raise_max(state, x);
  float weights[4];
  uint32_t heavy = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    weights[j] = exp2_fast(x[j] - state.max);
    state.sum += weights[j];
    if (log_weights[j] > 0) {
      state.sampled_sum += weights[j];
      state.sampled_variance += weights[j] * weights[j] * (1 - exp2_fast(-log_weights[j]));
      if (x[j] > limit) heavy |= 1u << row_in_tile(t, j);
    }
  }
  add_values<Chunk<kDType>::kBf16, kDim>(state, values, weights);
  return heavy;
}

/// Reads a tile of rows of a cluster that was sampled and is to be read whole. Lane l says of row l & 15 whether it is
/// `inside`, and whether it was `taken` with `log_weight` (log2): what that added, wherever it did, is taken back.
/// scored(scores) as in attend_tile; kLowest: not inside.
template <DType kDType, int kDim, class Scored>
__device__ __forceinline__ void attend_rest(AttendState<kDim>& state, const std::byte* k, const std::byte* v,
                                            const RowTile& tile, bool inside, bool taken, float log_weight,
                                            const SharedFragments<kDim>& q, float scale, Scored scored) {
  uint4 low[QueryFragments<kDim>::kLoads], high[QueryFragments<kDim>::kLoads], values[AttendState<kDim>::kParts][4];
  load_keys<kDType, kDim>(k, tile, low, high);
  load_values<kDType, kDim>(v, tile, values);
  float x[4];
  score_rows<kDType, kDim, true>(q, low, high, scale, x);
  const int t = threadIdx.x & 3;
  const uint32_t insiders = __ballot_sync(kAllLanes, inside) >> 2 * t, drawn = __ballot_sync(kAllLanes, taken);
  const auto bit = [](uint32_t rows, int j) { return (rows >> row_in_tile(0, j) & 1) != 0; };
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (!bit(insiders, j)) x[j] = kLowest;
  }
  scored(x);
  const uint32_t mine = drawn >> 2 * t;
  float back[4], weights[4];  // what is taken back may weigh 2^32 times as much as the row itself
#pragma unroll
  for (int j = 0; j < 4; ++j) back[j] = bit(mine, j) ? x[j] + log_weight : x[j];
  raise_max(state, back);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    weights[j] = exp2_fast(x[j] - state.max);
    back[j] = bit(mine, j) ? exp2_fast(back[j] - state.max) : 0.0f;
    state.sampled_sum -= back[j];
    state.sampled_variance -= back[j] * back[j] * (1 - exp2_fast(-log_weight));
    state.sum += weights[j] - back[j];
    back[j] = -back[j];
  }
  // Not their difference: rounded apart, what is taken back is what was added.
  add_values<Chunk<kDType>::kBf16, kDim>(state, values, weights);
  if (drawn != 0) add_values<Chunk<kDType>::kBf16, kDim>(state, values, back);
}

}  // namespace tactic::cuda
