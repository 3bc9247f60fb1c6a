// The tables and figures of the paper (Tactic, arXiv 2502.12216), measured on a trace: each function gives JSON rows.
// A case is one query head of one decode query at one layer. Rows are counted of the prompt without 4 sinks and the
// newest 64; those and the rows after the prompt are read anyway, not counted, and their mass counts.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <vector>

#include "trace.h"

namespace tactic::eval {

using Json = nlohmann::ordered_json;

struct PaperOptions {
  int64_t queries = 16;  // decode queries looked at, spread over those
  int64_t within = 256;  // that lie at most so many rows after the prompt: the index covers the prompt
  int32_t cluster_tokens = 32;
  int32_t iterations = 10;
  int32_t ablation_layers = 6;  // layers on which clusterings are varied, spread over the model's
  uint64_t seed = 1;
};

/// "table1": mean tokens of the oracle, of the cluster order and of the fit, mass achieved, success, for each target
/// mass. "sparsity_head", "sparsity_query": the oracle's tokens at 0.9 by layer and head, and by query. "curves":
/// tokens, mass and success of each curve at 0.9. "union": rows per KV head at the fit's 0.9 with and without the union
/// of the group's sets, and the error of both. "distance": mean error against the mass achieved, of Quest's fixed
/// budgets and of the oracle.
std::vector<Json> paper_cases(const Trace& trace, const PaperOptions& options);

/// "value_norms": quantiles of |v| over its median, by layer.
std::vector<Json> paper_value_norms(const Trace& trace);

/// "clusters": squared distance to the centroids against that to the mean, and tokens of the cluster order at 0.9, for
/// cluster sizes and iterations.
std::vector<Json> paper_clusters(const Trace& trace, const PaperOptions& options);

/// Everything, parallel over layers, each row with the trace's name and model.
std::vector<Json> paper_rows(const Trace& trace, const PaperOptions& options);

}  // namespace tactic::eval
