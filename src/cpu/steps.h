// The steps on the CPU: Highway for every instruction set, chosen at run time; f32 accumulation throughout.
#pragma once

#include "core/drawn_variance.h"
#include "core/steps.h"

namespace tactic::cpu {

/// k-means of the rows of one segment and head. Deterministic for a seed, whatever num_threads (0: OpenMP's default).
void cluster(const ClusterTask& task, int32_t num_threads, HeadClusters& out);

/// dots[g, c] = q[g].centroid_c of clusters [begin, end) (multiples of kCentroidBlock) in the padded numbering.
/// q: [group_size, head_dim], already scaled by sm_scale. Fills dots, spreads and sizes of those clusters.
void score(const IndexState& index, int32_t head, const RowFilter& filter, const float* q, int32_t group_size,
           int32_t begin, int32_t end, ClusterScores& out);

/// Inclusion probability of every cluster's members (docs/method.md 3).
void select_sample(const ClusterScores& scores, const SelectParams& params, const DecodeOptions& options,
                   Inclusion& out);

/// Draws rows with those probabilities by systematic sampling, segment by segment; offset in [0, 1). `undrawn`: as
/// undrawn_rows() has it before anything is read.
void draw(const IndexState& index, int32_t head, const RowFilter& filter, const ClusterScores& scores,
          const Inclusion& inclusion, double offset, HeadSelection& out, Undrawn& undrawn);

/// The best-ranked clusters of each query head up to `budget` tokens, and the union over the group.
void select_topk(const IndexState& index, int32_t head, const RowFilter& filter, const ClusterScores& scores,
                 int32_t group_size, int32_t budget, HeadSelection& out);

/// The paper's selection (section 4): rank, fit a/x + b through two windows, read up to target_mass. Returns the K rows
/// probed. `exact`: [group_size] softmax state of the rows read anyway.
int64_t select_fit(const IndexState& index, int32_t head, const RowFilter& filter, const ClusterScores& scores,
                   const RowsView& k, const float* q, int32_t head_dim, int32_t group_size, const SoftmaxState* exact,
                   float target_mass, HeadSelection& out);

/// scores[g * stride + i] = q[g].k_row(tokens[i]). `v`: rows that will be read next, fetched into the cache meanwhile.
void attend_scores(const RowsView& k, int32_t head, const int32_t* tokens, int64_t num_tokens, const float* q,
                   int32_t head_dim, int32_t group_size, float* scores, int64_t stride, const RowsView* v = nullptr,
                   int32_t v_head_dim = 0);

/// out[g, :] += sum_i weights[g * stride + i] * v_row(tokens[i]).  out: [group_size, v_head_dim].
void attend_values(const RowsView& v, int32_t head, const int32_t* tokens, int64_t num_tokens, const float* weights,
                   int64_t stride, int32_t v_head_dim, int32_t group_size, float* out);

/// weights[i] = exp(scores[i] - max) for i < num; returns their sum. NaN stays NaN.
float exp_weights(const float* scores, int64_t num, float max, float* weights);

/// weights[i] = exp(scores[i] + log_weights[i] - max), log_weights being negative logarithms of probabilities. Appends
/// them to `sums`. Returns the largest, 0 for none.
float sampled_weights(const float* scores, const float* log_weights, int64_t num, float max, float* weights,
                      DrawnSums& sums);

/// Largest score, -infinity for none; NaN if any is NaN.
float max_score(const float* scores, int64_t num);

/// The largest of `floor` and the dots of clusters whose size is not 0; NaN if any of those is not finite. `num`: a
/// multiple of kCentroidBlock.
float max_used(const float* dots, const float* sizes, int64_t num, float floor);

/// found[] = the places of weights above `limit`, ascending; returns how many. `found`: room for `num`.
int64_t heavier(const float* weights, int64_t num, float limit, int32_t* found);

}  // namespace tactic::cpu
