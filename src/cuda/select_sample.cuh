// select_sample: inclusion probabilities of a block's clusters, and which rows systematic sampling takes.
//
// Probabilities are fixed-point numbers of 32 bits, so that running sums are exact and the k-th row of a cluster is
// found by a division, alone, without walking there.
#pragma once

#include "cuda/launch_config.h"
#include "cuda/segments.h"

namespace tactic::cuda {

inline constexpr uint32_t kCertain = 0xFFFFFFFFu;

/// A block's tables, by own cluster and own segment (table_bytes() of them). In shared memory, or in the workspace
/// where they do not fit.
struct SelectTables {
  float* exponents;         // [heads, stride]
  int32_t stride;           // a few more than clusters, so that heads lie in different banks
  uint64_t* begins;         // [clusters] running sum before the cluster's first member
  uint32_t* places;         // [clusters]
  uint32_t* probabilities;  // [clusters] of a member, 2^32 = 1; kCertain: all are read
  uint32_t* counts;         // [clusters] rows taken in the segment's clusters before this one
  uint32_t* refined;        // [clusters / 32] bits
  float* mean_dots;         // [segments, heads] log2 scores of the segments' mean keys
  int32_t* segment_counts;  // [segments + 1] rows taken in the own segments before this one

  __device__ SelectTables(std::byte* memory, int32_t clusters, int32_t segments, int32_t heads) {
    exponents = reinterpret_cast<float*>(memory);
    stride = clusters + kTablePadding;
    begins = reinterpret_cast<uint64_t*>(exponents + stride * heads);
    places = reinterpret_cast<uint32_t*>(begins + clusters);
    probabilities = places + clusters;
    counts = probabilities + clusters;
    refined = counts + clusters;
    mean_dots = reinterpret_cast<float*>(refined + clusters / 32 + 1);
    segment_counts = reinterpret_cast<int32_t*>(mean_dots + segments * heads);
  }
};

/// As core's tau_of where tau is not given.
__device__ __forceinline__ float tau_for_error(float target_error, float variance_ratio) {
  return fmaxf(1.0f, sqrt_fast(variance_ratio) / (target_error * target_error));
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

/// One warp, one segment: fills begins, probabilities and counts of its clusters; returns the rows taken, and
/// adds to `sampled` those that this lane's clusters took by chance.
/// shifts[h]: log2 of the normalizer of head h over tau, and of sqrt(group size).
template <int kHeads>
__device__ __forceinline__ int32_t select_segment(const SelectTables& tables, const OwnSegment& segment,
                                                  const uint16_t* members, uint64_t offset, int group_size,
                                                  const float (&shifts)[kHeads], uint32_t& sampled) {
  constexpr int kPerLane = 4;  // neighbouring clusters, so that a segment needs one scan
  const int lane = threadIdx.x & 31;
  uint64_t sum = offset;
  uint32_t taken = 0;
  for (int32_t first = 0; first < segment.num_clusters; first += 32 * kPerLane) {
    const bool inside =
        first + lane * kPerLane < segment.num_clusters;  // all four or none: segments have multiples of 16
    const int32_t c = segment.local_cluster + (inside ? first + lane * kPerLane : 0);
    float p2[kPerLane] = {};
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h >= group_size) continue;
      const float4 x = *reinterpret_cast<const float4*>(tables.exponents + h * tables.stride + c);
      p2[0] += exp2_fast(2 * (x.x - shifts[h]));
      p2[1] += exp2_fast(2 * (x.y - shifts[h]));
      p2[2] += exp2_fast(2 * (x.z - shifts[h]));
      p2[3] += exp2_fast(2 * (x.w - shifts[h]));
    }
    const uint4 places = *reinterpret_cast<const uint4*>(tables.places + c);
    uint32_t fixed[kPerLane],
        sizes[kPerLane] = {places.x & 0xFFFFu, places.y & 0xFFFFu, places.z & 0xFFFFu, places.w & 0xFFFFu};
    uint64_t width = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float p = sqrt_fast(p2[i]);
      fixed[i] = p < 1 ? static_cast<uint32_t>(p * 4294967296.0f) : kCertain;
      if (!inside) sizes[i] = 0;
      if (fixed[i] != kCertain) width += static_cast<uint64_t>(fixed[i]) * sizes[i];
    }
    const uint64_t after = warp_inclusive_sum(width);
    uint64_t begin = sum + after - width;
    uint32_t counts[kPerLane], count = 0;
    uint64_t begins[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      begins[i] = begin;
      const uint64_t next = fixed[i] == kCertain ? begin : begin + static_cast<uint64_t>(fixed[i]) * sizes[i];
      counts[i] = fixed[i] == kCertain ? sizes[i] : static_cast<uint32_t>((next >> 32) - (begin >> 32));
      count += counts[i];
      if (fixed[i] != kCertain) sampled += counts[i];
      begin = next;
    }
    const uint32_t counted = warp_inclusive_sum(count);
    const uint32_t before = taken + counted - count;
    if (inside) {
      *reinterpret_cast<uint4*>(tables.probabilities + c) = {fixed[0], fixed[1], fixed[2], fixed[3]};
      *reinterpret_cast<ulonglong2*>(tables.begins + c) = {begins[0], begins[1]};
      *reinterpret_cast<ulonglong2*>(tables.begins + c + 2) = {begins[2], begins[3]};
      *reinterpret_cast<uint4*>(tables.counts + c) = {before, before + counts[0], before + counts[0] + counts[1],
                                                      before + count - counts[3]};
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (counts[i] > 0) prefetch(members + segment.first_row + ((&places.x)[i] >> 16));
      }
    }
    sum += shuffle(after, 31);
    taken += shuffle(counted, 31);
  }
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
