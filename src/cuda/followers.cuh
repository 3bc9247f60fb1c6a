// Followers: rows after those that weighed much, which the next step reads for certain, rows that steps found heavy
// though their clusters promised little, which every step reads once they were found so twice, and rows that a query
// itself names as likely (core/expected_rows.h). Each block of a cluster names rows of its own segments, so that no
// block must know another's; the row after a segment's last is not named, nor are those after rows that no selection
// took.
#pragma once

#include "cuda/device.cuh"
#include "cuda/launch_config.h"
#include "cuda/segments.h"

namespace tactic::cuda {

inline constexpr float kHeavyLog2 = -6.6438562f;  // log2 of the share of a head from which on a row is heavy: 0.01
inline constexpr int kMaxNotes = 256;
inline constexpr int32_t kSurprise = INT32_MIN;  // bit of a row that is noted: its cluster was not to be read whole

/// In shared memory: rows that are read for certain, and rows of this step that may be heavy.
struct alignas(16) FollowerBuffers {
  int32_t count, num_heavy, num_notes;
  int32_t moved;             // not 0: heavy rows were remembered by other blocks than now
  float floors[kMaxGroup];   // log2 of the weight, by head, from which on a row may be heavy
  float besides[kMaxGroup];  // weight beside the sinks, by head
  int32_t rows[kMaxHeavy + kMaxFollowers + kMaxLikely];  // the heavy ones first
  int32_t slots[kFollowerSlots];                         // hash table of those; -1: free
  uint2 notes[kMaxNotes];  // row, and its score (log2), whose three last bits are the head

  /// log2 of all weights of a head, as estimated.
  __device__ __forceinline__ float estimate(int h) const { return floors[h] - kHeavyLog2; }
};
static_assert(sizeof(FollowerBuffers) == kFollowerBytes);

/// Where a row's search begins, of kFollowerSlots.
__device__ __forceinline__ uint32_t slot_of(int32_t row) { return static_cast<uint32_t>(row) * 0x9E3779B1u >> 24; }

__device__ __forceinline__ bool is_follower(const FollowerBuffers& buffers, int32_t row) {
  for (uint32_t at = slot_of(row);; ++at) {
    const int32_t found = buffers.slots[at % kFollowerSlots];
    if (found == row || found < 0) return found == row;
  }
}

/// One warp adds the rows of those lanes that have one, each once, up to `limit` in all.
__device__ __forceinline__ void add_rows(FollowerBuffers& buffers, int32_t row, bool mine, int limit) {
  const int lane = threadIdx.x & 31, count = buffers.count;
  mine = mine && !is_follower(buffers, row);
  const uint32_t same = __match_any_sync(kAllLanes, mine ? row : -1 - lane), below = (1u << lane) - 1;
  const uint32_t first = __ballot_sync(kAllLanes, mine && (same & below) == 0);
  const int at = count + __popc(first & below);
  if ((first >> lane & 1) != 0 && at < limit) {
    buffers.rows[at] = row;
    for (uint32_t slot = slot_of(row); atomicCAS(&buffers.slots[slot % kFollowerSlots], -1, row) != -1; ++slot) {
    }
  }
  __syncwarp();
  if (lane == 0) buffers.count = min(count + __popc(first), limit);
  __syncwarp();
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
    const int32_t noted = shuffle(row, row_in_tile(lane & 3, j));
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

/// Whether a row stands in a cluster of the block's own segments.
__device__ __forceinline__ bool is_own(const IndexView& index, const SequenceState& state, int64_t pair, int32_t row,
                                       int rank, int splits) {
  const int32_t segment = segment_of_row(index, state, pair, row);
  return segment >= 0 && segment % splits == rank;
}

/// One warp takes over what steps before have named, if the step learns.
__device__ __forceinline__ void take_over(FollowerBuffers& buffers, const IndexView& index, const SequenceState& state,
                                          int64_t pair, int rank, int splits, bool learns) {
  const int lane = threadIdx.x & 31;
  const HeavyRows* lists = index.heavy + pair * kMaxSplits;
  const Followers& names = index.followers[pair * kMaxSplits + rank];
  const int32_t before = learns ? lists[0].splits : 0;
  const int32_t follower = learns && names.splits == splits && lane < names.count ? names.rows[lane] : -1;
  for (int i = lane; i < kFollowerSlots; i += 32) buffers.slots[i] = -1;
  if (lane < kMaxGroup) buffers.floors[lane] = -kLowest;  // until an estimate of all weights is there
  if (lane == 0) buffers.count = buffers.num_notes = 0;
  __syncwarp();
  const bool moved = before != splits;  // then each block looks for its rows among all that were named
#pragma unroll 1
  for (int list = moved ? 0 : rank; list < (moved ? before : rank + 1); ++list) {
    for (int first = 0; first < lists[list].count; first += 32) {
      const int32_t row = first + lane < lists[list].count ? lists[list].rows[first + lane] : -1;
      add_rows(buffers, row, row >= 0 && (!moved || is_own(index, state, pair, row, rank, splits)), kMaxHeavy);
    }
  }
  if (lane == 0) {
    buffers.num_heavy = buffers.count;
    buffers.moved = moved;
  }
  add_rows(buffers, follower, follower >= 0, kMaxHeavy + kMaxFollowers);
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
    add_rows(buffers, row, row >= 0 && row < kv_len && is_own(index, state, pair, row, rank, splits),
             kMaxHeavy + kMaxFollowers + kMaxLikely);
  }
}

/// A warp's rows that were noted and are heavy, in ascending order. limit: for head lane % heads, log2 of the weight of
/// a heavy row. Too many notes, whose order is chance, are none.
struct NotedRows {
  static constexpr int kEach = kMaxNotes / 32;
  int32_t rows[kEach];
  int32_t last = -1;

  /// row_of(noted): the row to take for it, INT32_MAX: none.
  template <class RowOf>
  __device__ __forceinline__ NotedRows(const FollowerBuffers& buffers, float limit, RowOf row_of) {
    const int lane = threadIdx.x & 31, notes = buffers.num_notes > kMaxNotes ? 0 : buffers.num_notes;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      rows[i] = INT32_MAX;
      if (32 * i >= notes) continue;
      const uint2 noted = 32 * i + lane < notes ? buffers.notes[32 * i + lane] : uint2{};
      const float above = shuffle(limit, static_cast<int>(noted.y & 7));
      if (32 * i + lane < notes && __uint_as_float(noted.y & ~7u) > above)
        rows[i] = row_of(static_cast<int32_t>(noted.x));
    }
  }
  /// The next one; INT32_MAX: none is left.
  __device__ __forceinline__ int32_t next() {
    int32_t least = INT32_MAX;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (rows[i] > last && rows[i] < least) least = rows[i];
    }
    return last = __reduce_min_sync(kAllLanes, least);
  }
};

/// One warp, at the end of a step: names the rows after heavy ones, the lowest if there are too many.
__device__ __forceinline__ void name_followers(const FollowerBuffers& buffers, float limit, const IndexView& index,
                                               const SequenceState& state, int64_t pair, int splits, Followers& out) {
  const int lane = threadIdx.x & 31;
  NotedRows rows(buffers, limit, [&](int32_t noted) {
    const int32_t row = noted & ~kSurprise, segment = segment_of_row(index, state, pair, row);
    return segment >= 0 && segment_of_row(index, state, pair, row + 1) == segment ? row + 1 : INT32_MAX;
  });
  int count = 0;
  for (; count < kMaxFollowers; ++count) {
    const int32_t row = rows.next();
    if (row == INT32_MAX) break;
    if (lane == 0) out.rows[count] = row;
  }
  if (lane == 0) {
    out.count = count;
    out.splits = splits;
  }
}

/// One warp, at the end of a step: as core's found_heavy for the rows that surprised it. A block remembers as many rows
/// as the norms chose outliers in its segments, or kMaxHeavy.
__device__ __forceinline__ void name_heavy(const FollowerBuffers& buffers, float limit, const OwnSegments& own,
                                           HeavyRows& out) {
  const int lane = threadIdx.x & 31;
  const IndexGeometry& g = own.geometry;
  const int32_t rows = own.own_full * g.segment_tokens + own.own_provisional * g.provisional_tokens,
                most = min(kMaxHeavy, static_cast<int>(2 * g.outlier_fraction * static_cast<float>(rows)));
  NotedRows found(buffers, limit, [](int32_t noted) { return noted < 0 ? noted & ~kSurprise : INT32_MAX; });
  const bool moved = buffers.moved != 0;
  int32_t row = found.next();
  if (row == INT32_MAX && !moved) return;
  int count = buffers.num_heavy, n = moved ? 0 : out.num_suspects;
  int32_t early = lane < n ? out.suspects[lane] : -1, late = 32 + lane < n ? out.suspects[32 + lane] : -1;
  for (int i = lane; i < count; i += 32) out.rows[i] = buffers.rows[i];
  for (; row != INT32_MAX; row = found.next()) {
    const uint32_t in_early = __ballot_sync(kAllLanes, early == row), in_late = __ballot_sync(kAllLanes, late == row);
    const bool again = (in_early | in_late) != 0;
    // Which suspect goes: the one that is confirmed, or for a new one the oldest if there is no room.
    const int gone = in_early != 0      ? __ffs(in_early) - 1
                     : in_late != 0     ? 31 + __ffs(in_late)
                     : n < kMaxSuspects ? n
                                        : 0;
    const int32_t after_early = shuffle(lane == 0 ? late : early, (lane + 1) & 31),
                  after_late = shuffle(late, (lane + 1) & 31);
    if (lane >= gone) early = after_early;
    if (32 + lane >= gone) late = lane < 31 ? after_late : -1;
    n -= again || n == kMaxSuspects;
    if (again) {
      if (count < most && lane == 0) out.rows[count] = row;
      count += count < most;
    } else {
      if (lane == n) early = row;
      if (32 + lane == n) late = row;
      ++n;
    }
  }
  out.suspects[lane] = early;
  out.suspects[32 + lane] = late;
  if (lane == 0) {
    out.count = count;
    out.num_suspects = n;
    out.splits = own.splits;
  }
}

}  // namespace tactic::cuda
