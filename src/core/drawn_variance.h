// How sure a sum of drawn weights is, from the draw itself. Used by every backend on the CPU.
#pragma once

#include <algorithm>
#include <vector>

#include "core/steps.h"

namespace tactic {

/// Variance of the sum of drawn weights under systematic sampling, from the draw itself (docs/method.md, measuring
/// itself). add() takes the weights, divided by their probabilities, in the order of the draw.
class DrawnVariance {
 public:
  void add(double weight, double probability) {
    if (count_ > 0) {
      const double square = 0.5 * (2 - probability - last_probability_) * (weight - last_) * (weight - last_);
      differences_ += square;
      squares_ += square * square;
    }
    independent_ += weight * weight * (1 - probability);
    sum_ += weight;
    last_ = weight;
    last_probability_ = probability;
    ++count_;
  }
  /// `usual`: what earlier steps of this head found relative to the squared sum, 0: nothing; taken where it is the
  /// larger one, since a draw that missed the heavy rows shows little scatter just then. `total`: of all weights.
  /// `tau`: what a row stands for is about total / tau. `count_variance`: of the number of draws.
  double variance(double total, double tau, double count_variance, double usual) const {
    const auto n = static_cast<double>(count_);
    const double mean = count_ > 0 ? sum_ / n : total / tau;
    const double from_count = mean * mean * count_variance;
    const double unseen = total / tau * (total / tau);  // the heaviest row missed may always weigh as much as this
    if (count_ < 2) return std::max(independent_, from_count) + unseen;
    return std::max(own_variance(count_variance), usual * sum_ * sum_) + unseen;
  }
  /// Variance over squared sum, for `usual` of later steps; 0 when two draws are not there.
  double relative(double count_variance) const { return count_ < 2 ? 0 : own_variance(count_variance) / (sum_ * sum_); }
  /// What is usual for as many draws as there are, given what is for `all`: by their number, as scatter goes.
  double for_draws(double usual, int64_t all) const {
    return usual * static_cast<double>(all) / static_cast<double>(std::max<int64_t>(count_, 1));
  }
  double freedom(double usual) const { return count_ < 2 ? 1 : own_freedom() + (usual > 0 ? kUsualFreedom : 0); }

  static constexpr double kUsualFreedom = 10;  // degrees of freedom that earlier steps add
  static constexpr double kUsualRate = 0.05;   // at which they forget

 private:
  double own_variance(double count_variance) const {
    const auto n = static_cast<double>(count_);
    return differences_ / 2 * n / (n - 1) + sum_ / n * (sum_ / n) * count_variance;
  }
  // 2/3 of the draws when the weights scatter normally, few when few of them make up the variance.
  double own_freedom() const { return std::max(1.0, squares_ > 0 ? 2 * differences_ * differences_ / squares_ : 1.0); }

  double differences_ = 0, squares_ = 0, independent_ = 0, sum_ = 0, last_ = 0, last_probability_ = 0;
  int64_t count_ = 0;
};

/// Rows that are neither read whole nor surely left out, as the draw sees them.
struct Undrawn {
  bool any = false;           // something can be drawn
  double count_variance = 0;  // a segment's number of draws is one of the two whole numbers around its expectation
};
/// `probability`, `readings`, `sizes`: [num_clusters]. `alone`: as in speaks().
Undrawn undrawn_rows(const IndexState& index, const std::vector<float>& sizes, const std::vector<float>& probability,
                     const std::vector<Reading>& readings, bool alone);

/// Whether every cluster that holds rows was read whole, for whatever reason: then the draw has nothing to say.
bool all_read(const std::vector<float>& sizes, const std::vector<Reading>& readings);

}  // namespace tactic
