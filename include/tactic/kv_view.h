// How a KV cache lies in memory. Views never own; the caller keeps the memory alive during each call.
//
//   tactic::KvView kv;
//   kv.num_kv_heads = 8;  kv.head_dim = kv.v_head_dim = 128;  kv.kv_len = 32768;
//   kv.k = {k_data, tactic::DType::kF16, /*token_stride_bytes=*/8 * 256, /*head_stride_bytes=*/256};
#pragma once

#include <cstddef>
#include <cstdint>

namespace tactic {

/// Element type of stored rows. q8_0 and q4_0 are ggml's: blocks of 32 elements with one f16 scale. f8_e4m3 (sign, four
/// bits of exponent, three of fraction, no infinity) is read on CUDA only.
enum class DType : uint8_t { kF32, kF16, kBF16, kQ8_0, kQ4_0, kF8E4M3 };

/// Bytes of one row of `elements` elements. Throws Error when they are not in 0..2^31-1 or, of a quantized type, no
/// multiple of 32.
size_t row_bytes(DType dtype, int64_t elements);

/// "f32", "f16", "bf16", "q8_0", "q4_0", "f8_e4m3".
const char* dtype_name(DType dtype);

/// Rows [num_kv_heads, kv_len, head_dim] at any strides of a row or more at which no two heads share bytes, optionally
/// through pages of tokens.
struct RowsView {
  const void* data = nullptr;
  DType dtype = DType::kF16;
  int64_t token_stride_bytes = 0;
  int64_t head_stride_bytes = 0;
  const int32_t* page_table = nullptr;  // [ceil(kv_len / page_tokens)] page numbers; nullptr: tokens lie in order
  int32_t page_tokens = 0;              // tokens per page
  int64_t page_stride_bytes = 0;        // from one page to the next; a row at least, unless one page holds all
  int32_t num_pages = 0;                // pages that exist, so that the table's numbers can be checked; 0: not checked

  const std::byte* row(int64_t head, int64_t token) const {
    int64_t offset = head * head_stride_bytes;
    if (page_table == nullptr) {
      offset += token * token_stride_bytes;
    } else {
      offset += page_table[token / page_tokens] * page_stride_bytes + (token % page_tokens) * token_stride_bytes;
    }
    return static_cast<const std::byte*>(data) + offset;
  }
};

/// The K and V rows of one layer and one sequence (or of one pool of rows that several sequences share). The CPU takes
/// up to 65536 KV heads and dimensions that are multiples of 16 (of 32 for q8_0 and q4_0) up to 1024; the limits of
/// CUDA are in cuda.h.
struct KvView {
  RowsView k, v;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;    // of K and Q
  int32_t v_head_dim = 0;  // of V and the output
  int64_t kv_len = 0;      // rows that may be read, less than 2^31
};

}  // namespace tactic
