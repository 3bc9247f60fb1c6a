// MagicPIG (arXiv 2410.16179, section 4): l hash tables of k sign bits each over the centered keys. A row is read when
// its code equals the query's in at least two tables; its weight is divided by the probability of that, with p = 1 -
// angle / pi: u = 1 - (1 - p^k)^l - l p^k (1 - p^k)^(l - 1). Every query head samples for itself. Reads per head and
// table the bounds of one bucket (8 bytes) and its list of rows (4 bytes each); per sampled row the norm of its
// centered key (4 bytes).
#include <algorithm>
#include <cmath>
#include <numbers>

#include "baselines/common.h"
#include "core/random.h"

namespace tactic::eval {

namespace {

// Normally distributed, by Box and Muller.
double normal(uint64_t seed) {
  const double u = 1 - uniform(2 * seed), v = uniform(2 * seed + 1);
  return std::sqrt(-2 * std::log(u)) * std::cos(2 * std::numbers::pi * v);
}

class MagicPig : public Baseline {
 public:
  MagicPig(const BaselineSpec& spec, const Layer& layer)
      : open_(prompt_rows(spec, layer)),
        bits_(static_cast<int32_t>(spec.count("k"))),
        tables_(static_cast<int32_t>(spec.count("l"))),
        dim_(layer.rows->head_dim()) {
    const size_t planes = static_cast<size_t>(bits_) * static_cast<size_t>(tables_);
    for (size_t i = 0; i < planes * static_cast<size_t>(dim_); ++i)
      planes_.push_back(static_cast<float>(normal(layer.seed * 0x9E3779B97F4A7C15u + i)));
    heads_.resize(static_cast<size_t>(layer.kv.num_kv_heads));
#pragma omp parallel for schedule(dynamic)
    for (size_t head = 0; head < heads_.size(); ++head) build(layer, static_cast<int32_t>(head));
  }

  void select(const Step& step, Choice& out) override {
    const int32_t group = step.group_size();
    Marks marks(step, open_);
    std::vector<std::vector<float>> weights;  // [num_q_heads][kv_len]
    int64_t listed = 0;
    for (int32_t h = 0; h < step.num_q_heads(); ++h) {
      const Head& head = heads_[static_cast<size_t>(h / group)];
      weights.emplace_back(static_cast<size_t>(step.kv_len()), 0.0f);
      const std::vector<uint16_t> code = encode(step.q(h));
      const float q_norm = std::sqrt(dot(step.q(h), step.q(h), dim_)), shift = dot(step.q(h), head.mean.data(), dim_);
      for (int64_t i = 0; i < open_.size(); ++i) {
        int32_t matches = 0;
        for (int32_t t = 0; t < tables_; ++t)
          matches += head.codes[static_cast<size_t>(t * open_.size() + i)] == code[static_cast<size_t>(t)];
        listed += matches;
        float& weight = weights.back()[static_cast<size_t>(open_.begin + i)];
        weight = -HUGE_VALF;
        if (matches < 2) continue;
        const double norms = static_cast<double>(q_norm) * head.norms[static_cast<size_t>(i)];
        const double cosine = norms > 0 ? (step.scores(h)[open_.begin + i] - shift) / norms : 0;
        weight = static_cast<float>(-std::log(probability(cosine)));
        marks.set(h / group, open_.begin + i);
      }
    }
    marks.write(out);
    for (HeadSelection& head : out.selection.heads) {
      const auto is_exact = [&](int32_t row) { return row < open_.begin || row >= open_.end; };
      const auto drawn = std::stable_partition(head.tokens.begin(), head.tokens.end(), is_exact);
      head.num_certain = drawn - head.tokens.begin();
    }
    for (int32_t h = 0; h < step.num_q_heads(); ++h) {
      out.head_log_weights.emplace_back();
      for (const int32_t row : out.selection.heads[static_cast<size_t>(h / group)].tokens)
        out.head_log_weights.back().push_back(weights[static_cast<size_t>(h)][static_cast<size_t>(row)]);
    }
    const int64_t exact = step.rows().num_kv_heads() * (step.kv_len() - open_.size());
    out.summary_bytes = 8 * int64_t{tables_} * step.num_q_heads() + 4 * listed + 4 * (out.tokens() - exact);
  }

 private:
  struct Head {
    std::vector<float> mean, norms;  // [head_dim], [open.size()]
    std::vector<uint16_t> codes;     // [l, open.size()]
  };

  double probability(double cosine) const {
    const double p = 1 - std::acos(std::clamp(cosine, -1.0, 1.0)) / std::numbers::pi;
    const double hit = std::pow(p, bits_), miss = 1 - hit;
    return 1 - std::pow(miss, tables_) - tables_ * hit * std::pow(miss, tables_ - 1);
  }

  std::vector<uint16_t> encode(const float* x) const {
    std::vector<uint16_t> code(static_cast<size_t>(tables_));
    const float* plane = planes_.data();
    for (uint16_t& bits : code) {
      for (int32_t b = 0; b < bits_; ++b, plane += dim_)
        bits = static_cast<uint16_t>(bits << 1 | (dot(x, plane, dim_) > 0 ? 1 : 0));
    }
    return code;
  }

  void build(const Layer& layer, int32_t kv_head) {
    Head& head = heads_[static_cast<size_t>(kv_head)];
    head.mean.assign(static_cast<size_t>(dim_), 0.0f);
    std::vector<double> sums(static_cast<size_t>(dim_));
    for (int64_t row = open_.begin; row < open_.end; ++row) {
      for (int32_t d = 0; d < dim_; ++d) sums[static_cast<size_t>(d)] += layer.rows->k(kv_head, row)[d];
    }
    for (int32_t d = 0; d < dim_ && open_.size() > 0; ++d)
      head.mean[static_cast<size_t>(d)] =
          static_cast<float>(sums[static_cast<size_t>(d)] / static_cast<double>(open_.size()));
    head.codes.resize(static_cast<size_t>(tables_ * open_.size()));
    std::vector<float> x(static_cast<size_t>(dim_));
    for (int64_t i = 0; i < open_.size(); ++i) {
      const float* key = layer.rows->k(kv_head, open_.begin + i);
      for (size_t d = 0; d < x.size(); ++d) x[d] = key[d] - head.mean[d];
      head.norms.push_back(std::sqrt(dot(x.data(), x.data(), dim_)));
      const std::vector<uint16_t> code = encode(x.data());
      for (int32_t t = 0; t < tables_; ++t)
        head.codes[static_cast<size_t>(t * open_.size() + i)] = code[static_cast<size_t>(t)];
    }
  }

  Range open_;
  int32_t bits_, tables_, dim_;
  std::vector<float> planes_;  // [l, k, head_dim]
  std::vector<Head> heads_;
};

}  // namespace

std::unique_ptr<Baseline> make_magicpig(const BaselineSpec& spec, const Layer& layer) {
  return std::make_unique<MagicPig>(spec, layer);
}

}  // namespace tactic::eval
