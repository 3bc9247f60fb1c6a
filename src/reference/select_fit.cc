// select_fit: rank, fit a / x + b through two windows, read up to the target mass (arXiv 2502.12216, section 4).
#include <algorithm>
#include <cmath>

#include "reference/steps.h"

namespace tactic::reference {

int64_t select_fit(const IndexState& index, int32_t head, const RowFilter& filter, const ClusterScores& scores,
                   const RowsView& k, const float* q, int32_t head_dim, int32_t group_size, const SoftmaxState* exact,
                   float target_mass, HeadSelection& out) {
  const HeadSelection all = readable(index, head, filter);
  const size_t n = all.tokens.size();
  std::vector<bool> kept(n, target_mass >= 1), probed(n);
  for (int32_t g = 0; g < group_size && target_mass < 1; ++g) {
    const std::vector<size_t> order = rank(all, scores.dots.data() + static_cast<size_t>(g) * scores.num_clusters);
    const size_t peak = n < 256 ? n : std::max<size_t>(16, n / 50), width = std::max<size_t>(8, n / 100);
    const size_t near = n / 10 - width / 2, far = n * 6 / 10 - width / 2;  // where the windows begin
    std::vector<double> weights(n);                                        // scores first; then what is believed
    double max = exact[g].max;
    for (size_t i = 0; i < n; ++i) {
      if (i >= peak && (i < near || i >= near + width) && (i < far || i >= far + width)) continue;
      probed[order[i]] = true;
      weights[i] = dot_row(k, head, all.tokens[order[i]], q + g * head_dim, head_dim);
      max = std::max(max, weights[i]);
    }
    const auto mean = [&](size_t begin) {
      double sum = 0;
      for (size_t i = begin; i < begin + width; ++i) sum += std::exp(weights[i] - max);
      return sum / static_cast<double>(width);
    };
    if (peak < n) {
      const double middle = (static_cast<double>(width) + 1) / 2, x1 = static_cast<double>(near) + middle,
                   x2 = static_cast<double>(far) + middle;
      const double y1 = mean(near), y2 = mean(far);
      const double a = y2 > y1 ? 0 : (y1 - y2) / (1 / x1 - 1 / x2), b = y2 > y1 ? (y1 + y2) / 2 : y1 - a / x1;
      for (size_t i = peak; i < n; ++i) weights[i] = std::max(a / static_cast<double>(i + 1) + b, 0.0);
    }
    for (size_t i = 0; i < peak; ++i) weights[i] = std::exp(weights[i] - max);
    const double certain = exact[g].sum * std::exp(exact[g].max - max);
    double total = certain, mass = certain;
    for (size_t i = 0; i < n; ++i) total += weights[i];
    for (size_t i = 0; i < n && !(mass >= target_mass * total); ++i) {
      mass += weights[i];
      kept[order[i]] = true;
    }
  }
  keep(all, kept, out);
  return std::count(probed.begin(), probed.end(), true);
}

}  // namespace tactic::reference
