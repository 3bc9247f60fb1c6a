// Quest (arXiv 2406.10774, section 3.3): per page of 16 rows the minimum and maximum of every key element. A page's
// score is the largest that any of its keys could have, sum over d of max(q_d min_d, q_d max_d); the best budget / 16
// pages are read. With grouped queries each head ranks for itself and the group reads the union. The paper leaves two
// layers dense; not here. Reads the two bounds of every page in the key's type.
#include <algorithm>

#include "baselines/common.h"

namespace tactic::eval {

namespace {

class Quest : public Baseline {
 public:
  Quest(const BaselineSpec& spec, const Layer& layer)
      : spec_(spec), page_(spec.count("page")), heads_(static_cast<size_t>(layer.kv.num_kv_heads)) {}

  void select(const Step& step, Choice& out) override {
    take_in(step);
    const Range open = open_rows(spec_, step.kv_len());
    const int64_t first = open.begin / page_, last = (open.end + page_ - 1) / page_;  // pages with rows to choose
    Marks marks(step, open);
    for (int32_t h = 0; h < step.num_q_heads(); ++h) {
      const Bounds& bounds = heads_[static_cast<size_t>(h / step.group_size())];
      std::vector<float> scores;
      for (int64_t page = first; page < last; ++page)
        scores.push_back(score(step.q(h), bounds, page, step.rows().head_dim()));
      for (const int32_t i : largest(scores, (spec_.count("budget") + page_ - 1) / page_)) {
        const int64_t begin = std::max(open.begin, (first + i) * page_),
                      end = std::min(open.end, (first + i + 1) * page_);
        for (int64_t row = begin; row < end; ++row) marks.set(h / step.group_size(), row);
      }
    }
    marks.write(out);
    out.summary_bytes = (last - first) * step.rows().num_kv_heads() * 2 * step.rows().k_bytes();
  }

 private:
  struct Bounds {
    std::vector<float> low, high;  // [pages, head_dim]
  };

  static float score(const float* q, const Bounds& bounds, int64_t page, int32_t dim) {
    const float* low = bounds.low.data() + page * dim;
    const float* high = bounds.high.data() + page * dim;
    float sum = 0;
    for (int32_t d = 0; d < dim; ++d) sum += std::max(q[d] * low[d], q[d] * high[d]);
    return sum;
  }

  // New rows widen the bounds of their pages.
  void take_in(const Step& step) {
    const auto dim = static_cast<size_t>(step.rows().head_dim());
    for (size_t head = 0; head < heads_.size(); ++head) {
      Bounds& bounds = heads_[head];
      for (int64_t row = known_; row < step.kv_len(); ++row) {
        const float* key = step.rows().k(static_cast<int32_t>(head), row);
        if (row % page_ == 0) {
          bounds.low.insert(bounds.low.end(), key, key + dim);
          bounds.high.insert(bounds.high.end(), key, key + dim);
        }
        const size_t at = static_cast<size_t>(row / page_) * dim;
        for (size_t d = 0; d < dim; ++d) {
          bounds.low[at + d] = std::min(bounds.low[at + d], key[d]);
          bounds.high[at + d] = std::max(bounds.high[at + d], key[d]);
        }
      }
    }
    known_ = std::max(known_, step.kv_len());
  }

  BaselineSpec spec_;
  int64_t page_, known_ = 0;
  std::vector<Bounds> heads_;
};

}  // namespace

std::unique_ptr<Baseline> make_quest(const BaselineSpec& spec, const Layer& layer) {
  return std::make_unique<Quest>(spec, layer);
}

}  // namespace tactic::eval
