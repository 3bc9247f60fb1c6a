// attend: softmax over listed rows with their log weights.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "reference/steps.h"

namespace tactic::reference {

namespace {

template <class T>
T load(const std::byte* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

double half(const std::byte* p) {
  const auto bits = load<uint16_t>(p);
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double size = exponent == 31  ? (fraction == 0 ? HUGE_VAL : std::nan(""))
                      : exponent == 0 ? std::ldexp(fraction, -24)
                                      : std::ldexp(1024 + fraction, exponent - 25);
  return (bits >> 15) != 0 ? -size : size;
}

}  // namespace

double element(DType dtype, const std::byte* row, int64_t i) {
  switch (dtype) {
    case DType::kF32: return load<float>(row + 4 * i);
    case DType::kF16: return half(row + 2 * i);
    case DType::kBF16: {
      const uint32_t bits = uint32_t{load<uint16_t>(row + 2 * i)} << 16;
      return load<float>(reinterpret_cast<const std::byte*>(&bits));
    }
    case DType::kQ8_0: return half(row + i / 32 * 34) * load<int8_t>(row + i / 32 * 34 + 2 + i % 32);
    case DType::kQ4_0: {
      const std::byte* block = row + i / 32 * 18;
      const auto pair = load<uint8_t>(block + 2 + i % 16);
      return half(block) * ((i % 32 < 16 ? pair & 15 : pair >> 4) - 8);
    }
    case DType::kF8E4M3: break;  // no view has it
  }
  return 0;
}

double dot_row(const RowsView& rows, int32_t head, int64_t row, const float* q, int32_t head_dim) {
  double dot = 0;
  for (int32_t d = 0; d < head_dim; ++d) dot += q[d] * element(rows.dtype, rows.row(head, row), d);
  return dot;
}

void attend(const KvView& kv, int32_t head, const HeadSelection& selection, const float* q, int32_t group_size,
            double* out, double* lse) {
  const size_t n = selection.tokens.size();
  for (int32_t g = 0; g < group_size; ++g, out += kv.v_head_dim) {
    std::vector<double> scores(n);
    double max = -HUGE_VAL, sum = 0;
    for (size_t i = 0; i < n; ++i) {
      scores[i] = dot_row(kv.k, head, selection.tokens[i], q + g * kv.head_dim, kv.head_dim) + selection.log_weights[i];
      max = std::max(max, scores[i]);
    }
    std::fill_n(out, kv.v_head_dim, 0.0);
    for (size_t i = 0; i < n; ++i) {
      const double weight = std::exp(scores[i] - max);
      sum += weight;
      for (int32_t d = 0; d < kv.v_head_dim; ++d)
        out[d] += weight * element(kv.v.dtype, kv.v.row(head, selection.tokens[i]), d);
    }
    for (int32_t d = 0; d < kv.v_head_dim && n > 0; ++d) out[d] /= sum;
    lse[g] = n > 0 ? max + std::log(sum) : -HUGE_VAL;
  }
}

void dense(const DecodeQuery& query, int32_t head, double* out, double* lse) {
  const KvView& kv = query.kv;
  const RowFilter filter{query.visible, kv.kv_len, nullptr};
  const int32_t group_size = query.num_q_heads / kv.num_kv_heads;
  std::vector<float> q(kv.head_dim);
  HeadSelection all;
  for (int64_t row = 0; row < kv.kv_len; ++row) {
    if (!filter.is_visible(row) || (query.bias != nullptr && query.bias[row] == -HUGE_VALF)) continue;
    all.tokens.push_back(static_cast<int32_t>(row));
    all.log_weights.push_back(query.bias != nullptr ? query.bias[row] : 0);
  }
  for (int32_t g = 0; g < group_size; ++g) {
    for (int32_t d = 0; d < kv.head_dim; ++d)
      q[d] = query.sm_scale * query.q[(head * group_size + g) * query.q_head_stride + d];
    attend(kv, head, all, q.data(), 1, out + g * kv.v_head_dim, lse + g);
  }
}

}  // namespace tactic::reference
