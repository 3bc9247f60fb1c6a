#include "cpu/task.h"

#include <algorithm>
#include <cmath>

#include "core/expected_rows.h"
#include "core/random.h"
#include "cpu/steps.h"

namespace tactic::cpu {

void begin_task(Task& task, const std::vector<int32_t>& recent) {
  const DecodeQuery& query = *task.query;
  const int32_t head = task.head;
  task.group_size = query.num_q_heads / query.kv.num_kv_heads;
  task.refined_clusters = task.probed = 0;
  task.beta = task.inclusion.tau = 0;
  task.changed = task.late_changed = task.not_finite = task.silenced = false;
  const auto dim = static_cast<size_t>(query.kv.head_dim), group = static_cast<size_t>(task.group_size);
  task.q.resize(group * dim);
  if (!task.again) task.q_norms2.assign(group, 0);
  task.exact_state.assign(group, {});
  task.state.assign(group, {});
  task.masses.assign(group, {});
  task.independent_variance.assign(group, 0);
  task.certain.assign(group, 0);
  task.drawn.assign(group, 0);
  task.draws.assign(group, {});
  task.relative_variance.assign(group, 0);
  for (size_t g = 0; g < group && !task.again; ++g) {
    const float* q = query.q + (head * task.group_size + static_cast<int64_t>(g)) * query.q_head_stride;
    for (size_t d = 0; d < dim; ++d) {
      const float value = q[d] * query.sm_scale;
      task.q[g * dim + d] = value;
      task.q_norms2[g] += value * value;
    }
  }
  task.exact.tokens.assign(recent.begin(), recent.end());
  task.selection.clear();
  task.selected.tokens.clear();
  task.refined.tokens.clear();
  task.refined_from.clear();
  task.corrected.tokens.clear();
  task.changes.clear();
  task.certain_since.clear();
  task.expected.clear();
  if (!task.sparse) return;
  const IndexState& index = query.index->state();
  for (const Segment& segment : index.segments) {
    for (const uint16_t place : segment.heads[static_cast<size_t>(head)].not_finite) {
      const int64_t row = segment.row_begin + place;
      if (task.filter.reads_indexed(row)) task.exact.tokens.push_back(static_cast<int32_t>(row));
    }
  }
  expected_rows(index, head, task.filter, {query.likely_rows, static_cast<size_t>(query.num_likely_rows)},
                task.expected);
  task.exact.tokens.insert(task.exact.tokens.end(), task.expected.begin(), task.expected.end());
  task.exact.reserve_scores(task.group_size);
  const auto clusters = static_cast<size_t>(index.total_clusters());
  task.clusters.num_clusters = static_cast<int32_t>(clusters);
  task.clusters.dots.resize(group * clusters);
  task.clusters.spreads.resize(clusters);
  task.clusters.sizes.resize(clusters);
}

namespace {

// The sinks' part of the exact rows' weights, by head.
void weigh_sinks(Task& task) {
  const std::vector<int32_t>& rows = task.sinks.rows;
  task.sink_sums.assign(static_cast<size_t>(task.group_size), 0.0f);
  for (int64_t i = 0; i < task.exact.size() && !rows.empty(); ++i) {
    const int32_t row = task.exact.tokens[static_cast<size_t>(i)];
    if (row > rows.back() || !std::binary_search(rows.begin(), rows.end(), row)) continue;
    for (int32_t g = 0; g < task.group_size; ++g) task.sink_sums[static_cast<size_t>(g)] += task.exact.weights_of(g)[i];
  }
}

}  // namespace

void select_rows(Task& task, const DecodeOptions& options) {
  for (int32_t g = 0; g < task.group_size; ++g) {
    SoftmaxState& state = task.exact_state[static_cast<size_t>(g)];
    if (task.exact.size() == 0) continue;
    state.max = max_score(task.exact.scores_of(g), task.exact.size());
    if (!std::isfinite(state.max)) {
      task.not_finite = true;
      return;
    }
    state.sum = exp_weights(task.exact.scores_of(g), task.exact.size(), state.max, task.exact.weights_of(g));
  }
  IndexState& index = task.query->index->state();
  const Calibration& known = index.calibration[static_cast<size_t>(task.head)];
  switch (options.select) {
    case Select::kSample: {
      task.sinks = counted_sinks(index, task.head, task.filter);
      weigh_sinks(task);
      SelectParams params;
      params.group_size = task.group_size;
      params.q_norms2 = task.q_norms2.data();
      params.exact = task.exact_state.data();
      task.beta = params.beta = options.beta > 0 ? options.beta : known.beta();
      params.variance_ratio = static_cast<float>(task.variance_ratio = known.variance_ratio);
      params.tau_factor = task.query->tau_factor;
      params.sinks = task.sink_sums.data();
      params.sink_clusters = task.sinks.clusters;
      select_sample(task.clusters, params, options, task.inclusion);
      draw(index, task.head, task.filter, task.clusters, task.inclusion,
           random_offset(*task.query, task.head, options.seed), task.selection, task.undrawn);
      break;
    }
    case Select::kTopK:
      select_topk(index, task.head, task.filter, task.clusters, task.group_size, options.budget, task.selection);
      break;
    case Select::kFit:
      task.probed =
          select_fit(index, task.head, task.filter, task.clusters, task.query->kv.k, task.q.data(), task.head_dim(),
                     task.group_size, task.exact_state.data(), fit_mass(options), task.selection);
      break;
    case Select::kDense: break;
  }
  leave_out(task.expected, task.selection);
  task.selected.tokens.assign(task.selection.tokens.begin(), task.selection.tokens.end());
  task.selected.reserve_scores(task.group_size);
  task.refined.reserve_scores(task.group_size);
  for (int32_t g = 0; g < task.group_size; ++g) {
    const float* dots =
        task.clusters.dots.data() + static_cast<size_t>(g) * static_cast<size_t>(task.clusters.num_clusters);
    SoftmaxState& exact = task.exact_state[static_cast<size_t>(g)];
    const float max = max_used(dots, task.clusters.sizes.data(), task.clusters.num_clusters, exact.max);
    task.not_finite = task.not_finite || !std::isfinite(max);
    if (max == exact.max) continue;  // the usual case: a sink has the largest score
    exact.sum = exp_weights(task.exact.scores_of(g), task.exact.size(), max, task.exact.weights_of(g));
    exact.max = max;
  }
  if (options.select != Select::kSample) return;
  task.heavy.resize(task.exact_state.size());
  for (size_t g = 0; g < task.heavy.size(); ++g)
    task.heavy[g] =
        refine_limit(options, task.inclusion, g) * std::exp(task.inclusion.log_totals[g] - task.exact_state[g].max);
}

namespace {

// `changes`, row by row, as weights of the corrected rows.
void list_changes(Task& task) {
  task.corrected.reserve_scores(task.group_size);
  auto change = task.changes.begin();
  for (int64_t i = 0; i < task.corrected.size(); ++i) {
    for (int32_t g = 0; g < task.group_size; ++g) task.corrected.weights_of(g)[i] = *change++;
  }
}

}  // namespace

double settle_head(Task& task, int32_t g) {
  const double total = task.certain[static_cast<size_t>(g)] + task.drawn[static_cast<size_t>(g)];
  if (!(total > 1e-20 && total < 1e30)) task.not_finite = true;
  task.state[static_cast<size_t>(g)] = {task.exact_state[static_cast<size_t>(g)].max, static_cast<float>(total)};
  return task.not_finite ? 0 : total;
}

void weigh_rows(Task& task, int64_t begin, int64_t end, WeightSums* sums) {
  const HeadSelection& selection = task.selection;
  const int64_t middle = std::clamp(selection.num_certain, begin, end);
  for (int32_t g = 0; g < task.group_size; ++g) {
    const float max = task.exact_state[static_cast<size_t>(g)].max;
    const float* scores = task.selected.scores_of(g);
    float* weights = task.selected.weights_of(g);
    sums[g].certain += exp_weights(scores + begin, middle - begin, max, weights + begin);
    sums[g].largest_drawn =
        std::max(sums[g].largest_drawn, sampled_weights(scores + middle, selection.log_weights.data() + middle,
                                                        end - middle, max, weights + middle, sums[g].drawn));
  }
}

void settle_weights(Task& task, const DecodeOptions& options, const WeightSums* sums) {
  const bool sample = options.select == Select::kSample;
  for (int32_t g = 0; g < task.group_size; ++g) {
    const auto head = static_cast<size_t>(g);
    task.certain[head] = task.exact_state[head].sum + sums[g].certain;
    task.drawn[head] = sums[g].drawn.sum;
    task.draws[head] = sums[g].drawn;
    const double total = settle_head(task, g);
    task.independent_variance[head] = sums[g].drawn.independent / (total * total);
  }
  if (task.not_finite || !sample) return;
  task.readings.resize(task.inclusion.probability.size());
  for (size_t c = 0; c < task.readings.size(); ++c)
    task.readings[c] = task.inclusion.probability[c] >= 1 ? Reading::kWhole : Reading::kDrawn;
  task.drawn_weights.clear();
  for (int32_t g = 0; g < task.group_size && options.target_mass > 0; ++g) {
    const float* weights = task.selected.weights_of(g);
    task.drawn_weights.insert(task.drawn_weights.end(), weights + task.selection.num_certain,
                              weights + task.selected.size());
  }
  if (draws_too_heavy(task, sums)) refine(task);
  task.masses = measure(task, false, true);
  if (options.target_mass > 0) reach_mass(task, options.target_mass);
  list_changes(task);
}

}  // namespace tactic::cpu
