// What goes from step to step. Each backend has the steps as free functions of the same names in files of the same
// names.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "core/index_state.h"
#include "tactic/attention.h"
#include "tactic/selection.h"

namespace tactic {

/// Input of `cluster`: rows of one KV head to be clustered together.
struct ClusterTask {
  KvView kv;
  int32_t head = 0;
  int64_t row_begin = 0;
  int32_t num_rows = 0;
  int32_t first_row = 0;  // rows below row_begin + first_row are sinks and left out
  int32_t num_clusters = 0;
  int32_t iterations = 0;
  int32_t num_outliers = 0;  // rows of least key norm, and as many of least value norm: each is a cluster of its own
  uint64_t seed = 0;
};

/// Fewer indexed rows are not worth a selection.
inline constexpr int64_t kMinIndexedRows = 256;

/// Output of `score`: what is known of every cluster of one KV head before any of its rows is read.
struct ClusterScores {
  int32_t num_clusters = 0;    // padded numbering over all segments
  std::vector<float> dots;     // [group_size, num_clusters] sm_scale * q.centroid
  std::vector<float> spreads;  // [num_clusters]
  std::vector<float> sizes;    // [num_clusters] members the query may read; 0 for padding
};

/// Softmax over a part of the row: the sum of exp(score - max), and the max. Empty: max = -infinity, sum = 0.
struct SoftmaxState {
  float max = -__builtin_inff();
  float sum = 0;
};

/// Input of the selectors besides the scores.
struct SelectParams {
  int32_t group_size = 0;
  const float* q_norms2 = nullptr;              // [group_size] |sm_scale * q|^2
  const SoftmaxState* exact = nullptr;          // [group_size] of the rows read anyway (sinks, recent, expected)
  float beta = 0;                               // weight of the spread term in the estimate of a cluster's mean weight
  float variance_ratio = 1;                     // measured over predicted variance, learned from earlier steps
  float tau_factor = 1;                         // as in DecodeQuery
  const float* sinks = nullptr;                 // [group_size] the sinks' part of exact's sums; nullptr: none
  std::span<const int32_t> sink_clusters = {};  // of those that stand in one, which must not count twice
};

/// Sinks at most that count when a head's share beside them is taken.
inline constexpr int32_t kCountedSinks = 16;
inline constexpr float kLeastBesideSinks = 1.0f / 256;  // so that the factor is 16 at most

/// What a head's inclusion probabilities are multiplied by, given the share of its weights that sinks have: their
/// values are next to nothing, so that the output is as small as the rest of the weights, and an error that is small
/// beside all of them may be large beside it (docs/method.md, sinks).
inline float sink_factor(float sink_share) { return 1 / std::sqrt(std::max(1 - sink_share, kLeastBesideSinks)); }

/// Output of select_sample before rows are drawn.
struct Inclusion {
  std::vector<float> probability;   // [num_clusters] of each member
  float tau = 0;                    // the one used
  double predicted_variance = 0;    // of the mass, relative, mean over the group's heads
  std::vector<float> log_totals;    // [group_size] ln of the estimated sum of exp(score) over all rows
  std::vector<float> sink_factors;  // [group_size]
  std::vector<float> scratch;
};

/// How a step reads a cluster.
enum class Reading : char {
  kDrawn,    // rows drawn from it
  kRefined,  // whole because of what was drawn
  kWhole,    // whole whatever was drawn
};

/// Whether a cluster's draw speaks for what is not read. A refined one's does not when those of clusters that are not
/// read whole speak `alone`.
inline bool speaks(Reading reading, bool alone) {
  return reading == Reading::kDrawn || (reading == Reading::kRefined && !alone);
}

/// The number of rows that one unit of weight is worth. The same for all heads, since then no row read in one would
/// have lowered the sum of the heads' variances more in another; a head whose estimates prove worse gets more by the
/// square root of that (docs/method.md, tau).
inline float tau_of(const DecodeOptions& options, const SelectParams& params) {
  const double error = options.target_error;
  const double tau = options.tau > 0 ? options.tau : std::sqrt(double{params.variance_ratio}) / (error * error);
  return static_cast<float>(std::max(1.0, tau * params.tau_factor));
}

/// The share of the mass that select_fit reads.
inline float fit_mass(const DecodeOptions& options) { return options.target_mass > 0 ? options.target_mass : 0.9f; }

/// The share of head g's estimated total above which a sampled row has its cluster read whole: of the estimate, so that
/// each row can be judged as it is read. A sampled row stands for about 1 / tau by design, or less by the head's factor
/// for sinks; with a limit near that, refinement would throw the sample away and the mass it speaks for with it (at
/// 2 / tau the mass is biased, at 8 / tau by less than 1%).
inline float refine_limit(const DecodeOptions& options, const Inclusion& inclusion, size_t g) {
  if (options.refine >= 1) return __builtin_inff();
  return std::max(options.refine, 8.0f / inclusion.tau) / inclusion.sink_factors[g];
}

/// tau as head g's measured error takes it: a row that was not drawn may weigh as much as 1 / tau.
/// Between what rows stand for with the factor for sinks, where intervals were a little too narrow, and without, where
/// those of a head with 255 times its weights on a sink were 16 times too wide (docs/method.md, measuring itself).
inline double unseen_tau(const Inclusion& inclusion, size_t g) {
  return double{inclusion.tau} * std::sqrt(double{inclusion.sink_factors[g]});
}

}  // namespace tactic
