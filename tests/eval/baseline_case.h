// One layer with a prompt and one step after it, for the tests of baselines.
#pragma once

#include <set>

#include "baselines/common.h"
#include "support.h"

namespace tactic::eval {

using test::Cache;

struct Case {
  Cache cache;
  int32_t group_size = 3;
  int64_t prompt_len;
  Rows rows;
  std::vector<float> q, prompt_q;
  Layer layer;
  std::unique_ptr<Step> step;

  explicit Case(int64_t prompt = 640, int64_t after = 20, float sharpness = 1.0f, uint64_t seed = 5)
      : cache({.num_kv_heads = 2, .head_dim = 64, .v_head_dim = 64, .kv_len = prompt + after, .seed = seed}),
        prompt_len(prompt) {
    rows.extend(cache.view());
    q = test::make_queries(cache, group_size, 11, sharpness);
    for (uint64_t i = 0; i < 32; ++i) {
      const std::vector<float> more = test::make_queries(cache, group_size, 100 + i, sharpness);
      prompt_q.insert(prompt_q.end(), more.begin(), more.end());
    }
    layer = {.rows = &rows,
             .kv = cache.view(),
             .prompt_len = prompt,
             .num_q_heads = num_q_heads(),
             .sm_scale = 0.125f,
             .prompt_q = prompt_q,
             .layer = 3,
             .num_layers = 12,
             .seed = 1};
    step = std::make_unique<Step>(rows, q.data(), 64, num_q_heads(), 0.125f, rows.size());
  }
  Case(const Case&) = delete;

  int32_t num_q_heads() const { return 2 * group_size; }
  int64_t kv_len() const { return rows.size(); }
  Choice select(const std::string& text) {
    Choice choice;
    make_baseline(parse_baseline(text), layer)->select(*step, choice);
    return choice;
  }

  // Plainly, from the stored keys.
  double score(int32_t h, int64_t row) const { return score_of(q.data() + h * 64, h, row); }
  double score_of(const float* query, int32_t h, int64_t row) const {
    const std::vector<float> key = cache.key(h / group_size, row);
    double sum = 0;
    for (size_t d = 0; d < 64; ++d) sum += 0.125 * static_cast<double>(query[d]) * key[d];
    return sum;
  }
  std::vector<double> weights(int32_t h) const { return weights_of(q.data() + h * 64, h, kv_len()); }
  std::vector<double> weights_of(const float* query, int32_t h, int64_t kv_len) const {
    std::vector<double> w;
    double sum = 0;
    for (int64_t row = 0; row < kv_len; ++row) sum += w.emplace_back(std::exp(score_of(query, h, row)));
    for (double& x : w) x /= sum;
    return w;
  }
};

using RowSet = std::set<int32_t>;

/// The rows that everybody reads: 4 sinks, and the last 64 of `end` and all after them.
inline RowSet exact_rows(const Case& c, int64_t end) {
  RowSet rows;
  for (int32_t row = 0; row < c.kv_len(); ++row) {
    if (row < 4 || row >= end - 64) rows.insert(row);
  }
  return rows;
}

inline RowSet read_rows(const Choice& choice, int32_t kv_head) {
  const std::vector<int32_t>& tokens = choice.selection.heads[static_cast<size_t>(kv_head)].tokens;
  RowSet rows(tokens.begin(), tokens.end());
  EXPECT_EQ(rows.size(), tokens.size()) << "a row is listed twice";
  return rows;
}

/// Indices of the `count` largest.
template <class T>
std::vector<size_t> best(const std::vector<T>& values, size_t count) {
  std::vector<size_t> order(values.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return values[a] > values[b]; });
  order.resize(std::min(count, order.size()));
  return order;
}

inline constexpr int64_t kRowBytes = 128;  // of K, and of V: 64 halves

}  // namespace tactic::eval
