// The specification in code: the same steps in double precision, plain loops, one thread.
#pragma once

#include "core/read_on.h"
#include "core/steps.h"

namespace tactic::reference {

/// Element i of a stored row. Every stored value is a double exactly.
double element(DType dtype, const std::byte* row, int64_t i);

/// q.k of a stored row.
double dot_row(const RowsView& rows, int32_t head, int64_t row, const float* q, int32_t head_dim);

/// k-means on doubles, with the same initial keys and tie rules as every backend, over all rows but the outliers, which
/// are the last clusters. Rows whose squared key or value norm is not finite in f32 are in none.
void cluster(const ClusterTask& task, HeadClusters& out);

/// Every row the query may read through the index, by cluster number, all certain.
HeadSelection readable(const IndexState& index, int32_t head, const RowFilter& filter);

/// As cpu::score, for all clusters. Padding has size 0 and dot 0.
void score(const IndexState& index, int32_t head, const RowFilter& filter, const float* q, int32_t group_size,
           ClusterScores& out);

/// Inclusion probabilities. With s = sqrt(spread) * |q| a cluster's scores spread by s around the centroid's, so a
/// member's mean weight is exp(dot + beta * g(s)) and its root mean square exp(dot + 2 beta * g(s)), normalized by the
/// estimate of everything. g(s) = s^2 / 2 up to s = sqrt(2 ln size), linear beyond: members cannot
/// average more than their maximum. An estimate that is not finite makes every probability 1.
void select_sample(const ClusterScores& scores, const SelectParams& params, const DecodeOptions& options,
                   Inclusion& out);

/// Clusters of probability 1 first, then the others; in both parts by cluster number.
void draw(const IndexState& index, int32_t head, const RowFilter& filter, const ClusterScores& scores,
          const Inclusion& inclusion, double offset, HeadSelection& out);

/// Positions in `all` by falling dot of their clusters, [num_clusters]; equal ones by cluster number.
std::vector<size_t> rank(const HeadSelection& all, const float* dots);

/// `all` without those that are not kept.
void keep(const HeadSelection& all, const std::vector<bool>& kept, HeadSelection& out);

/// Each query head takes clusters by falling dot (ties: lower number) until it has `budget` tokens, of the last cluster
/// the first members. The union is in order of cluster number.
void select_topk(const IndexState& index, int32_t head, const RowFilter& filter, const ClusterScores& scores,
                 int32_t group_size, int32_t budget, HeadSelection& out);

/// With n readable tokens in the order of their clusters' dots: the first max(16, n / 50) are scored, and windows of
/// max(8, n / 100) around n / 10 and 6 n / 10; y = a / x + b goes through the windows' mean weights, x counting from 1
/// at the windows' middles. Should the far window be heavier, a = 0 and b = the mean of both. Below 256 tokens all are
/// scored. A sum that is not finite, or target_mass 1, takes everything. The union is in order of cluster number.
/// Returns the rows probed, each once however many heads did.
int64_t select_fit(const IndexState& index, int32_t head, const RowFilter& filter, const ClusterScores& scores,
                   const RowsView& k, const float* q, int32_t head_dim, int32_t group_size, const SoftmaxState* exact,
                   float target_mass, HeadSelection& out);

/// Clusters with a sampled token that stands for more than refine_limit() of the estimated total, in any head, are read
/// whole: the readable members join the certain tokens and those drawn lose their weight. Returns how many clusters.
int64_t refine(const IndexState& index, int32_t head, const RowFilter& filter, const RowsView& k, const float* q,
               int32_t head_dim, int32_t group_size, const Inclusion& inclusion, const DecodeOptions& options,
               HeadSelection& selection);

/// Those clusters are read whole: as in refine.
void read_whole(const IndexState& index, int32_t head, const RowFilter& filter, const std::vector<int32_t>& clusters,
                HeadSelection& selection);

/// Whether all rows of a selection are those that were clustered, by their check values.
bool rows_unchanged(const IndexState& index, const KvView& kv, int32_t head, const HeadSelection& selection);

/// What the draw says of the mass read with certainty, masses [group_size]. `anyway`: rows read anyway. `drawn`: the
/// selection before any cluster was read whole because of it. `readings`: of every cluster by now. `alone`: as in
/// speaks(), to decide by, for which what is usual stays as it is.
void measure(const IndexState& index, const RowsView& k, int32_t head, const HeadSelection& anyway,
             const HeadSelection& drawn, const HeadSelection& selection, const Inclusion& inclusion,
             const std::vector<Reading>& readings, bool alone, const std::vector<float>& sizes, const float* q,
             int32_t dim, std::vector<HeadMass>& masses);

/// Attention of one KV head's group over `selection`: out [group_size, v_head_dim], lse [group_size] (natural log).
/// q: [group_size, head_dim] scaled by sm_scale.
void attend(const KvView& kv, int32_t head, const HeadSelection& selection, const float* q, int32_t group_size,
            double* out, double* lse);

/// Attention over every visible row, bias added where given; a bias of -infinity hides the row.
void dense(const DecodeQuery& query, int32_t head, double* out, double* lse);

}  // namespace tactic::reference
