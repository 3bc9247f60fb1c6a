#include "baselines/baseline.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "baselines/common.h"
#include "tactic/error.h"

namespace tactic::eval {

namespace {

struct Option {
  const char* key;
  double value, low, high;
  bool whole = true;
};

struct Method {
  const char* name;
  std::unique_ptr<Baseline> (*make)(const BaselineSpec& spec, const Layer& layer);
  std::vector<Option> options;
};

constexpr Option kBudget = {"budget", 512, 0, 1e9};

const std::vector<Option> kCommon = {{"sinks", 4, 0, 65536}, {"recent", 64, 0, 65536}};

const std::vector<Method>& methods() {
  static const std::vector<Method> all = {
      {"oracle_topp", make_oracle, {{"mass", 0.9, 0, 1, false}}},
      {"oracle_topk", make_oracle, {kBudget}},
      {"recent_only", make_recent, {kBudget}},
      {"cluster_topk", make_clusters, {kBudget, {"cluster", 32, 1, 65536}, {"iterations", 10, 1, 100}}},
      {"position_topk", make_clusters, {kBudget, {"cluster", 32, 1, 65536}}},
      {"quest", make_quest, {kBudget, {"page", 16, 1, 4096}}},
      {"snapkv", make_eviction, {kBudget, {"window", 32, 1, 4096}, {"kernel", 5, 1, 255}}},
      {"pyramidkv",
       make_eviction,
       {kBudget, {"window", 32, 1, 4096}, {"kernel", 5, 1, 255}, {"beta", 20, 1, 1e6, false}}},
      {"adasnapkv",
       make_eviction,
       {kBudget, {"window", 32, 1, 4096}, {"kernel", 5, 1, 255}, {"floor", 0.2, 0, 1, false}}},
      {"magicpig", make_magicpig, {{"k", 10, 1, 16}, {"l", 150, 2, 4096}}},
      {"retroinfer",
       make_retroinfer,
       {kBudget,
        {"cluster", 16, 1, 65536},
        {"iterations", 10, 1, 100},
        {"segment", 8192, 1, 65536},
        {"estimate", 1, 0, 1, false}}},
      {"vattention",
       make_vattention,
       {{"epsilon", 0.1, 1e-6, 1e6, false},
        {"delta", 0.1, 1e-9, 0.999, false},
        {"base", 0.02, 0, 1, false},
        {"heavy", 128, 0, 1e9},
        {"cluster", 32, 1, 65536},
        {"iterations", 10, 1, 100}}},
  };
  return all;
}

const Method* find_method(const std::string& name) {
  for (const Method& method : methods()) {
    if (name == method.name) return &method;
  }
  return nullptr;
}

std::vector<Option> options_of(const Method& method) {
  std::vector<Option> options = method.options;
  options.insert(options.end(), kCommon.begin(), kCommon.end());
  return options;
}

std::string number(double value) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof text, value).ptr};
}

}  // namespace

bool is_baseline(const std::string& text) { return find_method(text.substr(0, text.find(','))) != nullptr; }

BaselineSpec parse_baseline(const std::string& text) {
  BaselineSpec spec;
  spec.text = text;
  spec.name = text.substr(0, text.find(','));
  const Method* method = find_method(spec.name);
  if (method == nullptr) {
    std::string names;
    for (const Method& m : methods()) names += std::string(names.empty() ? "" : ", ") + m.name;
    throw Error("baseline '" + spec.name + "' is none of " + names);
  }
  const std::vector<Option> options = options_of(*method);
  for (const Option& option : options) spec.values[option.key] = option.value;
  for (size_t begin = spec.name.size(); begin < text.size();) {
    const size_t end = std::min(text.find(',', begin + 1), text.size());
    const std::string item = text.substr(begin + 1, end - begin - 1);
    begin = end;
    const size_t equals = item.find('=');
    const std::string key = item.substr(0, equals);
    const auto option = std::find_if(options.begin(), options.end(), [&](const Option& o) { return key == o.key; });
    if (option == options.end()) {
      std::string keys;
      for (const Option& o : options) keys += std::string(keys.empty() ? "" : ", ") + o.key;
      throw Error(spec.name + ": option '" + key + "' is none of " + keys);
    }
    const std::string value = equals == std::string::npos ? "" : item.substr(equals + 1);
    double parsed = 0;
    const auto [stop, failure] = std::from_chars(value.data(), value.data() + value.size(), parsed);
    if (failure != std::errc() || stop != value.data() + value.size() ||
        !(parsed >= option->low && parsed <= option->high) || (option->whole && parsed != std::floor(parsed))) {
      throw Error(spec.name + ": " + key + "='" + value + "' must be a " + (option->whole ? "whole " : "") +
                  "number from " + number(option->low) + " to " + number(option->high));
    }
    spec.values[key] = parsed;
  }
  return spec;
}

std::vector<std::string> baseline_help() {
  std::vector<std::string> lines;
  for (const Method& method : methods()) {
    std::string line = method.name;
    for (const Option& option : options_of(method)) line += std::string(",") + option.key + "=" + number(option.value);
    lines.push_back(line);
  }
  return lines;
}

std::unique_ptr<Baseline> make_baseline(const BaselineSpec& spec, const Layer& layer) {
  return find_method(spec.name)->make(spec, layer);
}

Step::Step(const Rows& rows, const float* q, int64_t q_head_stride, int32_t num_q_heads, float sm_scale, int64_t kv_len)
    : rows_(&rows), kv_len_(kv_len), num_q_heads_(num_q_heads) {
  const int32_t dim = rows.head_dim(), group = group_size();
  for (int32_t h = 0; h < num_q_heads; ++h) {
    for (int32_t d = 0; d < dim; ++d) q_.push_back(sm_scale * q[h * q_head_stride + d]);
  }
  scores_.resize(static_cast<size_t>(num_q_heads * kv_len));
  for (int32_t h = 0; h < num_q_heads; ++h) {
    float* scores = scores_.data() + h * kv_len;
    for (int64_t row = 0; row < kv_len; ++row) scores[row] = dot(this->q(h), rows.k(h / group, row), dim);
  }
}

int64_t Choice::tokens() const {
  int64_t sum = 0;
  for (const HeadSelection& head : selection.heads) sum += static_cast<int64_t>(head.tokens.size());
  return sum;
}

int64_t Choice::sampled() const {
  int64_t sum = tokens();
  for (const HeadSelection& head : selection.heads) sum -= head.num_certain;
  return sum;
}

int64_t Choice::bytes(const Rows& rows) const { return tokens() * (rows.k_bytes() + rows.v_bytes()) + summary_bytes; }

namespace {

// Folds rows in one by one; `value(i)` is added with the weight of `log_weight(i)`.
class WeightedMean {
 public:
  WeightedMean(float* out, int32_t dim, double max) : out_(out), sums_(static_cast<size_t>(dim)), max_(max) {}
  void add(double log_weight, const float* value) {
    const double weight = std::exp(log_weight - max_);
    if (weight == 0) return;
    total_ += weight;
    add_scaled(static_cast<float>(weight), value, sums_.data(), static_cast<int32_t>(sums_.size()));
  }
  void finish() {
    for (size_t d = 0; d < sums_.size(); ++d) out_[d] = total_ > 0 ? static_cast<float>(sums_[d] / total_) : 0.0f;
  }

 private:
  float* out_;
  std::vector<float> sums_;
  double max_, total_ = 0;
};

}  // namespace

void attend(const Step& step, const Choice& choice, float* out) {
  const Rows& rows = step.rows();
  const int32_t dim = rows.v_head_dim();
  for (int32_t h = 0; h < step.num_q_heads(); ++h) {
    const int32_t kv_head = h / step.group_size();
    const HeadSelection& head = choice.selection.heads[static_cast<size_t>(kv_head)];
    const std::vector<float>& log_weights =
        choice.head_log_weights.empty() ? head.log_weights : choice.head_log_weights[static_cast<size_t>(h)];
    const Estimate none, &rest = choice.estimates.empty() ? none : choice.estimates[static_cast<size_t>(h)];
    double max = rest.log_sum;
    for (size_t i = 0; i < head.tokens.size(); ++i)
      max = std::max<double>(max, step.scores(h)[head.tokens[i]] + log_weights[i]);
    WeightedMean mean(out + static_cast<int64_t>(h) * dim, dim, max);
    for (size_t i = 0; i < head.tokens.size(); ++i)
      mean.add(step.scores(h)[head.tokens[i]] + log_weights[i], rows.v(kv_head, head.tokens[i]));
    if (std::isfinite(rest.log_sum)) mean.add(rest.log_sum, rest.value.data());
    mean.finish();
  }
}

void attend_dense(const Step& step, float* out) {
  const int32_t dim = step.rows().v_head_dim();
  for (int32_t h = 0; h < step.num_q_heads(); ++h) {
    const float* scores = step.scores(h);
    WeightedMean mean(out + static_cast<int64_t>(h) * dim, dim, *std::max_element(scores, scores + step.kv_len()));
    for (int64_t row = 0; row < step.kv_len(); ++row) mean.add(scores[row], step.rows().v(h / step.group_size(), row));
    mean.finish();
  }
}

}  // namespace tactic::eval
