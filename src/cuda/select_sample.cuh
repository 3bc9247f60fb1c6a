// select_sample: inclusion probabilities of a block's clusters, and which rows systematic sampling takes.
//
// Probabilities are fixed-point numbers of 32 bits, so that running sums are exact and the k-th row of a cluster is
// found by a division, alone, without walking there.
#pragma once

#include "cuda/launch_config.h"
#include "cuda/segments.h"

namespace tactic::cuda {

inline constexpr uint32_t kCertain = 0xFFFFFFFFu;
inline constexpr uint32_t kReadOn = kCertain - 1;  // no probability: a drawn cluster was read whole for its mass since

/// A block's tables, by own cluster and own segment (table_bytes() of them). In shared memory, or in the workspace
/// where they do not fit.
struct SelectTables {
  float* exponents;         // [heads, stride]
  int32_t stride;           // a few more than clusters, so that heads lie in different banks
  uint64_t* begins;         // [clusters] running sum before the cluster's first member
  uint32_t* places;         // [clusters]
  uint32_t* probabilities;  // [clusters] of a member, 2^32 = 1; kCertain: all are read
  uint32_t* counts;         // [clusters] rows taken in the segment's clusters before this one
  uint32_t* refined;        // [clusters / 32 + 1] bits
  int32_t* segment_counts;  // [segments + 1] rows taken in the own segments before this one; room for read_on follows

  /// [clusters / 32 + 1] bits: to be read for their mass. No member, since plain steps have no register for it.
  __device__ uint32_t* read_on(int32_t segments) const {
    return reinterpret_cast<uint32_t*>(segment_counts + segments + 1);
  }

  __device__ SelectTables(std::byte* memory, int32_t clusters, int32_t heads) {
    exponents = reinterpret_cast<float*>(memory);
    stride = clusters + kTablePadding;
    begins = reinterpret_cast<uint64_t*>(exponents + stride * heads);
    places = reinterpret_cast<uint32_t*>(begins + clusters);
    probabilities = places + clusters;
    counts = probabilities + clusters;
    refined = counts + clusters;
    segment_counts = reinterpret_cast<int32_t*>(refined + clusters / 32 + 1);
  }
};

/// The rows of a block's cluster c.
struct ClusterMembers {
  OwnSegment segment;
  int32_t size;
  const uint16_t* members;  // of the cluster

  __device__ __forceinline__ ClusterMembers(const SelectTables& tables, const OwnSegments& own,
                                            const uint16_t* of_sequence, int32_t c)
      : segment(own.at(own.segment_of(c))),
        size(static_cast<int32_t>(tables.places[c] & 0xFFFFu)),
        members(of_sequence + segment.first_row + (tables.places[c] >> 16)) {}
  /// The m-th; the last one for an m beyond it.
  __device__ __forceinline__ int32_t row(int32_t m) const {
    return segment.first_row + __ldg(members + min(m, size - 1));
  }
};

/// As core's tau_of where tau is not given, before the query's factor.
__device__ __forceinline__ float tau_for_error(float target_error, float variance_ratio) {
  return sqrt_fast(variance_ratio) / (target_error * target_error);
}

/// 64 random bits of a step: as core's random_offset.
__device__ __forceinline__ uint64_t step_random(uint64_t seed, uint64_t stream_id, int32_t layer, int32_t head,
                                                int64_t position) {
  uint64_t key = seed;
  for (const uint64_t part :
       {stream_id, static_cast<uint64_t>(layer), static_cast<uint64_t>(head), static_cast<uint64_t>(position)})
    key = key * 0xD6E8FEB86659FD93u + part + 1;
  return hash64(key);
}

/// Running sums of a segment begin here, in units of 2^-32: as core's segment_offset. `random`: 64 random bits of the
/// step.
__device__ __forceinline__ uint64_t segment_offset(uint64_t random, int32_t first_row) {
  return (random + hash64(static_cast<uint64_t>(first_row))) >> 32;
}

template <class T>
__device__ __forceinline__ T warp_inclusive_sum(T x) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T other = __shfl_up_sync(kAllLanes, x, step);
    if (lane >= step) x += other;
  }
  return x;
}

/// What a lane's clusters say of the draw before it.
struct Foreseen {
  float variance = 0;        // times tau^2
  float count_variance = 0;  // of the number of rows taken
  int32_t clusters = 0;      // that are not taken whole
};

/// One warp, one segment, a lane a cluster: fills begins, probabilities and counts of its clusters; returns the rows
/// taken, and adds to `sampled` those that this lane's clusters took by chance, to `foreseen` what is known of them.
/// Short, because a step at batch 1 runs it once or twice a warp, and then instructions take longer to come than to
/// run. shifts[h]: log2 of the normalizer of head h over tau and its sink_factor, and of sqrt(group size); besides[h]:
/// the inverse square of that factor. kMeasured: `foreseen` is wanted.
template <int kHeads, bool kMeasured>
__device__ __forceinline__ int32_t select_segment(const SelectTables& tables, const OwnSegment& segment,
                                                  const uint16_t* members, uint64_t offset, int group_size,
                                                  const float (&shifts)[kHeads], const float (&besides)[kHeads],
                                                  uint32_t& sampled, Foreseen& foreseen) {
  const int lane = threadIdx.x & 31;
  uint64_t sum = offset;
  uint32_t taken = 0;
#pragma unroll 1
  for (int32_t first = 0; first < segment.num_clusters; first += 32) {
    const bool inside = first + lane < segment.num_clusters;
    const int32_t c = segment.local_cluster + (inside ? first + lane : 0);
    float p2 = 0, w2 = 0;  // w2: without the factors for sinks
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h >= group_size) continue;
      const float square = exp2_fast(2 * (tables.exponents[h * tables.stride + c] - shifts[h]));
      p2 += square;
      if constexpr (kMeasured) w2 += besides[h] * square;
    }
    const uint32_t place = tables.places[c], size = inside ? place & 0xFFFFu : 0;
    const float p = sqrt_fast(p2);
    const bool certain = !(p < 1);
    const uint32_t fixed = certain ? kCertain : static_cast<uint32_t>(p * 4294967296.0f);
    const uint64_t width = certain ? 0 : static_cast<uint64_t>(fixed) * size;
    const uint64_t after = warp_inclusive_sum(width), end = sum + after, begin = end - width;
    const uint32_t count = certain ? size : static_cast<uint32_t>((end >> 32) - (begin >> 32));
    if (!certain) sampled += count;
    if constexpr (kMeasured) {
      if (!certain && p > 0) foreseen.variance += static_cast<float>(size) * __fdividef(w2, p) * (1 - p);
      foreseen.clusters += !certain && size > 0;
    }
    const uint32_t counted = warp_inclusive_sum(count);
    if (inside) {
      tables.probabilities[c] = fixed;
      tables.begins[c] = begin;
      tables.counts[c] = taken + counted - count;
      if (count > 0) prefetch(members + segment.first_row + (place >> 16));
    }
    sum += shuffle(after, 31);
    taken += shuffle(counted, 31);
  }
  const float part = static_cast<float>(static_cast<uint32_t>(sum - offset)) * 0x1p-32f;
  if (lane == 0) foreseen.count_variance += part * (1 - part);
  return static_cast<int32_t>(taken);
}

/// One warp: segment_counts from rows of each segment to running sums; returns the total.
__device__ __forceinline__ int32_t count_taken(const SelectTables& tables, int32_t segments) {
  const int lane = threadIdx.x & 31;
  int32_t before = 0;
  for (int first = 0; first < segments; first += 32) {
    const int32_t taken = first + lane < segments ? tables.segment_counts[first + lane] : 0;
    const int32_t sum = warp_inclusive_sum(taken);
    if (first + lane < segments) tables.segment_counts[first + lane] = before + sum - taken;
    before += shuffle(sum, 31);
  }
  return before;
}

/// Number `take` of the rows taken of a cluster: which member. The smallest j with begin + (j + 1) p >= the whole
/// number.
__device__ __forceinline__ uint32_t taken_member(uint64_t begin, uint32_t probability, uint32_t take) {
  if (probability == kCertain) return take;
  const uint64_t distance = (static_cast<uint64_t>(take + 1) << 32) - (begin & 0xFFFFFFFFu) - 1;
  auto member =
      static_cast<uint32_t>(__fdividef(static_cast<float>(distance), static_cast<float>(probability)));  // within one
  const auto rest = static_cast<int64_t>(distance - static_cast<uint64_t>(member) * probability);
  if (rest < 0) --member;
  if (rest >= static_cast<int64_t>(probability)) ++member;
  return member;
}

__device__ __forceinline__ bool is_taken(uint64_t begin, uint32_t probability, uint32_t member) {
  const uint64_t before = begin + static_cast<uint64_t>(member) * probability;
  return ((before + probability) >> 32) != (before >> 32);
}

/// -log2 of a probability; 0 for certain.
__device__ __forceinline__ float log2_inverse(uint32_t probability) {
  return probability == kCertain ? 0.0f : 32.0f - log2_fast(static_cast<float>(probability));
}

/// Largest i with values[i] <= x, i in [0, n); values ascend from values[0] <= x.
template <class T>
__device__ __forceinline__ int32_t last_not_above(const T* values, int32_t n, T x) {
  int32_t low = 0, high = n;
  while (high - low > 1) {
    const int32_t middle = (low + high) >> 1;
    (values[middle] <= x ? low : high) = middle;
  }
  return low;
}

/// A warp: each(cluster) for those whose bits are set, in all lanes at once.
template <class Each>
__device__ __forceinline__ void for_marked(const uint32_t* bits_of, int32_t words, Each each) {
  const int lane = threadIdx.x & 31;
  for (int32_t first = 0; first < words; first += 32) {
    const uint32_t word = first + lane < words ? bits_of[first + lane] : 0;
    for (uint32_t lanes = __ballot_sync(kAllLanes, word != 0); lanes != 0; lanes &= lanes - 1) {
      const int from = __ffs(lanes) - 1;
      for (uint32_t bits = shuffle(word, from); bits != 0; bits &= bits - 1)
        each((first + from) * 32 + __ffs(bits) - 1);
    }
  }
}

struct TakenRow {
  int32_t local_cluster, row;
  float log_weight;
};

/// Row number i of those the block takes.
__device__ __forceinline__ TakenRow taken_row(const SelectTables& tables, const OwnSegments& own,
                                              const uint16_t* members, int32_t i) {
  const int32_t k = last_not_above(tables.segment_counts, own.count(), i);
  const OwnSegment segment = own.at(k);
  const auto rest = static_cast<uint32_t>(i - tables.segment_counts[k]);
  const int32_t c =
      segment.local_cluster + last_not_above(tables.counts + segment.local_cluster, segment.num_clusters, rest);
  const uint32_t member = taken_member(tables.begins[c], tables.probabilities[c], rest - tables.counts[c]);
  TakenRow row;
  row.local_cluster = c;
  row.row = segment.first_row + __ldg(members + segment.first_row + (tables.places[c] >> 16) + member);
  row.log_weight = log2_inverse(tables.probabilities[c]);
  return row;
}

}  // namespace tactic::cuda
