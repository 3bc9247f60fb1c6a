// The specification in code: the same steps in double precision, plain loops, one thread.
#pragma once

#include "core/steps.h"

namespace tactic::reference {

/// The decoded element of a stored row.
double element(DType dtype, const std::byte* row, int64_t i);

/// One pass of k-means on doubles with the same initial keys and the same tie rules as every backend.
void cluster(const ClusterTask& task, HeadClusters& out);

/// As cpu::score, for all clusters.
void score(const IndexState& index, int32_t head, const RowFilter& filter, const float* q, int32_t group_size, ClusterScores& out);

void select_sample(const ClusterScores& scores, const SelectParams& params, const DecodeOptions& options, Inclusion& out);

void draw(const IndexState& index, int32_t head, const RowFilter& filter, const ClusterScores& scores,
          const Inclusion& inclusion, double offset, HeadSelection& out);

void select_topk(const IndexState& index, int32_t head, const RowFilter& filter, const ClusterScores& scores,
                 int32_t group_size, int32_t budget, HeadSelection& out);

int64_t select_fit(const IndexState& index, int32_t head, const RowFilter& filter, const ClusterScores& scores,
                   const RowsView& k, const float* q, int32_t head_dim, int32_t group_size, const SoftmaxState* exact,
                   float target_mass, HeadSelection& out);

/// Attention of one KV head's group over `selection`: out [group_size, v_head_dim], lse [group_size] (natural log).
/// q: [group_size, head_dim] scaled by sm_scale.
void attend(const KvView& kv, int32_t head, const HeadSelection& selection, const float* q, int32_t group_size,
            double* out, double* lse);

/// Attention over every visible row, bias added where given.
void dense(const DecodeQuery& query, int32_t head, double* out, double* lse);

}  // namespace tactic::reference
