// What a caller may get wrong about a cache, checked once for every entry.
#pragma once

#include "tactic/kv_view.h"

namespace tactic {

/// Threads that a call may ask for.
inline constexpr int32_t kMaxThreads = 1024;

/// Throws Error if the view's shape, element types, pointers or pages cannot be read, naming the value and the limit.
void check_view(const KvView& kv);

/// Strides are at least a row, and small enough for 64-bit offsets. For a view that is check_view()ed.
void check_strides(const KvView& kv);

/// 0 (OpenMP's default) to kMaxThreads.
void check_threads(int32_t num_threads);

}  // namespace tactic
