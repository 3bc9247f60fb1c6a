// Hashed randomness: the same seed gives the same index and the same draws on every backend.
#pragma once

#include <cstdint>

#include "tactic/attention.h"

namespace tactic {

/// splitmix64.
inline uint64_t hash64(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

/// In [0, 1), from the upper 53 bits of the hash.
inline double uniform(uint64_t x) { return static_cast<double>(hash64(x) >> 11) * 0x1p-53; }

/// The random part of the offsets of systematic sampling for one query and KV head.
inline double random_offset(const DecodeQuery& query, int32_t head, uint64_t seed) {
  uint64_t x = seed;
  for (const uint64_t part : {query.stream_id, static_cast<uint64_t>(query.layer), static_cast<uint64_t>(head),
                              static_cast<uint64_t>(query.position)}) {
    x = x * 0xD6E8FEB86659FD93u + part + 1;
  }
  return uniform(x);
}

/// Where the running sum of a segment begins: each segment is sampled on its own, so that segments can be drawn from at
/// the same time. Uniform in [0, 1) when `offset` is.
inline double segment_offset(double offset, int64_t row_begin) {
  const double sum = offset + uniform(static_cast<uint64_t>(row_begin));
  return sum < 1 ? sum : sum - 1;
}

}  // namespace tactic
