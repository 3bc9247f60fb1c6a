#include "dense_layer.h"

#include <algorithm>
#include <cmath>

#include "reference/steps.h"

namespace tactic::eval {

namespace {

// A dot product that compilers make vector code of: sixteen sums side by side.
float dot(const float* a, const float* b, int32_t dim) {  // dim: a multiple of 16
  float sums[16] = {};
  for (int32_t d = 0; d < dim; d += 16) {
    for (int32_t i = 0; i < 16; ++i) sums[i] += a[d + i] * b[d + i];
  }
  float sum = 0;
  for (const float s : sums) sum += s;
  return sum;
}

constexpr int64_t kBlock = 64;  // rows summed in f32

}  // namespace

std::vector<float> rows_as_f32(const RowsView& rows, int32_t head, int64_t kv_len, int32_t dim) {
  std::vector<float> out(static_cast<size_t>(kv_len) * static_cast<size_t>(dim));
  float* to = out.data();
  for (int64_t row = 0; row < kv_len; ++row) {
    const std::byte* from = rows.row(head, row);
    for (int32_t d = 0; d < dim; ++d) *to++ = static_cast<float>(reference::element(rows.dtype, from, d));
  }
  return out;
}

std::vector<DenseQuery> dense_layer(const TraceLayer& layer, std::span<const int64_t> queries) {
  const TraceLayerInfo& info = *layer.info;
  const int32_t dim = info.head_dim, v_dim = info.v_head_dim, group = layer.group_size();
  std::vector<DenseQuery> answers(queries.size());
  for (size_t i = 0; i < queries.size(); ++i) {
    DenseQuery& a = answers[i];
    a.query = queries[i];
    a.rows = layer.visible(a.query);
    a.weights.resize(static_cast<size_t>(info.num_q_heads) * static_cast<size_t>(a.rows.end - a.rows.begin));
    a.out.resize(static_cast<size_t>(info.num_q_heads) * static_cast<size_t>(v_dim));
    a.lse.resize(static_cast<size_t>(info.num_q_heads));
  }
  for (int32_t head = 0; head < info.num_kv_heads; ++head) {
    const std::vector<float> k = rows_as_f32(layer.kv.k, head, layer.kv.kv_len, dim),
                             v = rows_as_f32(layer.kv.v, head, layer.kv.kv_len, v_dim);
    for (DenseQuery& a : answers) {
      for (int32_t h = head * group; h < (head + 1) * group; ++h) {
        const auto n = static_cast<size_t>(a.rows.end - a.rows.begin);
        float* weights = a.weights.data() + static_cast<size_t>(h) * n;
        std::vector<float> q(layer.query(a.query) + h * dim, layer.query(a.query) + (h + 1) * dim);
        for (float& x : q) x *= info.sm_scale;
        for (size_t i = 0; i < n; ++i)
          weights[i] =
              dot(q.data(), k.data() + (static_cast<size_t>(a.rows.begin) + i) * static_cast<size_t>(dim), dim);
        const float max = *std::max_element(weights, weights + n);
        double sum = 0;
        for (size_t i = 0; i < n; ++i) sum += weights[i] = std::exp(weights[i] - max);
        const auto scale = static_cast<float>(1 / sum);
        a.lse[static_cast<size_t>(h)] = max + std::log(sum);
        std::vector<double> out(static_cast<size_t>(v_dim));
        std::vector<float> part(static_cast<size_t>(v_dim));
        for (int64_t begin = 0; begin < static_cast<int64_t>(n); begin += kBlock) {
          std::fill(part.begin(), part.end(), 0.0f);
          for (int64_t i = begin; i < std::min<int64_t>(static_cast<int64_t>(n), begin + kBlock); ++i) {
            weights[i] *= scale;
            const float* row = v.data() + static_cast<size_t>(a.rows.begin + i) * static_cast<size_t>(v_dim);
            for (int32_t d = 0; d < v_dim; ++d) part[static_cast<size_t>(d)] += weights[i] * row[d];
          }
          for (size_t d = 0; d < out.size(); ++d) out[d] += part[d];
        }
        for (size_t d = 0; d < out.size(); ++d) a.out[static_cast<size_t>(h * v_dim) + d] = static_cast<float>(out[d]);
      }
    }
  }
  return answers;
}

}  // namespace tactic::eval
