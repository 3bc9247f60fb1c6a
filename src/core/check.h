// What a caller may get wrong about a cache, checked once for every entry.
#pragma once

#include <string>

#include "tactic/kv_view.h"

namespace tactic {

/// Threads that a call may ask for, heads that a layer may have.
inline constexpr int32_t kMaxThreads = 1024, kMaxHeads = 65536;

/// Throws Error if the view's shape, element types, pointers or pages cannot be read, naming the value and the limit.
void check_view(const KvView& kv);

/// As many bytes as 2^31 rows or pages, or the heads, may lie apart before an offset leaves 64 bits.
inline constexpr int64_t kMaxTokenStride = int64_t{1} << 31, kMaxHeadStride = int64_t{1} << 46;

/// Throws Error unless a row of so many bytes fits into the stride `which` of the rows `name`, and that is no more than
/// `limit`.
void check_stride(const std::string& name, const char* which, int64_t stride, size_t row, int64_t limit);

/// Throws Error unless either the heads of a token lie within its stride, or the `tokens` of a head within the head's.
void check_overlap(const std::string& name, int64_t num_heads, int64_t tokens, int64_t head_stride,
                   int64_t token_stride, size_t row);

/// Strides are at least a row, small enough for 64-bit offsets, and keep the rows of heads apart. For a view that is
/// check_view()ed.
void check_strides(const KvView& kv);

/// Both, where V alone is read.
void check_values(const KvView& kv);

/// Rows [row_begin, row_begin + count) lie in 0..2^31-1.
void check_row_range(int64_t row_begin, int64_t count);

/// 0 (OpenMP's default) to kMaxThreads.
void check_threads(int32_t num_threads);

}  // namespace tactic
