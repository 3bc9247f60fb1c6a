// The exact answers of one layer of a trace, against which every selection is measured.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "trace.h"

namespace tactic::eval {

/// Exact attention of one query: every weight, and the output.
struct DenseQuery {
  int64_t query = 0;           // number in the trace
  RowRange rows;               // that it sees
  std::vector<float> weights;  // [num_q_heads, rows.end - rows.begin]; each head's sum to 1
  std::vector<float> out;      // [num_q_heads, v_head_dim]
  std::vector<double> lse;     // [num_q_heads]

  std::span<const float> head_weights(int32_t head) const {
    const auto n = static_cast<size_t>(rows.end - rows.begin);
    return std::span<const float>(weights).subspan(static_cast<size_t>(head) * n, n);
  }
};

/// Rows of one KV head as f32, [kv_len, dim].
std::vector<float> rows_as_f32(const RowsView& rows, int32_t head, int64_t kv_len, int32_t dim);

/// Answers the given queries (numbers in the trace). Products are summed in f32 over blocks of rows, blocks in double.
/// Memory: 4 bytes per query, query head and row.
std::vector<DenseQuery> dense_layer(const TraceLayer& layer, std::span<const int64_t> queries);

}  // namespace tactic::eval
