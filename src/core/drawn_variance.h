// How sure a sum of drawn weights is, from the draw itself. Used by every backend on the CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/steps.h"

namespace tactic {

/// Sums over drawn weights, divided by their probabilities, in the order of the draw.
struct DrawnSums {
  double differences = 0;  // of neighbors, squared, each with half of what is random in the two
  double squares = 0;      // of those
  double independent = 0;  // variance of the sum if the draws were independent
  double sum = 0;
  int64_t count = 0;
  double first = 0, first_left = 0, last = 0, last_left = 0;  // weights, and 1 - their probabilities

  void add(double weight, double probability) {
    const double left = 1 - probability;
    append({0, 0, weight * weight * left, weight, 1, weight, left, weight, left});
  }
  /// Those of the draws that come next.
  void append(const DrawnSums& next) {
    if (next.count == 0) return;
    if (count > 0) {
      const double step = next.first - last, square = 0.5 * (last_left + next.first_left) * step * step;
      differences += square;
      squares += square * square;
    } else {
      first = next.first;
      first_left = next.first_left;
    }
    differences += next.differences;
    squares += next.squares;
    independent += next.independent;
    sum += next.sum;
    count += next.count;
    last = next.last;
    last_left = next.last_left;
  }
};

/// Variance of the sum of drawn weights under systematic sampling, from the draw itself (docs/method.md, measuring
/// itself).
class DrawnVariance {
 public:
  explicit DrawnVariance(const DrawnSums& sums) : sums_(sums) {}
  /// `usual`: what earlier steps of this head found relative to the squared sum, 0: nothing; taken where it is the
  /// larger one, since a draw that missed the heavy rows shows little scatter just then. `total`: of all weights.
  /// `tau`: what a row stands for is about total / tau. `count_variance`: of the number of draws.
  double variance(double total, double tau, double count_variance, double usual) const {
    const auto n = static_cast<double>(sums_.count);
    const double mean = sums_.count > 0 ? sums_.sum / n : total / tau;
    const double from_count = mean * mean * count_variance;
    const double unseen = total / tau * (total / tau);  // the heaviest row missed may always weigh as much as this
    if (sums_.count < 2) return std::max(sums_.independent, from_count) + unseen;
    return std::max(own_variance(count_variance), usual * sums_.sum * sums_.sum) + unseen;
  }
  /// Variance over squared sum, for `usual` of later steps; 0 when two draws are not there.
  double relative(double count_variance) const {
    return sums_.count < 2 ? 0 : own_variance(count_variance) / (sums_.sum * sums_.sum);
  }
  /// What is usual for as many draws as there are, given what is for `all`: by their number, as scatter goes.
  double for_draws(double usual, int64_t all) const {
    return usual * static_cast<double>(all) / static_cast<double>(std::max<int64_t>(sums_.count, 1));
  }
  double freedom(double usual) const { return sums_.count < 2 ? 1 : own_freedom() + (usual > 0 ? kUsualFreedom : 0); }

  static constexpr double kUsualFreedom = 10;  // degrees of freedom that earlier steps add
  static constexpr double kUsualRate = 0.05;   // at which they forget

 private:
  double own_variance(double count_variance) const {
    const auto n = static_cast<double>(sums_.count);
    return sums_.differences / 2 * n / (n - 1) + sums_.sum / n * (sums_.sum / n) * count_variance;
  }
  // 2/3 of the draws when the weights scatter normally, few when few of them make up the variance.
  double own_freedom() const {
    return std::max(1.0, sums_.squares > 0 ? 2 * sums_.differences * sums_.differences / sums_.squares : 1.0);
  }

  DrawnSums sums_;
};

/// Rows that are neither read whole nor surely left out, as the draw sees them.
struct Undrawn {
  bool any = false;           // something can be drawn
  double count_variance = 0;  // a segment's number of draws is one of the two whole numbers around its expectation

  void add(double expected) {  // a segment's
    const double part = expected - std::floor(expected);
    any = any || expected > 0;
    count_variance += part * (1 - part);
  }
};
/// `probability`, `readings`, `sizes`: [num_clusters]. `alone`: as in speaks().
Undrawn undrawn_rows(const IndexState& index, const std::vector<float>& sizes, const std::vector<float>& probability,
                     const std::vector<Reading>& readings, bool alone);

/// Whether every cluster that holds rows was read whole, for whatever reason: then the draw has nothing to say.
bool all_read(const std::vector<float>& sizes, const std::vector<Reading>& readings);

}  // namespace tactic
