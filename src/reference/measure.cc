// measure: what the draw says of the mass that is read with certainty (docs/method.md, measuring itself).
#include <algorithm>
#include <cmath>

#include "core/drawn_variance.h"
#include "core/read_on.h"
#include "reference/steps.h"

namespace tactic::reference {

void measure(const IndexState& index, const RowsView& k, int32_t head, const HeadSelection& anyway,
             const HeadSelection& drawn, const HeadSelection& selection, const Inclusion& inclusion,
             const std::vector<Reading>& readings, bool alone, const std::vector<float>& sizes, const float* q,
             int32_t dim, std::vector<HeadMass>& masses) {
  const bool read = all_read(sizes, readings);
  const Undrawn undrawn = undrawn_rows(index, sizes, inclusion.probability, readings, alone);
  for (size_t g = 0; g < masses.size(); ++g) {
    const auto score = [&](int32_t row) { return dot_row(k, head, row, q + g * dim, dim); };
    std::vector<double> certain;
    for (const int32_t row : anyway.tokens) certain.push_back(score(row));
    for (int64_t i = 0; i < selection.num_certain; ++i) certain.push_back(score(selection.tokens[i]));
    double max = -HUGE_VAL, sum = 0;
    for (const double s : certain) max = std::max(max, s);
    for (size_t i = drawn.num_certain; i < drawn.tokens.size(); ++i)
      max = std::max(max, score(drawn.tokens[i]) + drawn.log_weights[i]);
    for (const double s : certain) sum += std::exp(s - max);
    // Rows of clusters read whole because of the draw are certain now; what they were drawn to speak for is still
    // missing.
    DrawnSums sums;
    for (size_t i = drawn.num_certain; i < drawn.tokens.size(); ++i) {
      const int32_t c = drawn.clusters[i];
      if (!speaks(readings[c], alone)) continue;
      const double weight = std::exp(score(drawn.tokens[i]) + drawn.log_weights[i] - max);
      sums.add(weight, inclusion.probability[c]);
    }
    const DrawnVariance variance(sums);
    double rest = sums.sum;
    for (int64_t i = 0; i < selection.num_certain; ++i) {
      if (readings[selection.clusters[i]] == Reading::kRefined && !alone)
        rest -= std::exp(score(selection.tokens[i]) - max);
    }
    const double total = sum + (read ? 0.0 : std::max(0.0, rest)), mass = sum / total,
                 of_all = index.calibration[head].usual_of(g, masses.size()),
                 usual = alone ? of_all : variance.for_draws(of_all, drawn.tokens.size() - drawn.num_certain);
    const double tau = unseen_tau(inclusion, g);
    if (!(total > 0)) continue;
    masses[g] = {mass,
                 undrawn.any && !read
                     ? mass * std::sqrt(variance.variance(total, tau, undrawn.count_variance, usual)) / total
                     : 0,
                 variance.freedom(usual), max + std::log(total)};
  }
}

}  // namespace tactic::reference
