#include "core/check.h"

#include <algorithm>
#include <string>

#include "tactic/error.h"

namespace tactic {

namespace {

std::string value_of(int64_t value) { return " (" + std::to_string(value) + ")"; }

void check_rows(const std::string& name, const RowsView& rows, int32_t dim, int64_t kv_len) {
  if (rows.dtype == DType::kF8E4M3) throw Error(name + " dtype f8_e4m3 is read on CUDA only");
  if (rows.dtype > DType::kQ4_0)
    throw Error(name + " dtype" + value_of(static_cast<int64_t>(rows.dtype)) + " must be in 0..4");
  const bool quantized = rows.dtype == DType::kQ8_0 || rows.dtype == DType::kQ4_0;
  const int32_t multiple = quantized ? 32 : 16;
  if (dim < multiple || dim > 1024 || dim % multiple != 0) {
    throw Error(name + " head_dim" + value_of(dim) + " must be a multiple of " + std::to_string(multiple) +
                " up to 1024 for " + dtype_name(rows.dtype));
  }
  if (kv_len > 0 && rows.data == nullptr)
    throw Error(name + " data must not be null when kv_len is " + std::to_string(kv_len));
  if (rows.page_table == nullptr) return;
  if (rows.page_tokens < 1) throw Error(name + " page_tokens" + value_of(rows.page_tokens) + " must be at least 1");
  if (rows.num_pages < 0) throw Error(name + " num_pages" + value_of(rows.num_pages) + " must be at least 0");
  if (rows.num_pages == 0) return;  // nobody knows
  const int64_t entries = (kv_len + rows.page_tokens - 1) / rows.page_tokens;
  for (int64_t i = 0; i < entries; ++i) {
    if (rows.page_table[i] >= 0 && rows.page_table[i] < rows.num_pages) continue;
    throw Error(name + " page_table[" + std::to_string(i) + "]" + value_of(rows.page_table[i]) + " must be in 0.." +
                std::to_string(rows.num_pages - 1));
  }
}

void check_shape(const KvView& kv) {
  if (kv.num_kv_heads < 1 || kv.num_kv_heads > kMaxHeads) {
    throw Error("num_kv_heads" + value_of(kv.num_kv_heads) + " must be in 1.." + std::to_string(kMaxHeads));
  }
  if (kv.kv_len < 0 || kv.kv_len > INT32_MAX) throw Error("kv_len" + value_of(kv.kv_len) + " must be in 0..2^31-1");
}

void check_strides_of(const KvView& kv, const char* name, const RowsView& rows, int32_t dim) {
  const size_t row = row_bytes(rows.dtype, dim);
  if (kv.kv_len > 0 && kv.num_kv_heads > 1)
    check_stride(name, "head_stride_bytes", rows.head_stride_bytes, row, kMaxHeadStride);
  if (kv.kv_len > 1 && (rows.page_table == nullptr || rows.page_tokens > 1))
    check_stride(name, "token_stride_bytes", rows.token_stride_bytes, row, kMaxTokenStride);
  if (rows.page_table != nullptr && kv.kv_len > rows.page_tokens)
    check_stride(name, "page_stride_bytes", rows.page_stride_bytes, row, kMaxTokenStride);
  const int64_t tokens = rows.page_table == nullptr ? kv.kv_len : std::min<int64_t>(kv.kv_len, rows.page_tokens);
  check_overlap(name, kv.num_kv_heads, tokens, rows.head_stride_bytes, rows.token_stride_bytes, row);
}

}  // namespace

void check_overlap(const std::string& name, int64_t num_heads, int64_t tokens, int64_t head_stride,
                   int64_t token_stride, size_t row) {
  if (tokens < 2 || num_heads < 2) return;
  const auto reach = [&](int64_t count, int64_t stride) { return (count - 1) * stride + static_cast<int64_t>(row); };
  const int64_t heads_reach = reach(num_heads, head_stride), tokens_reach = reach(tokens, token_stride);
  if (token_stride >= heads_reach || head_stride >= tokens_reach) return;
  throw Error(name + " token_stride_bytes" + value_of(token_stride) + " must be at least " +
              std::to_string(heads_reach) + ", or head_stride_bytes" + value_of(head_stride) + " at least " +
              std::to_string(tokens_reach) + ": rows of different heads overlap");
}

void check_stride(const std::string& name, const char* which, int64_t stride, size_t row, int64_t limit) {
  if (stride < static_cast<int64_t>(row))
    throw Error(name + " " + which + value_of(stride) + " must be at least a row's " + std::to_string(row) + " bytes");
  if (stride > limit) throw Error(name + " " + which + value_of(stride) + " must be at most " + std::to_string(limit));
}

void check_view(const KvView& kv) {
  check_shape(kv);
  check_rows("K", kv.k, kv.head_dim, kv.kv_len);
  check_rows("V", kv.v, kv.v_head_dim, kv.kv_len);
}

void check_strides(const KvView& kv) {
  check_strides_of(kv, "K", kv.k, kv.head_dim);
  check_strides_of(kv, "V", kv.v, kv.v_head_dim);
}

void check_values(const KvView& kv) {
  check_shape(kv);
  check_rows("V", kv.v, kv.v_head_dim, kv.kv_len);
  check_strides_of(kv, "V", kv.v, kv.v_head_dim);
}

void check_row_range(int64_t row_begin, int64_t count) {
  if (row_begin >= 0 && count >= 0 && row_begin <= INT32_MAX - count) return;
  throw Error("rows " + std::to_string(row_begin) + " + " + std::to_string(count) + " must lie in 0..2^31-1");
}

void check_threads(int32_t num_threads) {
  if (num_threads >= 0 && num_threads <= kMaxThreads) return;
  throw Error("num_threads" + value_of(num_threads) + " must be in 0.." + std::to_string(kMaxThreads));
}

}  // namespace tactic
