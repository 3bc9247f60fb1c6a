#include "paper/cases.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "tactic/error.h"

namespace tactic::eval {

double nearest_rank(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(std::lround(q * static_cast<double>(values.size() - 1)))];
}

Range case_rows(int64_t prompt_len) {
  return {std::min<int64_t>(4, prompt_len), std::max<int64_t>(prompt_len - 64, std::min<int64_t>(4, prompt_len))};
}

std::vector<int64_t> decode_queries(const TraceInfo& info, const PaperOptions& options) {
  std::vector<int64_t> all, some;
  for (int64_t i = 0; i < info.num_queries(); ++i) {
    const bool near = info.positions[static_cast<size_t>(i)] <= info.prompt_len + options.within;
    if (info.kinds[static_cast<size_t>(i)] == QueryKind::kDecode && near) all.push_back(i);
  }
  if (all.empty())
    throw Error("no decode query lies within " + std::to_string(options.within) + " rows after the prompt of " +
                std::to_string(info.prompt_len));
  const int64_t n = std::ssize(all), take = std::min(n, options.queries);
  for (int64_t i = 0; i < take; ++i) some.push_back(all[static_cast<size_t>(i * n / take)]);
  return some;
}

std::vector<int32_t> full_layers(const Trace& trace) {
  std::vector<int32_t> layers;
  for (int32_t i = 0; i < trace.num_layers(); ++i) {
    if (trace.info().layers[static_cast<size_t>(i)].window == 0) layers.push_back(i);
  }
  if (layers.empty())
    throw Error(trace.path() + ": none of its " + std::to_string(trace.num_layers()) +
                " layers is without a sliding window, as a case for selection must be");
  return layers;
}

Layer layer_of(const TraceLayer& traced, const Rows& rows, uint64_t seed) {
  return {.rows = &rows,
          .kv = traced.kv,
          .prompt_len = traced.trace->prompt_len,
          .num_q_heads = traced.info->num_q_heads,
          .sm_scale = traced.info->sm_scale,
          .prompt_q = {},
          .layer = 0,
          .num_layers = 1,
          .seed = seed};
}

CaseWeights case_weights(const Step& step, int32_t h, const Clusters& clusters) {
  CaseWeights w;
  const float* scores = step.scores(h);
  const double max = *std::max_element(scores, scores + step.kv_len());
  double total = 0;
  for (int64_t row = 0; row < step.kv_len(); ++row) total += w.by_row.emplace_back(std::exp(scores[row] - max));
  for (double& weight : w.by_row) weight /= total;
  w.certain = 1;
  for (const std::vector<int32_t>& members : clusters.members) {
    for (const int32_t row : members) {
      w.by_rank.push_back(w.by_row[static_cast<size_t>(row)]);
      w.certain -= w.by_rank.back();
    }
  }
  w.certain = std::max(0.0, w.certain);
  std::sort(w.by_rank.begin(), w.by_rank.end(), std::greater<>());
  for (const int32_t c : largest(clusters.dots(step.q(h)), clusters.size())) {
    for (const int32_t row : clusters.members[static_cast<size_t>(c)]) w.cluster_order.push_back(row);
  }
  for (const int32_t row : w.cluster_order) w.by_cluster.push_back(w.by_row[static_cast<size_t>(row)]);
  return w;
}

int64_t tokens_for(const std::vector<double>& weights, double certain, double mass) {
  double sum = certain;
  int64_t count = 0;
  while (count < std::ssize(weights) && sum < mass) sum += weights[static_cast<size_t>(count++)];
  return count;
}

}  // namespace tactic::eval
