// One decode step: rows that are read anyway, scores, selection, attention; dense when that is asked for or must be.
#include <algorithm>
#include <cmath>

#include "core/backend.h"
#include "core/expected_rows.h"
#include "core/random.h"
#include "reference/steps.h"

namespace tactic {
namespace reference {
namespace {

// Row numbers read whatever the selection: not in the index, or not finite.
HeadSelection rows_read_anyway(const IndexState& index, int32_t head, const RowFilter& filter) {
  HeadSelection rows;
  for (int64_t row = 0; row < filter.kv_len; ++row) {
    if (filter.reads_exact(row)) rows.tokens.push_back(static_cast<int32_t>(row));
  }
  for (const Segment& segment : index.segments) {
    for (const int64_t place : segment.heads[head].not_finite) {
      if (filter.reads_indexed(segment.row_begin + place))
        rows.tokens.push_back(static_cast<int32_t>(segment.row_begin + place));
    }
  }
  rows.log_weights.assign(rows.tokens.size(), 0.0f);
  return rows;
}

// Adds to `stats` (mass_std_error as a variance). Returns why the head cannot be answered so, if it cannot.
DenseReason sparse(const DecodeQuery& query, int32_t head, const RowFilter& filter, const DecodeOptions& options,
                   double* out, double* lse, StepStats& stats) {
  const KvView& kv = query.kv;
  const IndexState& index = query.index->state();
  const int32_t group_size = query.num_q_heads / kv.num_kv_heads, dim = kv.head_dim;
  HeadSelection all = rows_read_anyway(index, head, filter), selection;
  std::vector<int32_t> expected;
  expected_rows(index, head, filter, {query.likely_rows, static_cast<size_t>(query.num_likely_rows)}, expected);
  all.tokens.insert(all.tokens.end(), expected.begin(), expected.end());
  all.log_weights.resize(all.tokens.size(), 0.0f);
  std::vector<float> q(static_cast<size_t>(group_size) * dim), q_norms2(group_size);
  std::vector<SoftmaxState> exact(group_size);
  const Sinks sinks = counted_sinks(index, head, filter);
  std::vector<float> sink_sums(group_size);
  for (int32_t g = 0; g < group_size; ++g) {
    for (int32_t d = 0; d < dim; ++d) {
      q[g * dim + d] = query.sm_scale * query.q[(head * group_size + g) * query.q_head_stride + d];
      q_norms2[g] += q[g * dim + d] * q[g * dim + d];
    }
    double sum = 0, max = -HUGE_VAL;
    for (const int32_t row : all.tokens) max = std::max(max, dot_row(kv.k, head, row, &q[g * dim], dim));
    double of_sinks = 0;
    for (const int32_t row : all.tokens) {
      const double weight = std::exp(dot_row(kv.k, head, row, &q[g * dim], dim) - max);
      sum += weight;
      if (std::binary_search(sinks.rows.begin(), sinks.rows.end(), row)) of_sinks += weight;
    }
    sink_sums[g] = static_cast<float>(of_sinks);
    exact[g] = {static_cast<float>(max), static_cast<float>(sum)};
    if (!std::isfinite(sum)) return DenseReason::kNotFinite;
  }

  ClusterScores scores;
  score(index, head, filter, q.data(), group_size, scores);
  int64_t probed = 0;
  Inclusion inclusion;
  const Calibration& known = index.calibration[head];
  const float beta = options.beta > 0 ? options.beta : known.beta();
  const SelectParams params{
      group_size,       q_norms2.data(),  exact.data(),  beta, static_cast<float>(known.variance_ratio),
      query.tau_factor, sink_sums.data(), sinks.clusters};
  if (options.select == Select::kSample) {
    select_sample(scores, params, options, inclusion);
    draw(index, head, filter, scores, inclusion, random_offset(query, head, options.seed), selection);
  } else if (options.select == Select::kTopK) {
    select_topk(index, head, filter, scores, group_size, options.budget, selection);
  } else {
    probed = select_fit(index, head, filter, scores, kv.k, q.data(), dim, group_size, exact.data(), fit_mass(options),
                        selection);
  }
  leave_out(expected, selection);
  if (options.check_rows && !rows_unchanged(index, kv, head, selection)) return DenseReason::kRowChanged;
  std::vector<HeadMass> masses(group_size);
  if (options.select == Select::kSample) {
    const HeadSelection drawn = selection;
    stats.refined_clusters +=
        refine(index, head, filter, kv.k, q.data(), dim, group_size, inclusion, options, selection);
    leave_out(expected, selection);
    std::vector<Reading> readings(inclusion.probability.size(), Reading::kDrawn);
    for (int64_t i = 0; i < selection.num_certain; ++i) readings[selection.clusters[i]] = Reading::kRefined;
    for (size_t c = 0; c < readings.size(); ++c) {
      if (inclusion.probability[c] >= 1) readings[c] = Reading::kWhole;
    }
    const auto measured = [&](bool alone) {
      std::vector<HeadMass> result(group_size);
      measure(index, kv.k, head, all, drawn, selection, inclusion, readings, alone, scores.sizes, q.data(), dim,
              result);
      return result;
    };
    while (options.target_mass > 0) {
      const NextClusters next = read_on(scores, params, readings, measured(true), options.target_mass);
      if (next.read.empty()) break;
      for (const int32_t c : next.read) readings[c] = Reading::kWhole;
      for (const int32_t c : next.silent) readings[c] = Reading::kWhole;
      read_whole(index, head, filter, next.read, selection);
      leave_out(expected, selection);
    }
    masses = measured(false);
    if (options.check_rows && !rows_unchanged(index, kv, head, selection))
      return DenseReason::kRowChanged;  // added ones too
  }
  const size_t num_sampled = selection.tokens.size() - selection.num_certain, num_selected = selection.tokens.size();
  if (query.selection != nullptr) {
    HeadSelection& seen = query.selection->heads[head];
    seen = all;
    seen.clusters.assign(all.tokens.size(), -1);
    seen.num_certain = static_cast<int64_t>(all.tokens.size()) + selection.num_certain;
    seen.tokens.insert(seen.tokens.end(), selection.tokens.begin(), selection.tokens.end());
    seen.log_weights.insert(seen.log_weights.end(), selection.log_weights.begin(), selection.log_weights.end());
    seen.clusters.insert(seen.clusters.end(), selection.clusters.begin(), selection.clusters.end());
  }
  all.tokens.insert(all.tokens.end(), selection.tokens.begin(), selection.tokens.end());
  all.log_weights.insert(all.log_weights.end(), selection.log_weights.begin(), selection.log_weights.end());
  attend(kv, head, all, q.data(), group_size, out, lse);
  for (int32_t g = 0; g < group_size; ++g) {
    if (!std::isfinite(lse[g])) return DenseReason::kNotFinite;
    stats.estimated_mass += masses[g].mass / query.num_q_heads;
    stats.mass_std_error +=
        masses[g].std_error * masses[g].std_error / query.num_q_heads;  // a variance until the sum is done
    if (query.masses != nullptr)
      query.masses[head * group_size + g] = {masses[g].mass, masses[g].std_error, mass_bound(masses[g], kNormal95),
                                             mass_bound(masses[g], -kNormal95)};
  }
  stats.tokens_certain += static_cast<int64_t>(all.tokens.size() - num_sampled);
  stats.tokens_sampled += static_cast<int64_t>(num_sampled);
  stats.kv_bytes += probed * static_cast<int64_t>(row_bytes(kv.k.dtype, dim));
  for (const Segment& segment : index.segments)
    stats.index_bytes += int64_t{segment.num_clusters} * (dim + 10) + dim * 4;
  stats.index_bytes += static_cast<int64_t>(num_selected) * 3;
  return DenseReason::kNone;
}

StepStats run(const DecodeQuery& query, const DecodeOptions& options) {
  const KvView& kv = query.kv;
  const int32_t group_size = query.num_q_heads / kv.num_kv_heads;
  const RowBits none;
  const RowFilter filter{query.visible, kv.kv_len, query.index != nullptr ? &query.index->state().indexed : &none};
  const auto bytes = static_cast<int64_t>(row_bytes(kv.k.dtype, kv.head_dim) + row_bytes(kv.v.dtype, kv.v_head_dim));
  StepStats stats;
  stats.kv_len = filter.count_visible(0, kv.kv_len);
  stats.num_kv_heads = kv.num_kv_heads;
  stats.kv_bytes_present = stats.kv_len * kv.num_kv_heads * bytes;
  DenseReason reason = options.select == Select::kDense                       ? DenseReason::kAsked
                       : query.bias != nullptr                                ? DenseReason::kMask
                       : filter.count_indexed(0, kv.kv_len) < kMinIndexedRows ? DenseReason::kNoIndex
                                                                              : DenseReason::kNone;
  std::vector<double> out(static_cast<size_t>(query.num_q_heads) * kv.v_head_dim), lse(query.num_q_heads);
  const auto out_of = [&](int32_t head) { return &out[static_cast<size_t>(head * group_size) * kv.v_head_dim]; };
  const StepStats before = stats;
  if (query.selection != nullptr) query.selection->heads.resize(kv.num_kv_heads);
  for (int32_t head = 0; head < kv.num_kv_heads && reason == DenseReason::kNone; ++head) {
    reason = sparse(query, head, filter, options, out_of(head), &lse[head * group_size], stats);
  }
  if (reason != DenseReason::kNone) {
    stats = before;
    stats.dense = reason;
    stats.estimated_mass = 1;
    for (int64_t row = 0; row < kv.kv_len; ++row) {
      const bool read = filter.is_visible(row) && (query.bias == nullptr || query.bias[row] != -HUGE_VALF);
      stats.tokens_certain += read ? kv.num_kv_heads : 0;
    }
    for (int32_t head = 0; head < kv.num_kv_heads; ++head) {
      dense(query, head, out_of(head), &lse[head * group_size]);
      if (query.selection == nullptr) continue;
      HeadSelection& seen = query.selection->heads[head] =
          rows_read_anyway({}, head, {filter.visible, filter.kv_len, &none});
      std::erase_if(seen.tokens, [&](int32_t row) { return query.bias != nullptr && query.bias[row] == -HUGE_VALF; });
      seen.num_certain = static_cast<int64_t>(seen.tokens.size());
      seen.log_weights.assign(seen.tokens.size(), 0.0f);
      seen.clusters.assign(seen.tokens.size(), -1);
    }
    if (query.masses != nullptr) std::fill_n(query.masses, query.num_q_heads, MassEstimate{});
  }
  stats.mass_std_error = std::sqrt(stats.mass_std_error);
  stats.tokens_value = stats.tokens_certain + stats.tokens_sampled;
  stats.kv_bytes += stats.tokens_value * bytes;
  for (int32_t h = 0; h < query.num_q_heads; ++h) {
    const double* from = &out[static_cast<size_t>(h) * kv.v_head_dim];
    std::transform(from, from + kv.v_head_dim, query.out + h * query.out_head_stride,
                   [](double x) { return static_cast<float>(x); });
    if (query.lse != nullptr) query.lse[h] = static_cast<float>(lse[h]);
  }
  return stats;
}

}  // namespace
}  // namespace reference

std::unique_ptr<BackendRun> make_reference_run() {
  struct ReferenceRun : BackendRun {  // reads what the index has learned, learns nothing
    void run(std::span<const DecodeQuery> queries, const DecodeOptions& options, int32_t, StepStats* stats) override {
      for (size_t i = 0; i < queries.size(); ++i) {
        const StepStats result = reference::run(queries[i], options);
        if (stats != nullptr) stats[i] = result;
      }
    }
  };
  return std::make_unique<ReferenceRun>();
}

}  // namespace tactic
