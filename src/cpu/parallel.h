// Sharing of loops among OpenMP threads; inside a parallel region, or with one thread, the caller does all.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

namespace tactic::cpu {

inline int32_t thread_count(int32_t num_threads) { return num_threads > 0 ? num_threads : omp_get_max_threads(); }

/// Part `part` of `parts` of [0, total), cut at multiples of `grain`.
struct Range {
  int64_t begin, end;
};
inline Range share_of(int64_t total, int64_t grain, int32_t part, int32_t parts) {
  const int64_t pieces = (total + grain - 1) / grain;
  const auto cut = [&](int64_t k) { return std::min(total, pieces * k / parts * grain); };
  return {cut(part), cut(part + 1)};
}

/// What a thread of a team throws (memory that ran out, most likely) reaches the caller. A thread that failed goes on
/// to the team's barriers, and behind the next one no thread does anything more.
class TeamError {
 public:
  template <class Fn>
  void guard(Fn fn) {
    if (failed_) return;
    try {
      fn();
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
  }
  /// For the caller, when the team has ended.
  void rethrow() {
    if (error_ != nullptr) std::rethrow_exception(error_);
  }

 private:
  std::atomic<bool> failed_ = false;
  std::exception_ptr error_;
};

/// fn(begin, end) on every thread for its share of [0, total).
template <class Fn>
void parallel_ranges(int32_t num_threads, int64_t total, int64_t grain, const Fn& fn) {
  const int32_t threads =
      thread_count(num_threads);  // always all of them: libgomp ends threads that a smaller team leaves out
  if (threads <= 1 || total <= grain || omp_in_parallel()) {
    if (total > 0) fn(int64_t{0}, total);
    return;
  }
  TeamError error;
#pragma omp parallel num_threads(threads)
  {
    const Range range = share_of(total, grain, omp_get_thread_num(), omp_get_num_threads());
    if (range.begin < range.end) error.guard([&] { fn(range.begin, range.end); });
  }
  error.rethrow();
}

}  // namespace tactic::cpu
