// vAttention (arXiv 2510.05688, section 4): sinks, recent rows and predicted heavy hitters are read with certainty;
// from the n_s rows that remain a uniform sample without replacement is read, each for n_s / b. A base sample of base *
// n_s rows estimates the standard deviation sigma of exp(score) there and the denominator D of all; by the central
// limit theorem
//   b = (z n_s sigma / (epsilon D))^2 with z = quantile of the normal distribution at 1 - delta / 2
// keeps the denominator's relative error within epsilon with probability 1 - delta. At least the base sample, at most
// n_s. Heavy hitters: the `heavy` rows of the best-ranked k-means clusters per query head, whose index is paid for. The
// group reads one sample, of the size that its neediest head asks for.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "baselines/common.h"
#include "core/random.h"

namespace tactic::eval {

namespace {

double normal_quantile(double p) {
  double low = -40, high = 40;
  for (int i = 0; i < 200; ++i) {
    const double middle = (low + high) / 2;
    (std::erfc(-middle / std::sqrt(2.0)) / 2 < p ? low : high) = middle;
  }
  return (low + high) / 2;
}

class VAttention : public Baseline {
 public:
  VAttention(const BaselineSpec& spec, const Layer& layer)
      : spec_(spec),
        open_(prompt_rows(spec, layer)),
        z_(normal_quantile(1 - spec.at("delta") / 2)),
        seed_(hash64(layer.seed + static_cast<uint64_t>(layer.layer))) {
    BaselineSpec heavy = parse_baseline("cluster_topk");
    for (const char* key : {"sinks", "recent", "cluster", "iterations"}) heavy.values[key] = spec.at(key);
    heavy.values["budget"] = spec.at("heavy");
    if (spec.at("heavy") > 0) heavy_ = make_clusters(heavy, layer);
  }

  void select(const Step& step, Choice& out) override {
    heavy_ != nullptr ? heavy_->select(step, out) : Marks(step, open_).write(out);
    for (size_t head = 0; head < out.selection.heads.size(); ++head) {
      HeadSelection& selection = out.selection.heads[head];
      std::vector<int32_t> rest;
      size_t next = 0;
      for (int32_t row = 0; row < step.kv_len(); ++row) {
        if (next < selection.tokens.size() && selection.tokens[next] == row) {
          ++next;
        } else {
          rest.push_back(row);
        }
      }
      if (rest.empty()) continue;
      shuffle(rest, hash64(seed_ + static_cast<uint64_t>(step.kv_len()) * 64 + head));
      const auto n = static_cast<double>(rest.size());
      const int64_t base = std::clamp<int64_t>(std::llround(spec_.at("base") * n),
                                               std::min<int64_t>(2, std::ssize(rest)), std::ssize(rest));
      int64_t size = base;
      for (int32_t g = 0; g < step.group_size(); ++g) {
        size = std::max(
            size, sample_size(step.scores(static_cast<int32_t>(head) * step.group_size() + g), selection, rest, base));
      }
      const auto weight = static_cast<float>(std::log(n / static_cast<double>(size)));
      for (int64_t i = 0; i < size; ++i) {
        selection.tokens.push_back(rest[static_cast<size_t>(i)]);
        selection.log_weights.push_back(weight);
        selection.clusters.push_back(-1);
        selection.num_certain += size == std::ssize(rest);
      }
    }
  }

 private:
  static void shuffle(std::vector<int32_t>& rows, uint64_t seed) {
    for (size_t i = 0; i + 1 < rows.size(); ++i) {
      const size_t j = i + static_cast<size_t>(uniform(seed + i) * static_cast<double>(rows.size() - i));
      std::swap(rows[i], rows[j]);
    }
  }

  int64_t sample_size(const float* scores, const HeadSelection& certain, const std::vector<int32_t>& rest,
                      int64_t base) const {
    double max = -HUGE_VAL, known = 0, sum = 0, squares = 0;
    for (const int32_t row : certain.tokens) max = std::max<double>(max, scores[row]);
    for (int64_t i = 0; i < base; ++i) max = std::max<double>(max, scores[rest[static_cast<size_t>(i)]]);
    for (const int32_t row : certain.tokens) known += std::exp(scores[row] - max);
    for (int64_t i = 0; i < base; ++i) {
      const double weight = std::exp(scores[rest[static_cast<size_t>(i)]] - max);
      sum += weight;
      squares += weight * weight;
    }
    const auto n = static_cast<double>(rest.size()), b = static_cast<double>(base), mean = sum / b;
    const double variance = b > 1 ? std::max(0.0, squares - b * mean * mean) / (b - 1) : 0;
    const double size = std::pow(z_ * n / (spec_.at("epsilon") * (known + n * mean)), 2) * variance;
    return size < n ? static_cast<int64_t>(std::ceil(size)) : std::ssize(rest);
  }

  BaselineSpec spec_;
  Range open_;
  double z_;
  uint64_t seed_;
  std::unique_ptr<Baseline> heavy_;
};

}  // namespace

std::unique_ptr<Baseline> make_vattention(const BaselineSpec& spec, const Layer& layer) {
  return std::make_unique<VAttention>(spec, layer);
}

}  // namespace tactic::eval
