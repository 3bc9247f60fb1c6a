// Selection from true scores: what no method can know. Per query head the fewest rows whose mass reaches `mass`
// (top-p), or the `budget` heaviest (top-k); the group reads the union. Reads no index: the scores are free.
#include <algorithm>
#include <cmath>

#include "baselines/common.h"

namespace tactic::eval {

namespace {

class Oracle : public Baseline {
 public:
  Oracle(const BaselineSpec& spec, const Layer&) : spec_(spec) {}

  void select(const Step& step, Choice& out) override {
    const Range open = open_rows(spec_, step.kv_len());
    Marks marks(step, open);
    for (int32_t h = 0; h < step.num_q_heads(); ++h) {
      const std::span<const float> scores(step.scores(h) + open.begin, static_cast<size_t>(open.size()));
      const int64_t count = spec_.name == "oracle_topk" ? spec_.count("budget") : open.size();
      const std::vector<int32_t> order = largest(scores, count);
      double missing = spec_.name == "oracle_topk" ? HUGE_VAL : missing_mass(step, h, open);
      for (const int32_t i : order) {
        if (missing <= 0) break;
        missing -= std::exp(static_cast<double>(scores[static_cast<size_t>(i)]) - max_);
        marks.set(h / step.group_size(), open.begin + i);
      }
    }
    marks.write(out);
  }

 private:
  // What the rows read anyway lack to the target, in units of exp(score - max_).
  double missing_mass(const Step& step, int32_t h, Range open) {
    const float* scores = step.scores(h);
    max_ = *std::max_element(scores, scores + step.kv_len());
    double total = 0, read = 0;
    for (int64_t row = 0; row < step.kv_len(); ++row) {
      const double weight = std::exp(static_cast<double>(scores[row]) - max_);
      total += weight;
      if (row < open.begin || row >= open.end) read += weight;
    }
    return spec_.at("mass") >= 1 ? HUGE_VAL : spec_.at("mass") * total - read;
  }

  BaselineSpec spec_;
  double max_ = 0;
};

}  // namespace

std::unique_ptr<Baseline> make_oracle(const BaselineSpec& spec, const Layer& layer) {
  return std::make_unique<Oracle>(spec, layer);
}

}  // namespace tactic::eval
