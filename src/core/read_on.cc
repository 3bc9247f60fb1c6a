#include "core/read_on.h"

#include <algorithm>
#include <cmath>

namespace tactic {

double spread_growth(double s2, double size) {
  const double cap2 = 2 * std::log(std::max(size, 2.0));
  return s2 <= cap2 ? s2 / 2 : std::sqrt(cap2 * s2) - cap2 / 2;
}

double mass_bound(const HeadMass& head, double z) {
  if (head.std_error <= 0) return head.mass;
  const double mass = head.mass, freedom = head.freedom, std_error = head.std_error;
  // Student's quantile after Wallace, and the rest 1 - mass as a positive variable: its logarithm is nearer to normal
  // than itself, up to one standard error of its own size.
  const double x = std::abs(z) * (8 * freedom + 3) / (8 * freedom + 1);
  const double t = std::sqrt(freedom * std::expm1(x * x / freedom));
  const double rest = 1 - mass, r = rest > 0 ? t * std_error / rest : HUGE_VAL;
  if (z < 0) return 1 - rest * std::exp(-r);
  const double far = rest <= 0 ? t * std_error : r <= 1 ? rest * std::exp(r) : std::exp(1.0) * t * std_error;
  return std::max(0.0, 1 - far);
}

std::vector<int32_t> read_on(const ClusterScores& scores, const SelectParams& params, const std::vector<char>& whole,
                             std::span<const HeadMass> masses, double target_mass) {
  const auto n = static_cast<size_t>(scores.num_clusters);
  std::vector<size_t> left;
  for (size_t c = 0; c < n; ++c) {
    if (!whole[c] && scores.sizes[c] > 0) left.push_back(c);
  }
  struct Short {
    std::vector<double> shares;  // of what is left, of each cluster; they sum to 1
    double lacks;                // share of what is left that must be read
  };
  std::vector<Short> heads;
  for (size_t g = 0; g < masses.size() && !left.empty(); ++g) {
    const HeadMass& m = masses[g];
    const double rest = 1 - mass_bound(m, kSureness),
                 allowed = std::max(1 - target_mass, 0.0);  // of the mass, surely and at most
    if (rest <= allowed) continue;
    Short head{std::vector<double>(left.size()), 1 - allowed / rest};
    double sum = 0;
    for (size_t i = 0; i < left.size(); ++i) {
      const size_t c = left[i];
      const double spread =
          params.beta * spread_growth(double{scores.spreads[c]} * params.q_norms2[g], scores.sizes[c]);
      sum += head.shares[i] = scores.sizes[c] * std::exp(std::min(scores.dots[g * n + c] + spread - m.lse, 0.0));
    }
    for (double& share : head.shares) share = sum > 0 ? share / sum : 1 / static_cast<double>(left.size());
    heads.push_back(std::move(head));
  }
  std::vector<int32_t> next;
  if (heads.empty()) return next;
  std::vector<std::pair<double, size_t>> order(left.size());
  for (size_t i = 0; i < left.size(); ++i) {
    double worth = 0;
    for (const Short& head : heads) worth += head.shares[i];
    order[i] = {-worth / scores.sizes[left[i]], i};
  }
  std::sort(order.begin(), order.end());
  for (const auto& [worth, i] : order) {
    if (std::none_of(heads.begin(), heads.end(), [](const Short& head) { return head.lacks > 1e-9; })) break;
    for (Short& head : heads) head.lacks -= head.shares[i];
    next.push_back(static_cast<int32_t>(left[i]));
  }
  std::sort(next.begin(), next.end());
  return next;
}

}  // namespace tactic
