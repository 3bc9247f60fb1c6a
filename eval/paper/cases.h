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

/// Nearest rank; 0 of no values.
double quantile(std::vector<double> values, double q);

/// At most `wanted` decode queries, spread over the trace's.
std::vector<int64_t> decode_queries(const TraceInfo& info, int64_t wanted);

/// Layers of the file without a sliding window: the others are no case for selection.
std::vector<int32_t> full_layers(const Trace& trace);

Layer layer_of(const TraceLayer& traced, const Rows& rows, uint64_t seed);

/// One case: weights of the prompt's rows, summing to 1, and the rows in two orders.
struct CaseWeights {
  std::vector<double> by_row, by_rank, by_cluster;   // in the cache's order, falling, in the clusters' order
  std::vector<int32_t> cluster_order;                // rows
};
CaseWeights case_weights(const Step& step, int32_t h, const Clusters& clusters);

/// The first rows that hold `mass`.
int64_t tokens_for(const std::vector<double>& weights, double mass);

}  // namespace tactic::eval
