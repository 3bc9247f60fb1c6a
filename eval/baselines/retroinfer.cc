// The estimation zone of RetroInfer (arXiv 2505.02922, section 4.2, tripartite attention): per query head the best
// clusters by q.centroid are read until `budget` rows are; the next `estimate` share of all clusters enters attention
// unread, a cluster of n rows with centroid mu and value sum s as n exp(q.mu) in the denominator and exp(q.mu) s in the
// numerator. The rest is dropped. The group reads the union, so what one head reads no head estimates. Clustering:
// k-means in segments (the paper's is spherical). Reads all centroids in the key's type, value sums in the value's type
// and two bytes of size of the clusters estimated, two bytes for each row listed.
#include <algorithm>
#include <cmath>

#include "baselines/common.h"

namespace tactic::eval {

namespace {

class RetroInfer : public Baseline {
 public:
  RetroInfer(const BaselineSpec& spec, const Layer& layer) : spec_(spec), open_(prompt_rows(spec, layer)) {
    const auto dim = static_cast<size_t>(layer.rows->v_head_dim());
    for (int32_t head = 0; head < layer.kv.num_kv_heads; ++head) {
      heads_.push_back(cluster_keys(layer, head, open_, spec.count("cluster"),
                                    static_cast<int32_t>(spec.count("iterations")), spec.count("segment")));
      std::vector<float>& sums = value_sums_.emplace_back(static_cast<size_t>(heads_.back().size()) * dim);
      for (size_t c = 0; c < heads_.back().members.size(); ++c) {
        for (const int32_t row : heads_.back().members[c]) {
          for (size_t d = 0; d < dim; ++d) sums[c * dim + d] += layer.rows->v(head, row)[d];
        }
      }
    }
  }

  void select(const Step& step, Choice& out) override {
    const int32_t group = step.group_size();
    Marks marks(step, open_);
    std::vector<std::vector<float>> dots;
    std::vector<std::vector<int32_t>> orders;
    std::vector<std::vector<uint8_t>> read, estimated;  // [num_kv_heads][clusters]
    for (const Clusters& clusters : heads_)
      read.emplace_back(clusters.members.size()), estimated.emplace_back(clusters.members.size());
    for (int32_t h = 0; h < step.num_q_heads(); ++h) {
      const auto head = static_cast<size_t>(h / group);
      dots.push_back(heads_[head].dots(step.q(h)));
      orders.push_back(largest(dots.back(), heads_[head].size()));
      int64_t rows = 0;
      for (const int32_t c : orders.back()) {
        const std::vector<int32_t>& members = heads_[head].members[static_cast<size_t>(c)];
        if ((rows += static_cast<int64_t>(members.size())) > spec_.count("budget")) break;
        read[head][static_cast<size_t>(c)] = 1;
        for (const int32_t row : members) marks.set(static_cast<int32_t>(head), row);
      }
    }
    marks.write(out);
    for (int32_t h = 0; h < step.num_q_heads(); ++h) {
      const auto head = static_cast<size_t>(h / group);
      std::vector<int32_t> zone;
      const auto size =
          static_cast<size_t>(std::lround(spec_.at("estimate") * static_cast<double>(heads_[head].size())));
      for (const int32_t c : orders[static_cast<size_t>(h)]) {
        if (zone.size() < size && read[head][static_cast<size_t>(c)] == 0)
          zone.push_back(c), estimated[head][static_cast<size_t>(c)] = 1;
      }
      out.estimates.push_back(
          estimate(static_cast<size_t>(h / group), dots[static_cast<size_t>(h)], zone, step.rows().v_head_dim()));
    }
    int64_t clusters = 0, sums = 0;
    for (size_t head = 0; head < heads_.size(); ++head) {
      clusters += heads_[head].size();
      sums += std::count(estimated[head].begin(), estimated[head].end(), uint8_t{1});
    }
    const int64_t exact = step.rows().num_kv_heads() * (step.kv_len() - open_.size());
    out.summary_bytes =
        clusters * step.rows().k_bytes() + sums * (step.rows().v_bytes() + 2) + 2 * (out.tokens() - exact);
  }

 private:
  Estimate estimate(size_t head, const std::vector<float>& dots, const std::vector<int32_t>& zone, int32_t dim) const {
    Estimate result;
    result.value.assign(static_cast<size_t>(dim), 0.0f);
    if (zone.empty()) return result;
    double max = -HUGE_VAL, total = 0;
    for (const int32_t c : zone) max = std::max<double>(max, dots[static_cast<size_t>(c)]);
    std::vector<double> sums(static_cast<size_t>(dim));
    for (const int32_t c : zone) {
      const double weight = std::exp(dots[static_cast<size_t>(c)] - max);
      total += weight * static_cast<double>(heads_[head].members[static_cast<size_t>(c)].size());
      for (size_t d = 0; d < sums.size(); ++d)
        sums[d] += weight * value_sums_[head][static_cast<size_t>(c) * sums.size() + d];
    }
    result.log_sum = max + std::log(total);
    for (size_t d = 0; d < sums.size(); ++d) result.value[d] = static_cast<float>(sums[d] / total);
    return result;
  }

  BaselineSpec spec_;
  Range open_;
  std::vector<Clusters> heads_;
  std::vector<std::vector<float>> value_sums_;  // [num_kv_heads][clusters, v_head_dim]
};

}  // namespace

std::unique_ptr<Baseline> make_retroinfer(const BaselineSpec& spec, const Layer& layer) {
  return std::make_unique<RetroInfer>(spec, layer);
}

}  // namespace tactic::eval
