// What the parts of the paper's evaluation share.
#pragma once

#include <vector>

#include "baselines/common.h"
#include "paper/paper.h"

namespace tactic::eval {

struct Mean {
  double sum = 0, count = 0;
  void add(double x) { sum += x, count += 1; }
  void add(const Mean& other) { sum += other.sum, count += other.count; }
  double get() const { return count > 0 ? sum / count : 0; }
};

/// The value whose rank is nearest to the quantile q; 0 of no values.
double nearest_rank(std::vector<double> values, double q);

/// Rows of the prompt that a case chooses from: all but 4 sinks and the newest 64.
Range case_rows(int64_t prompt_len);

/// At most `options.queries` decode queries, spread over those that lie at most `options.within` rows after the prompt.
std::vector<int64_t> decode_queries(const TraceInfo& info, const PaperOptions& options);

/// Layers of the file without a sliding window: the others are no case for selection. Throws Error when there are none.
std::vector<int32_t> full_layers(const Trace& trace);

Layer layer_of(const TraceLayer& traced, const Rows& rows, uint64_t seed);

/// One case: the weights of all rows that the query sees, summing to 1; of the rows to choose from in two orders; and
/// the mass of the others, which are read anyway.
struct CaseWeights {
  std::vector<double> by_row, by_rank, by_cluster;  // in the cache's order, falling, in the clusters' order
  std::vector<int32_t> cluster_order;               // rows
  double certain = 0;
};
CaseWeights case_weights(const Step& step, int32_t h, const Clusters& clusters);

/// How many of the first rows reach `mass` with those that are read anyway.
int64_t tokens_for(const std::vector<double>& weights, double certain, double mass);

}  // namespace tactic::eval
