#include "cpu/task.h"

#include <algorithm>
#include <cmath>

#include "core/random.h"
#include "cpu/steps.h"

namespace tactic::cpu {

namespace {

// The weight that measured pairs must reach before they outvote the starting value.
constexpr double kPriorWeight = 20;
constexpr double kPriorSlope = 0.75;
constexpr double kForget = 0.98;

// The spread term, as in select_sample.
double growth(double s2, int64_t size) {
  const double cap2 = 2 * std::log(static_cast<double>(std::max<int64_t>(size, 2)));
  return s2 <= cap2 ? s2 / 2 : std::sqrt(cap2 * s2) - cap2 / 2;
}

const Segment* find_segment(const IndexState& index, int64_t row) {
  auto at = std::upper_bound(index.segments.begin(), index.segments.end(), row,
                             [](int64_t r, const Segment& segment) { return r < segment.row_begin; });
  return at == index.segments.begin() ? nullptr : &*std::prev(at);
}

}  // namespace

void begin_task(Task& task, const DecodeQuery& query, int32_t query_number, int32_t head, const std::vector<int32_t>& recent) {
  task.query = &query;
  task.query_number = query_number;
  task.head = head;
  task.group_size = query.num_q_heads / query.kv.num_kv_heads;
  task.refined_clusters = task.probed = 0;
  task.changed = task.not_finite = false;
  const auto dim = static_cast<size_t>(query.kv.head_dim), group = static_cast<size_t>(task.group_size);
  task.q.resize(group * dim);
  task.q_norms2.assign(group, 0);
  task.exact_state.assign(group, {});
  task.state.assign(group, {});
  task.certain_mass.assign(group, 1);
  task.variance.assign(group, 0);
  for (size_t g = 0; g < group; ++g) {
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
  if (!task.sparse) return;
  const IndexState& index = query.index->state();
  for (const Segment& segment : index.segments) {
    for (const uint16_t outlier : segment.heads[static_cast<size_t>(head)].outliers) {
      const int64_t row = segment.row_begin + outlier;
      if (task.filter.reads_indexed(row)) task.exact.tokens.push_back(static_cast<int32_t>(row));
    }
  }
  task.exact.reserve_scores(task.group_size);
  const auto clusters = static_cast<size_t>(index.total_clusters());
  task.clusters.num_clusters = static_cast<int32_t>(clusters);
  task.clusters.dots.resize(group * clusters);
  task.clusters.spreads.resize(clusters);
  task.clusters.sizes.resize(clusters);
}

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
      SelectParams params;
      params.group_size = task.group_size;
      params.q_norms2 = task.q_norms2.data();
      params.exact = task.exact_state.data();
      task.beta = params.beta = options.beta > 0 ? options.beta : known.beta(kPriorWeight, kPriorSlope);
      params.variance_ratio = static_cast<float>(known.variance_ratio);
      select_sample(task.clusters, params, options, task.inclusion);
      draw(index, task.head, task.filter, task.clusters, task.inclusion, random_offset(*task.query, task.head, options.seed), task.selection);
      break;
    }
    case Select::kTopK:
      select_topk(index, task.head, task.filter, task.clusters, task.group_size, options.budget, task.selection);
      break;
    case Select::kFit:
      task.probed = select_fit(index, task.head, task.filter, task.clusters, task.query->kv.k, task.q.data(), task.head_dim(),
                               task.group_size, task.exact_state.data(), options.target_mass, task.selection);
      break;
    case Select::kDense: break;
  }
  task.selected.tokens.assign(task.selection.tokens.begin(), task.selection.tokens.end());
  task.selected.reserve_scores(task.group_size);
  task.refined.reserve_scores(task.group_size);
  for (int32_t g = 0; g < task.group_size; ++g) {
    const float* dots = task.clusters.dots.data() + static_cast<size_t>(g) * static_cast<size_t>(task.clusters.num_clusters);
    SoftmaxState& exact = task.exact_state[static_cast<size_t>(g)];
    float max = exact.max;
    for (int32_t c = 0; c < task.clusters.num_clusters; ++c) {
      if (task.clusters.sizes[static_cast<size_t>(c)] == 0) continue;   // hidden or empty
      task.not_finite = task.not_finite || !std::isfinite(dots[c]);
      max = std::max(max, dots[c]);
    }
    task.not_finite = task.not_finite || !std::isfinite(max);
    if (max == exact.max) continue;   // the usual case: a sink has the largest score
    exact.sum = exp_weights(task.exact.scores_of(g), task.exact.size(), max, task.exact.weights_of(g));
    exact.max = max;
  }
}

namespace {

// Weight, relative to the task's state, from which on a sampled row refines its cluster.
float heavy_weight(const Task& task, int32_t g, float limit) {
  return limit * std::exp(task.inclusion.log_totals[static_cast<size_t>(g)] - task.exact_state[static_cast<size_t>(g)].max);
}

// A sampled row that speaks for too large a share in any head had its cluster underestimated: the cluster is read whole
// and its rows lose their weights. Returns whether there was any.
bool refine(Task& task, float limit) {
  HeadSelection& selection = task.selection;
  std::vector<int32_t> found;   // clusters, ascending
  for (int64_t i = selection.num_certain; i < task.selected.size(); ++i) {
    const int32_t cluster = selection.clusters[static_cast<size_t>(i)];
    if (!found.empty() && found.back() == cluster) continue;
    for (int32_t g = 0; g < task.group_size; ++g) {
      if (task.selected.weights_of(g)[i] > heavy_weight(task, g, limit)) {
        found.push_back(cluster);
        break;
      }
    }
  }
  task.refined_clusters = static_cast<int64_t>(found.size());
  if (found.empty()) return false;
  auto next = found.begin();
  int32_t base = 0;
  size_t at = static_cast<size_t>(selection.num_certain);
  for (const Segment& segment : task.query->index->state().segments) {
    const HeadClusters& clusters = segment.heads[static_cast<size_t>(task.head)];
    const uint16_t* members = clusters.members.data();
    for (int32_t c = 0; c < segment.num_clusters && next != found.end(); ++c) {
      const int32_t size = clusters.sizes[static_cast<size_t>(c)];
      if (*next == base + c) {
        ++next;
        while (selection.clusters[at] != base + c) ++at;
        for (int32_t m = 0; m < size; ++m) {
          const auto row = static_cast<int32_t>(segment.row_begin + members[m]);
          if (at < selection.tokens.size() && selection.tokens[at] == row) {
            const float probability = std::exp(-selection.log_weights[at]);
            selection.log_weights[at] = 0;
            for (int32_t g = 0; g < task.group_size; ++g) task.selected.weights_of(g)[at] *= probability;
            ++at;
          } else if (task.filter.reads_indexed(row)) {
            task.refined.tokens.push_back(row);
          }
        }
      }
      members += size;
    }
    base += padded_clusters(segment.num_clusters);
  }
  task.refined.reserve_scores(task.group_size);
  attend_scores(task.query->kv.k, task.head, task.refined.tokens.data(), task.refined.size(), task.q.data(), task.head_dim(),
                task.group_size, task.refined.scores.data(), task.refined.stride);
  for (int32_t g = 0; g < task.group_size; ++g) {
    exp_weights(task.refined.scores_of(g), task.refined.size(), task.state[static_cast<size_t>(g)].max, task.refined.weights_of(g));
  }
  return true;
}

}  // namespace

void weigh_rows(Task& task, int64_t begin, int64_t end, WeightSums* sums) {
  const HeadSelection& selection = task.selection;
  const int64_t middle = std::clamp(selection.num_certain, begin, end);
  for (int32_t g = 0; g < task.group_size; ++g) {
    const float max = task.exact_state[static_cast<size_t>(g)].max;
    const float* scores = task.selected.scores_of(g);
    float* weights = task.selected.weights_of(g);
    sums[g].certain += exp_weights(scores + begin, middle - begin, max, weights + begin);
    sampled_weights(scores + middle, selection.log_weights.data() + middle, end - middle, max, weights + middle, sums[g]);
  }
}

void settle_weights(Task& task, const DecodeOptions& options, const WeightSums* sums) {
  bool underestimated = false;
  const float limit = refine_limit(options, task.inclusion);
  const auto settle = [&](int32_t g, const WeightSums& sum) {
    SoftmaxState& state = task.state[static_cast<size_t>(g)];
    const SoftmaxState& exact = task.exact_state[static_cast<size_t>(g)];
    const double total = exact.sum + sum.certain + sum.sampled;
    task.not_finite = task.not_finite || !(total > 1e-20 && total < 1e30);
    state = {exact.max, static_cast<float>(total)};
    task.certain_mass[static_cast<size_t>(g)] = 1 - sum.sampled / total;
    task.variance[static_cast<size_t>(g)] = sum.variance / (total * total);
    underestimated = underestimated || (options.select == Select::kSample && sum.largest_sampled > heavy_weight(task, g, limit));
  };
  for (int32_t g = 0; g < task.group_size; ++g) settle(g, sums[g]);
  if (task.not_finite || !underestimated || !refine(task, limit)) return;
  for (int32_t g = 0; g < task.group_size; ++g) {
    WeightSums sum;
    const float* weights = task.selected.weights_of(g);
    for (int64_t i = 0; i < task.selected.size(); ++i) {
      const double weight = weights[i], log_weight = task.selection.log_weights[static_cast<size_t>(i)];
      if (log_weight == 0) {
        sum.certain += weight;
      } else {
        sum.sampled += weight;
        sum.variance += weight * weight * (1 - std::exp(-log_weight));
      }
    }
    for (int64_t i = 0; i < task.refined.size(); ++i) sum.certain += task.refined.weights_of(g)[i];
    settle(g, sum);
  }
}

bool rows_unchanged(const Task& task, int64_t begin, int64_t end, bool values) {
  const KvView& kv = task.query->kv;
  const RowsView& rows = values ? kv.v : kv.k;
  const size_t bytes = row_bytes(rows.dtype, values ? kv.v_head_dim : kv.head_dim);
  const IndexState& index = task.query->index->state();
  const Segment* segment = nullptr;
  uint32_t difference = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = task.selected.tokens[static_cast<size_t>(i)];
    if (segment == nullptr || row < segment->row_begin || row >= segment->row_begin + segment->num_rows) {
      segment = find_segment(index, row);
    }
    const size_t at = static_cast<size_t>(task.head) * static_cast<size_t>(segment->num_rows) + static_cast<size_t>(row - segment->row_begin);
    const uint32_t stored = segment->row_checks[at];
    difference |= check_row(rows.row(task.head, row), bytes, row) ^ (values ? stored >> 4 : stored & 15);
  }
  return difference == 0;
}

void learn(Task& task, const DecodeOptions& options) {
  if (options.select != Select::kSample) return;
  Calibration& known = task.query->index->state().calibration[static_cast<size_t>(task.head)];
  double measured = 0;
  for (const double variance : task.variance) measured += variance;
  measured /= task.group_size;
  const double predicted = task.inclusion.predicted_variance / known.variance_ratio;
  if (measured > 0 && predicted > 0) {
    const double ratio = std::clamp(measured / predicted, 0.05, 20.0);
    known.variance_ratio = std::clamp(known.variance_ratio * std::pow(ratio / known.variance_ratio, 0.02), 0.1, 10.0);
  }
  // Whole clusters give pairs of spread term and true log mean weight; they are read anyway, but logarithms cost.
  if ((static_cast<uint64_t>(task.query->position) + static_cast<uint64_t>(task.query->layer)) % 8 != 0) return;
  known.sum_xx *= kForget;
  known.sum_xy *= kForget;
  const HeadSelection& selection = task.selection;
  for (int64_t i = 0; i < selection.num_certain;) {
    const int32_t cluster = selection.clusters[static_cast<size_t>(i)];
    int64_t end = i;
    while (end < selection.num_certain && selection.clusters[static_cast<size_t>(end)] == cluster) ++end;
    if (end - i >= 2) {
      for (int32_t g = 0; g < task.group_size; ++g) {
        double sum = 0;
        for (int64_t m = i; m < end; ++m) sum += task.selected.weights_of(g)[m];
        const double x = growth(task.q_norms2[static_cast<size_t>(g)] * task.clusters.spreads[static_cast<size_t>(cluster)], end - i);
        const double y = std::log(sum / static_cast<double>(end - i)) + task.state[static_cast<size_t>(g)].max -
                         task.clusters.dots[static_cast<size_t>(g) * static_cast<size_t>(task.clusters.num_clusters) + static_cast<size_t>(cluster)];
        if (!std::isfinite(y)) continue;
        known.sum_xx += x * x;
        known.sum_xy += x * y;
      }
    }
    i = end;
  }
}

void add_stats(const Task& task, StepStats& stats) {
  const KvView& kv = task.query->kv;
  const auto k_bytes = static_cast<int64_t>(row_bytes(kv.k.dtype, kv.head_dim));
  const auto v_bytes = static_cast<int64_t>(row_bytes(kv.v.dtype, kv.v_head_dim));
  if (!task.sparse) {
    stats.tokens_certain += task.exact.size();
    stats.tokens_value += task.exact.size();
    stats.kv_bytes += task.exact.size() * (k_bytes + v_bytes);
    stats.estimated_mass += 1.0 / kv.num_kv_heads;
    return;
  }
  int64_t sampled = 0;
  for (int64_t i = task.selection.num_certain; i < task.selected.size(); ++i) {
    sampled += task.selection.log_weights[static_cast<size_t>(i)] != 0;
  }
  const int64_t read = task.exact.size() + task.selected.size() + task.refined.size();
  stats.tokens_certain += read - sampled;
  stats.tokens_sampled += sampled;
  stats.tokens_value += read;
  stats.refined_clusters += task.refined_clusters;
  stats.kv_bytes += read * (k_bytes + v_bytes) + task.probed * k_bytes;
  for (int32_t g = 0; g < task.group_size; ++g) {
    const double share = 1.0 / task.query->num_q_heads;
    stats.estimated_mass += task.certain_mass[static_cast<size_t>(g)] * share;
    stats.mass_std_error += task.variance[static_cast<size_t>(g)] * share;   // a variance until the step is done
  }
  for (const Segment& segment : task.query->index->state().segments) {
    // Per cluster: 8-bit residuals, scale, spread, size. Per row read: its number and check value.
    stats.index_bytes += int64_t{segment.num_clusters} * (kv.head_dim + 10) + kv.head_dim * 4;
  }
  stats.index_bytes += (task.selected.size() + task.refined.size()) * 3;
  if (task.query->head_stats == nullptr) return;
  HeadStats& head = task.query->head_stats[task.head];
  head = {read, task.exact.size(), 0, 0, task.inclusion.tau, task.beta};
  for (size_t g = 0; g < static_cast<size_t>(task.group_size); ++g) {
    head.exact_mass += double{task.exact_state[g].sum} / task.state[g].sum / task.group_size;
    head.estimated_mass += task.certain_mass[g] / task.group_size;
  }
}

}  // namespace tactic::cpu
