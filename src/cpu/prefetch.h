// How memory that no hardware prefetcher foresees is asked for ahead of its use. The functions must be inlined: a call
// of one that only prefetches is dropped as having no effect.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tactic::cpu {

/// Rows are asked for in blocks of so many, one block ahead, and to L1 or L2. When they were asked for one by one, 8 to
/// 16 ahead measured alike to L1 and 24 to 48 to L2; 24 to L1 were slower.
struct FetchToL1 {
  static constexpr int64_t kRowsAhead = 16;
  [[gnu::always_inline]] static void line(const void* p) { __builtin_prefetch(p, 0, 3); }
};
struct FetchToL2 {
  static constexpr int64_t kRowsAhead = 32;
  [[gnu::always_inline]] static void line(const void* p) { __builtin_prefetch(p, 0, 2); }
};

/// Cores of AMD have more misses on their way where lines are to go to L2 only: rows of 128 bytes at random places come
/// to a core of a Zen 4 at 9 to 11 instead of 6.5 GB/s (bench/micro/attend_bench). Not measured elsewhere.
inline bool fetches_to_l2() {
#if defined(__x86_64__)
  static const bool amd = (__builtin_cpu_init(), __builtin_cpu_is("amd") != 0);
  return amd;
#else
  return false;
#endif
}

/// All lines of something that will be read in a few microseconds.
[[gnu::always_inline]] inline void fetch_to_l2(const void* begin, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) FetchToL2::line(static_cast<const std::byte*>(begin) + i);
}

}  // namespace tactic::cpu
