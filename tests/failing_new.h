// An operator new that runs out on demand. It replaces the program's own, so one source of a program includes this.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace tactic::test {

inline std::atomic<int64_t> allocations_left = INT64_MAX;  // the one after them fails
inline std::atomic<int64_t> allocations_failed = 0;

}  // namespace tactic::test

// Not inlined: the compiler would take malloc for the counterpart of delete.
// NOLINTBEGIN(misc-definitions-in-headers): may not be inline
[[gnu::noinline]] void* operator new(size_t bytes) {
  if (tactic::test::allocations_left.fetch_sub(1) == 0) {
    ++tactic::test::allocations_failed;
    throw std::bad_alloc();
  }
  void* const memory = std::malloc(bytes > 0 ? bytes : 1);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }
// NOLINTEND(misc-definitions-in-headers)
