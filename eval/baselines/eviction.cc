// Eviction at the end of the prompt from the attention of the last `window` prompt queries. What is kept serves all
// later steps, nothing else is read. Rows after the prompt stay. snapkv (arXiv 2404.14469, section 4): weights of the
// window's queries over the rows before, mean over queries and group,
//   mean over `kernel` neighbors; per KV head the best `budget` rows.
// pyramidkv (arXiv 2406.02069, section 4.2): the budgets fall from layer to layer in equal steps, from 2 budget -
// budget / beta
//   to budget / beta, with the same sum; should the first exceed the rows there are, the last takes the difference.
// adasnapkv (Ada-KV, arXiv 2407.11550, section 3.4, algorithm 2): the layer's budget goes to the best rows of all its
// KV heads
//   together; a head keeps (1 - floor) times as many as it has among these plus floor * budget.
#include <algorithm>
#include <cmath>

#include "baselines/common.h"
#include "tactic/error.h"

namespace tactic::eval {

namespace {

// [open.size()] of one KV head.
std::vector<float> observed_weights(const BaselineSpec& spec, const Layer& layer, int32_t kv_head, Range open) {
  const int32_t dim = layer.rows->head_dim(), group = layer.group_size();
  const int64_t window = spec.count("window"),
                available = static_cast<int64_t>(layer.prompt_q.size()) / (layer.num_q_heads * dim);
  if (available < window)
    throw Error(spec.name + ": the last " + std::to_string(window) + " prompt queries are needed, there are " +
                std::to_string(available));
  std::vector<double> sums(static_cast<size_t>(open.size()));
  std::vector<double> weights;
  std::vector<float> q(static_cast<size_t>(dim));
  for (int64_t w = 0; w < window; ++w) {
    const int64_t kv_len = layer.prompt_len - window + w + 1;
    for (int32_t g = 0; g < group; ++g) {
      const float* stored =
          layer.prompt_q.data() + ((available - window + w) * layer.num_q_heads + kv_head * group + g) * dim;
      for (int32_t d = 0; d < dim; ++d) q[static_cast<size_t>(d)] = layer.sm_scale * stored[d];
      weights.clear();
      for (int64_t row = 0; row < kv_len; ++row) weights.push_back(dot(q.data(), layer.rows->k(kv_head, row), dim));
      const double max = *std::max_element(weights.begin(), weights.end());
      double total = 0;
      for (double& weight : weights) total += weight = std::exp(weight - max);
      for (int64_t row = open.begin; row < std::min(open.end, kv_len); ++row) {
        sums[static_cast<size_t>(row - open.begin)] +=
            weights[static_cast<size_t>(row)] / total / static_cast<double>(window * group);
      }
    }
  }
  const int64_t half = spec.count("kernel") / 2, n = open.size();
  std::vector<float> pooled;
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t j = std::max<int64_t>(0, i - half); j <= std::min(n - 1, i + half); ++j)
      sum += sums[static_cast<size_t>(j)];
    pooled.push_back(static_cast<float>(sum / static_cast<double>(2 * half + 1)));
  }
  return pooled;
}

int64_t pyramid_budget(const BaselineSpec& spec, const Layer& layer, int64_t rows) {
  const int64_t budget = spec.count("budget");
  if (layer.num_layers < 2) return budget;
  double last = static_cast<double>(budget) / spec.at("beta"), first = 2 * static_cast<double>(budget) - last;
  if (first > static_cast<double>(rows)) {
    first = static_cast<double>(rows);
    last = 2 * static_cast<double>(budget) - first;
  }
  return std::lround(first - (first - last) / (layer.num_layers - 1) * layer.layer);
}

class Eviction : public Baseline {
 public:
  Eviction(const BaselineSpec& spec, const Layer& layer) : open_(prompt_rows(spec, layer)) {
    const auto heads = static_cast<size_t>(layer.kv.num_kv_heads);
    std::vector<std::vector<float>> weights;
    for (size_t head = 0; head < heads; ++head)
      weights.push_back(observed_weights(spec, layer, static_cast<int32_t>(head), open_));
    std::vector<int64_t> budgets(heads, spec.count("budget"));
    if (spec.name == "pyramidkv") budgets.assign(heads, pyramid_budget(spec, layer, open_.size()));
    if (spec.name == "adasnapkv") {
      std::vector<float> all;
      for (const std::vector<float>& head : weights) all.insert(all.end(), head.begin(), head.end());
      std::vector<double> counts(heads);
      for (const int32_t i : largest(all, spec.count("budget") * static_cast<int64_t>(heads)))
        counts[static_cast<size_t>(i / open_.size())] += 1;
      for (size_t head = 0; head < heads; ++head)
        budgets[head] = std::lround((1 - spec.at("floor")) * counts[head] + spec.at("floor") * spec.at("budget"));
    }
    for (size_t head = 0; head < heads; ++head) kept_.push_back(largest(weights[head], budgets[head]));
  }

  void select(const Step& step, Choice& out) override {
    Marks marks(step, open_);
    for (size_t head = 0; head < kept_.size(); ++head) {
      for (const int32_t i : kept_[head]) marks.set(static_cast<int32_t>(head), open_.begin + i);
    }
    marks.write(out);
  }

 private:
  Range open_;
  std::vector<std::vector<int32_t>> kept_;  // [num_kv_heads] relative to open_.begin
};

}  // namespace

std::unique_ptr<Baseline> make_eviction(const BaselineSpec& spec, const Layer& layer) {
  return std::make_unique<Eviction>(spec, layer);
}

}  // namespace tactic::eval
