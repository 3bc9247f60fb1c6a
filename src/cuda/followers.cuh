// Followers: rows after those that weighed much, which the next step reads for certain, and rows that a query itself
// names as likely (core/expected_rows.h). Each block of a cluster names rows of its own segments, so that no block must
// know another's; the row after a segment's last is not named, nor are those after rows that no selection took.
#pragma once

#include "cuda/device.cuh"
#include "cuda/launch_config.h"
#include "cuda/segments.h"

namespace tactic::cuda {

inline constexpr float kHeavyLog2 = -6.6438562f;  // log2 of the share of a head from which on a row is heavy: 0.01
inline constexpr int kMaxNotes = 256;

/// In shared memory: what the step before named, and rows of this one that may be heavy.
struct alignas(16) FollowerBuffers {
  uint64_t low_bits;  // most rows are told apart by these
  int32_t count, num_notes;
  float floors[kMaxGroup];   // log2 of the weight, by head, from which on a row may be heavy
  float besides[kMaxGroup];  // weight beside the sinks, by head
  int32_t rows[kMaxFollowers + kMaxLikely];
  uint2 notes[kMaxNotes];  // row, and its score (log2), whose three last bits are the head

  /// log2 of all weights of a head, as estimated.
  __device__ __forceinline__ float estimate(int h) const { return floors[h] - kHeavyLog2; }
};
static_assert(sizeof(FollowerBuffers) == kFollowerBytes);

/// One warp takes over what the step before named.
__device__ __forceinline__ void take_over(FollowerBuffers& buffers, const Followers& names, int splits) {
  const int lane = threadIdx.x & 31;
  const int count = names.splits == splits ? names.count : 0;
  const int32_t row = lane < count ? names.rows[lane] : 0;
  const uint32_t bit = lane < count ? 1u << (row & 31) : 0;
  const uint32_t low = __reduce_or_sync(kAllLanes, (row & 32) == 0 ? bit : 0),
                 high = __reduce_or_sync(kAllLanes, (row & 32) != 0 ? bit : 0);
  buffers.rows[lane] = row;
  if (lane < kMaxGroup) buffers.floors[lane] = -kLowest;  // until an estimate of all weights is there
  if (lane == 0) {
    buffers.low_bits = static_cast<uint64_t>(high) << 32 | low;
    buffers.count = count;
    buffers.num_notes = 0;
  }
}

__device__ __forceinline__ bool is_follower(const FollowerBuffers& buffers, int32_t row) {
  if ((buffers.low_bits >> (row & 63) & 1) == 0) return false;
  for (int i = 0; i < buffers.count; ++i) {
    if (buffers.rows[i] == row) return true;
  }
  return false;
}

/// A warp's tile: remembers rows that may be heavy. Lane l knows the tile's row l & 15; scores as attend_tile has them.
/// followers: they are read before the floors are known, so what the warp has seen, `known` of the lane's head, stands
/// for those.
__device__ __forceinline__ void note(FollowerBuffers& buffers, int32_t row, const float (&scores)[4], int group_size,
                                     bool followers = false, float known = 0) {
  const int lane = threadIdx.x & 31, head = lane >> 2;
  float top = fmaxf(fmaxf(scores[0], scores[1]), fmaxf(scores[2], scores[3])), floor = buffers.floors[head];
  if (followers) {
    top = fmaxf(top, shuffle_xor(top, 1));
    top = fmaxf(top, shuffle_xor(top, 2));
    floor = fmaxf(top, known) + kHeavyLog2;
  }
  if (head >= group_size) floor = -kLowest;
  if (!__any_sync(kAllLanes, top > floor)) return;
#pragma unroll 1
  for (int j = 0; j < 4; ++j) {
    const float score = j == 0 ? scores[0] : j == 1 ? scores[1] : j == 2 ? scores[2] : scores[3];
    const int32_t noted = shuffle(row, 2 * (lane & 3) + (j & 1) + 8 * (j >> 1));
    if (!(score > floor)) continue;
    const int at = atomicAdd(&buffers.num_notes, 1);
    if (at < kMaxNotes)
      buffers.notes[at] = {static_cast<uint32_t>(noted), (__float_as_uint(score) & ~7u) | static_cast<uint32_t>(head)};
  }
}

/// The segment, the full ones first, of a row in a cluster; -1: it stands in none.
__device__ __forceinline__ int32_t segment_of_row(const IndexView& index, const SequenceState& state, int64_t pair,
                                                  int32_t row) {
  const IndexGeometry& g = index.geometry;
  const int32_t full_rows = state.full_segments * g.segment_tokens;
  const bool full = row < full_rows;
  const int32_t tokens = full ? g.segment_tokens : g.provisional_tokens, begin = full ? 0 : full_rows,
                number = (row - begin) / tokens, first = begin + number * tokens;
  if (row < g.sink_tokens || number >= (full ? state.full_segments : state.provisional_segments)) return -1;
  const int32_t slot = full ? number : g.max_segments + number;
  const int32_t unclustered = __ldg(index.num_not_finite + pair * g.all_segments + slot);
  const uint16_t* list = index.members + pair * g.max_rows + first + tokens - unclustered;
  for (int i = 0; i < unclustered; ++i) {
    if (__ldg(list + i) == row - first) return -1;
  }
  return full ? number : state.full_segments + number;
}

/// The warp that took over what the step before named adds those of the query's likely rows that stand in clusters of
/// the block's own segments. Rows that the sequence does not have, or twice, are none.
__device__ __forceinline__ void add_likely(FollowerBuffers& buffers, const DecodeBatch& batch, const IndexView& index,
                                           const SequenceState& state, int sequence, int64_t pair, int rank,
                                           int splits) {
  if (batch.likely_rows == nullptr) return;
  const int lane = threadIdx.x & 31;
  const int32_t kv_len = batch.kv_lens[sequence];
  const int32_t* likely = batch.likely_rows + static_cast<int64_t>(sequence) * batch.max_likely_rows;
  __syncwarp();
#pragma unroll 1
  for (int first = 0; first < batch.max_likely_rows; first += 32) {
    const int32_t row = first + lane < batch.max_likely_rows ? likely[first + lane] : -1;
    const int count = buffers.count;
    bool mine = row >= 0 && row < kv_len;
    if (mine) {
      const int32_t segment = segment_of_row(index, state, pair, row);
      mine = segment >= 0 && segment % splits == rank;
    }
    for (int i = 0; i < count && mine; ++i) mine = buffers.rows[i] != row;
    const uint32_t same = __match_any_sync(kAllLanes, mine ? row : -1 - lane), below = (1u << lane) - 1;
    mine = mine && (same & below) == 0;
    const uint32_t taken = __ballot_sync(kAllLanes, mine);
    const uint32_t bit = mine ? 1u << (row & 31) : 0;
    const uint32_t low = __reduce_or_sync(kAllLanes, (row & 32) == 0 ? bit : 0),
                   high = __reduce_or_sync(kAllLanes, (row & 32) != 0 ? bit : 0);
    if (mine) buffers.rows[count + __popc(taken & below)] = row;
    __syncwarp();
    if (lane == 0) {
      buffers.count = count + __popc(taken);
      buffers.low_bits |= static_cast<uint64_t>(high) << 32 | low;
    }
    __syncwarp();
  }
}

/// One warp, at the end of a step: names the rows after heavy ones, the lowest if there are too many. limit: for head
/// lane % heads, log2 of the weight of a heavy row. Too many notes, whose order is chance, name nothing.
__device__ __forceinline__ void name_followers(const FollowerBuffers& buffers, float limit, const IndexView& index,
                                               const SequenceState& state, int64_t pair, int splits, Followers& out) {
  const int lane = threadIdx.x & 31;
  const int notes = buffers.num_notes > kMaxNotes ? 0 : buffers.num_notes;
  constexpr int kEach = kMaxNotes / 32;
  int32_t rows[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    rows[i] = INT32_MAX;
    if (32 * i >= notes) continue;
    const uint2 noted = 32 * i + lane < notes ? buffers.notes[32 * i + lane] : uint2{};
    const float above = shuffle(limit, static_cast<int>(noted.y & 7));
    const auto row = static_cast<int32_t>(noted.x);
    if (32 * i + lane >= notes || !(__uint_as_float(noted.y & ~7u) > above)) continue;
    const int32_t segment = segment_of_row(index, state, pair, row);
    if (segment >= 0 && segment_of_row(index, state, pair, row + 1) == segment) rows[i] = row + 1;
  }
  int32_t last = -1;
  int count = 0;
  for (; count < kMaxFollowers; ++count) {
    int32_t least = INT32_MAX;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (rows[i] > last && rows[i] < least) least = rows[i];
    }
    least = __reduce_min_sync(kAllLanes, least);
    if (least == INT32_MAX) break;
    if (lane == 0) out.rows[count] = least;
    last = least;
  }
  if (lane == 0) {
    out.count = count;
    out.splits = splits;
  }
}

}  // namespace tactic::cuda
