// The state of one (query, KV head) during a decode step: filled phase by phase, memory kept between steps.
#pragma once

#include <algorithm>
#include <vector>

#include "core/drawn_variance.h"
#include "core/expected_rows.h"
#include "core/read_on.h"
#include "core/steps.h"

namespace tactic::cpu {

/// Rows to read, their scores and their weights relative to the task's state, both [group_size, stride].
struct RowList {
  std::vector<int32_t> tokens;
  std::vector<float> scores, weights;
  int64_t stride = 0;

  int64_t size() const { return static_cast<int64_t>(tokens.size()); }
  void reserve_scores(int32_t group_size) {
    stride = (size() + 15) / 16 * 16;
    scores.resize(static_cast<size_t>(stride) * static_cast<size_t>(group_size));
    weights.resize(scores.size());
  }
  float* scores_of(int32_t g) { return scores.data() + g * stride; }
  float* weights_of(int32_t g) { return weights.data() + g * stride; }
};

/// What is known of the weights of selected rows.
struct WeightSums {
  double certain = 0;
  DrawnSums drawn;
  float largest_drawn = 0;

  /// Those of the rows that come next.
  void append(const WeightSums& next) {
    certain += next.certain;
    drawn.append(next.drawn);
    largest_drawn = std::max(largest_drawn, next.largest_drawn);
  }
};

struct Task {
  const DecodeQuery* query = nullptr;
  int32_t query_number = 0;
  int32_t head = 0;
  int32_t group_size = 0;
  RowFilter filter;
  bool sparse = false;
  bool again = false;           // done anew: q is here, and where it was the answers of other heads may lie by now
  std::vector<float> q;         // [group_size, head_dim] scaled by sm_scale
  std::vector<float> q_norms2;  // [group_size]
  RowList exact;  // sinks, recent and rewritten rows, what is not finite, expected rows; every visible one when dense
  std::vector<int32_t> expected;  // indexed rows among `exact` that stand in clusters, ascending
  ClusterScores clusters;
  Inclusion inclusion;
  HeadSelection selection;
  Undrawn undrawn;                        // by the draw
  RowList selected;                       // the selection's rows; log weights in `selection`
  RowList refined;                        // rows added by refinement
  std::vector<int32_t> refined_from;      // the cluster of each of those
  RowList corrected;                      // selected rows whose weights changed after their values were added: by what
  std::vector<SoftmaxState> exact_state;  // [group_size]
  std::vector<SoftmaxState> state;        // [group_size] over everything read; max is that of the exact rows and of the
                                          // estimates, so that rows are weighed as soon as they are scored
  std::vector<HeadMass> masses;           // [group_size] of the certain rows
  std::vector<double> independent_variance;  // [group_size] of all weights, relative, had the draws been independent
  std::vector<Reading> readings;             // [num_clusters]
  std::vector<double> certain, drawn;        // [group_size] sums of weights: of all certain rows, of all others
  std::vector<int64_t> certain_since;        // places among the selected rows of those drawn that are certain now
  std::vector<DrawnSums> draws;              // [group_size] as drawn, of those too
  std::vector<float> drawn_weights;          // [group_size, draws] likewise, kept for steps that promise a mass
  bool silenced = false;                     // some clusters that were drawn from do not speak any more
  std::vector<double> relative_variance;     // [group_size] of the draw, 0: unknown
  std::vector<float> changes;                // [corrected rows, group_size] of their weights
  Sinks sinks;
  std::vector<float> sink_sums;  // [group_size] their part of exact_state's sums
  std::vector<float> heavy;      // [group_size] weight from which on a drawn row refines its cluster
  float beta = 0;
  double variance_ratio = 1;  // that the prediction was made with
  int64_t refined_clusters = 0, probed = 0;
  bool changed = false, not_finite = false;
  bool late_changed = false;  // among the rows added by refinement, which the step's other heads need not know of

  int32_t head_dim() const { return query->kv.head_dim; }
  int32_t v_head_dim() const { return query->kv.v_head_dim; }
};

/// The queries, states and rows of a task that has its query, head and filter. `recent`: visible rows that are not
/// indexed, or all visible ones of a dense task.
void begin_task(Task& task, const std::vector<int32_t>& recent);

/// Exact rows are scored: choose the other rows to read.
void select_rows(Task& task, const DecodeOptions& options);

/// Turns the scores of selected rows [begin, end) into weights and adds them up: sums [group_size].
void weigh_rows(Task& task, int64_t begin, int64_t end, WeightSums* sums);

/// Whether a drawn row among those of `sums` [group_size] is too heavy to be a sample.
bool draws_too_heavy(const Task& task, const WeightSums* sums);

/// The first of the selected rows [begin, end) that was drawn and is too heavy to be a sample in some head, or `end`:
/// its value is not added, since its cluster will be read whole.
int64_t next_heavy(const Task& task, int64_t begin, int64_t end);

/// All rows are weighed, `sums` [group_size] over all of them: refines clusters that were underestimated, sets the
/// state and the mass. A row that outweighs every estimate beyond the range of f32 counts as not finite.
void settle_weights(Task& task, const DecodeOptions& options, const WeightSums* sums);

/// Head g's state from the sums of weights. Returns the total, or 0 when it is out of range.
double settle_head(Task& task, int32_t g);

/// Reads the clusters of which a sampled row speaks for too large a share in any head: they were underestimated.
void refine(Task& task);

/// Clusters of these numbers, ascending, are read whole: those of their rows that were drawn lose their weights, the
/// others are added.
void read_whole(Task& task, const std::vector<int32_t>& numbers);

/// The masses as the draws that speak measure them, and how sure they are. `alone`: as in speaks(), to decide by, for
/// which what is usual stays as it is (docs/method.md, verified mass). `first`: what steps find usual is to learn of
/// it.
std::vector<HeadMass> measure(Task& task, bool alone, bool first);

/// Reads on until every head has the mass for certain, by what the draws of clusters not read whole say of the rest.
void reach_mass(Task& task, float target_mass);

/// Compares the check values of rows [begin, end) of a list of rows that stand in clusters.
bool rows_unchanged(const Task& task, const RowList& list, int64_t begin, int64_t end);

/// Before the first of the step's tasks with this index and head learns: what the step before expected is past.
void forget_expected(Task& task, const DecodeOptions& options);

/// What the step learned goes into the index, for later steps (learn.cc). One thread at a time for one index and head.
void learn(Task& task, const DecodeOptions& options);

/// Masses, rows and figures of the head, as far as the query asks for them. Its selection has room for all heads.
void report(const Task& task);

void add_stats(const Task& task, StepStats& stats);

}  // namespace tactic::cpu
