// select_sample: inclusion probabilities from the scores of the clusters, and draw: the rows.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/random.h"
#include "core/read_on.h"
#include "reference/steps.h"

namespace tactic::reference {

namespace {

// Of a member's estimated weights, over the heads: their mean square, and the root of the mean square with each times
// the head's sink_factor. A NaN or infinity if any estimate is.
struct MemberWeights {
  std::vector<double> square, u;
};

MemberWeights member_weights(const ClusterScores& scores, const SelectParams& params, Inclusion& inclusion) {
  const int32_t n = scores.num_clusters;
  MemberWeights out{std::vector<double>(n), std::vector<double>(n)};
  for (int32_t g = 0; g < params.group_size; ++g) {
    std::vector<double> mean(n, -HUGE_VAL), spread(n);
    double max = params.exact[g].max;
    for (int32_t c = 0; c < n; ++c) {
      if (scores.sizes[c] == 0) continue;
      spread[c] =
          params.beta * spread_growth(static_cast<double>(scores.spreads[c]) * params.q_norms2[g], scores.sizes[c]);
      mean[c] = scores.dots[static_cast<size_t>(g) * n + c] + spread[c];
      max = std::max(max, mean[c]);
    }
    double clustered = 0;
    for (int32_t c = 0; c < n; ++c) clustered += scores.sizes[c] == 0 ? 0 : scores.sizes[c] * std::exp(mean[c] - max);
    for (const int32_t c : params.sink_clusters) clustered -= std::exp(mean[c] - max);
    const double total = std::max(clustered, 0.0) + params.exact[g].sum * std::exp(params.exact[g].max - max);
    inclusion.log_totals.push_back(static_cast<float>(max + std::log(total)));
    const double sinks = params.sinks == nullptr ? 0 : params.sinks[g] * std::exp(params.exact[g].max - max) / total,
                 factor = sink_factor(static_cast<float>(sinks));
    inclusion.sink_factors.push_back(static_cast<float>(factor));
    for (int32_t c = 0; c < n; ++c) {
      if (scores.sizes[c] == 0) continue;
      const double square = std::pow(std::exp(mean[c] + spread[c] - max) / total, 2) / params.group_size;
      out.square[c] += square;
      out.u[c] += square * factor * factor;
    }
  }
  for (double& value : out.u) value = std::sqrt(value);
  return out;
}

}  // namespace

void select_sample(const ClusterScores& scores, const SelectParams& params, const DecodeOptions& options,
                   Inclusion& out) {
  out.log_totals.clear();
  out.sink_factors.clear();
  const auto [square, u] = member_weights(scores, params, out);
  out.probability.assign(u.size(), 1.0f);
  out.tau = std::numeric_limits<float>::infinity();
  out.predicted_variance = 0;
  if (!std::all_of(u.begin(), u.end(), [](double value) { return std::isfinite(value); })) return;
  const double tau = out.tau = tau_of(options, params);
  for (size_t c = 0; c < u.size(); ++c) {
    if (u[c] > 0) out.predicted_variance += scores.sizes[c] * square[c] * (1 / std::min(1.0, tau * u[c]) - 1);
  }
  out.predicted_variance *= params.variance_ratio;
  for (size_t c = 0; c < u.size(); ++c) out.probability[c] = static_cast<float>(std::min(1.0, tau * u[c]));
}

void draw(const IndexState& index, int32_t head, const RowFilter& filter, const ClusterScores&,
          const Inclusion& inclusion, double offset, HeadSelection& out) {
  const HeadSelection all = readable(index, head, filter);
  out.clear();
  for (const bool certain : {true, false}) {
    auto next = index.segments.begin();
    int64_t end = 0;
    double sum = 0;
    for (size_t i = 0; i < all.tokens.size(); ++i) {
      for (; all.tokens[i] >= end; ++next) {  // segments come one after the other, each with an offset of its own
        end = next->row_begin + next->num_rows;
        sum = segment_offset(offset, next->row_begin);
      }
      const float p = inclusion.probability[all.clusters[i]];
      if ((p >= 1) != certain) continue;
      const double before = sum;
      sum += certain ? 0 : p;
      if (!certain && std::floor(sum) == std::floor(before)) continue;
      out.tokens.push_back(all.tokens[i]);
      out.log_weights.push_back(certain ? 0 : -std::log(p));
      out.clusters.push_back(all.clusters[i]);
      out.num_certain += certain;
    }
  }
}

}  // namespace tactic::reference
