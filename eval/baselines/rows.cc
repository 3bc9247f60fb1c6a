#include "baselines/rows.h"

#include <cstring>

#include "reference/steps.h"

namespace tactic::eval {

namespace {

const std::vector<float>& halves() {
  static const std::vector<float> table = [] {
    std::vector<float> values;
    for (uint32_t bits = 0; bits < 65536; ++bits) {
      const auto half = static_cast<uint16_t>(bits);
      values.push_back(
          static_cast<float>(reference::element(DType::kF16, reinterpret_cast<const std::byte*>(&half), 0)));
    }
    return values;
  }();
  return table;
}

void decode(DType dtype, const std::byte* row, int32_t dim, std::vector<float>& out) {
  for (int32_t d = 0; d < dim; ++d) {
    if (dtype == DType::kF16) {
      uint16_t bits;
      std::memcpy(&bits, row + 2 * d, sizeof bits);
      out.push_back(halves()[bits]);
    } else {
      out.push_back(static_cast<float>(reference::element(dtype, row, d)));
    }
  }
}

}  // namespace

// Two loops take nearly all the time of an evaluation: the compiler makes an AVX2 version of each, chosen at load time.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TACTIC_EVAL_CLONES __attribute__((target_clones("arch=haswell", "default")))
#else
#define TACTIC_EVAL_CLONES
#endif

TACTIC_EVAL_CLONES float dot(const float* a, const float* b, int32_t n) {
  float sums[16] = {};  // as many as a vector register or two holds: the compiler may not reorder a single sum
  int32_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int32_t j = 0; j < 16; ++j) sums[j] += a[i + j] * b[i + j];
  }
  for (; i < n; ++i) sums[0] += a[i] * b[i];
  float sum = 0;
  for (const float part : sums) sum += part;
  return sum;
}

TACTIC_EVAL_CLONES void add_scaled(float weight, const float* x, float* sum, int32_t n) {
  for (int32_t i = 0; i < n; ++i) sum[i] += weight * x[i];
}

void Rows::extend(const KvView& kv) {
  k_.resize(static_cast<size_t>(kv.num_kv_heads));
  v_.resize(static_cast<size_t>(kv.num_kv_heads));
  head_dim_ = kv.head_dim;
  v_head_dim_ = kv.v_head_dim;
  k_bytes_ = static_cast<int64_t>(row_bytes(kv.k.dtype, kv.head_dim));
  v_bytes_ = static_cast<int64_t>(row_bytes(kv.v.dtype, kv.v_head_dim));
  for (int32_t head = 0; head < kv.num_kv_heads; ++head) {
    for (int64_t row = size_; row < kv.kv_len; ++row) {
      decode(kv.k.dtype, kv.k.row(head, row), head_dim_, k_[static_cast<size_t>(head)]);
      decode(kv.v.dtype, kv.v.row(head, row), v_head_dim_, v_[static_cast<size_t>(head)]);
    }
  }
  size_ = kv.kv_len > size_ ? kv.kv_len : size_;
}

}  // namespace tactic::eval
