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

NextClusters read_on(const ClusterScores& scores, const SelectParams& params, std::span<const Reading> readings,
                     std::span<const HeadMass> masses, double target_mass) {
  const auto n = static_cast<size_t>(scores.num_clusters);
  std::vector<size_t> ranked;
  size_t left = 0;
  for (size_t c = 0; c < n; ++c) {
    if (readings[c] == Reading::kWhole || !(scores.sizes[c] > 0)) continue;
    ranked.push_back(c);
    left += readings[c] == Reading::kDrawn;
  }
  struct Short {
    std::vector<double> shares;  // of what is left, of each ranked cluster; those of clusters that are left sum to 1
    double lacks;                // share of what is left that must be read
  };
  std::vector<Short> heads;
  for (size_t g = 0; g < masses.size() && left > 0; ++g) {
    const HeadMass& m = masses[g];
    const double rest = 1 - mass_bound(m, kSureness),
                 allowed = std::max(1 - target_mass, 0.0);  // of the mass, surely and at most
    if (rest <= allowed) continue;
    Short head{std::vector<double>(ranked.size()), 1 - allowed / rest};
    double sum = 0;
    for (size_t i = 0; i < ranked.size(); ++i) {
      const size_t c = ranked[i];
      const double spread =
          params.beta * spread_growth(double{scores.spreads[c]} * params.q_norms2[g], scores.sizes[c]);
      head.shares[i] = scores.sizes[c] * std::exp(std::min(scores.dots[g * n + c] + spread - m.lse, 0.0));
      if (readings[c] == Reading::kDrawn) sum += head.shares[i];
    }
    for (double& share : head.shares) share = sum > 0 ? share / sum : 1 / static_cast<double>(left);
    heads.push_back(std::move(head));
  }
  NextClusters next;
  if (heads.empty()) return next;
  std::vector<std::pair<double, size_t>> order(ranked.size());
  for (size_t i = 0; i < ranked.size(); ++i) {
    double worth = 0;
    for (const Short& head : heads) worth += head.shares[i];
    order[i] = {-worth / scores.sizes[ranked[i]], i};
  }
  std::sort(order.begin(), order.end());
  for (const auto& [worth, i] : order) {
    if (std::none_of(heads.begin(), heads.end(), [](const Short& head) { return head.lacks > 1e-9; })) break;
    const auto c = static_cast<int32_t>(ranked[i]);
    if (readings[ranked[i]] == Reading::kRefined) {
      next.silent.push_back(c);
      continue;
    }
    for (Short& head : heads) head.lacks -= head.shares[i];
    next.read.push_back(c);
  }
  std::sort(next.read.begin(), next.read.end());
  std::sort(next.silent.begin(), next.silent.end());
  return next;
}

}  // namespace tactic
