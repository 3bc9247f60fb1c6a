#include "cpu/task.h"

#include <algorithm>
#include <cmath>

#include "core/drawn_variance.h"
#include "core/expected_rows.h"
#include "core/random.h"
#include "core/read_on.h"
#include "cpu/steps.h"

namespace tactic::cpu {

namespace {

const Segment* find_segment(const IndexState& index, int64_t row) {
  auto at = std::upper_bound(index.segments.begin(), index.segments.end(), row,
                             [](int64_t r, const Segment& segment) { return r < segment.row_begin; });
  return at == index.segments.begin() ? nullptr : &*std::prev(at);
}

}  // namespace

void begin_task(Task& task, const std::vector<int32_t>& recent) {
  const DecodeQuery& query = *task.query;
  const int32_t head = task.head;
  task.group_size = query.num_q_heads / query.kv.num_kv_heads;
  task.refined_clusters = task.probed = 0;
  task.beta = task.inclusion.tau = 0;
  task.changed = task.late_changed = task.not_finite = false;
  const auto dim = static_cast<size_t>(query.kv.head_dim), group = static_cast<size_t>(task.group_size);
  task.q.resize(group * dim);
  if (!task.again) task.q_norms2.assign(group, 0);
  task.exact_state.assign(group, {});
  task.state.assign(group, {});
  task.masses.assign(group, {});
  task.independent_variance.assign(group, 0);
  task.certain.assign(group, 0);
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
           random_offset(*task.query, task.head, options.seed), task.selection);
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
    float max = exact.max;
    for (int32_t c = 0; c < task.clusters.num_clusters; ++c) {
      if (task.clusters.sizes[static_cast<size_t>(c)] == 0) continue;  // hidden or empty
      task.not_finite = task.not_finite || !std::isfinite(dots[c]);
      max = std::max(max, dots[c]);
    }
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

bool is_heavy(const Task& task, int64_t i) {
  for (int32_t g = 0; g < task.group_size; ++g) {
    if (task.selected.weights[static_cast<size_t>(g * task.selected.stride + i)] > task.heavy[static_cast<size_t>(g)])
      return true;
  }
  return false;
}

// A drawn row becomes a certain one, after its value was added with the weight it had (0 if it was too heavy).
void make_certain(Task& task, size_t at) {
  float& log_weight = task.selection.log_weights[at];
  const float probability = std::exp(-log_weight);
  const bool added = !is_heavy(task, static_cast<int64_t>(at));
  log_weight = 0;
  for (int32_t g = 0; g < task.group_size; ++g) {
    float& weight = task.selected.weights_of(g)[at];
    const float before = added ? weight : 0.0f;
    weight *= probability;
    task.changes.push_back(weight - before);
  }
  task.corrected.tokens.push_back(task.selected.tokens[at]);
}

// Room for the scores of rows that were added; the weights of the rows before stay.
void grow_scores(RowList& list, int32_t group_size, int64_t old_size) {
  const int64_t old_stride = list.stride;
  list.reserve_scores(group_size);
  for (int32_t g = group_size - 1; g > 0; --g) {
    std::copy_backward(list.weights.begin() + g * old_stride, list.weights.begin() + g * old_stride + old_size,
                       list.weights.begin() + g * list.stride + old_size);
  }
}

// Clusters (ascending) are read whole: those of their rows that were drawn lose their weights, the others are added.
void read_whole(Task& task, const std::vector<int32_t>& found) {
  HeadSelection& selection = task.selection;
  const int64_t old_size = task.refined.size();
  auto next = found.begin();
  int32_t base = 0;
  auto at = static_cast<size_t>(selection.num_certain);
  for (const Segment& segment : task.query->index->state().segments) {
    const HeadClusters& clusters = segment.heads[static_cast<size_t>(task.head)];
    const uint16_t* members = clusters.members.data();
    for (int32_t c = 0; c < segment.num_clusters && next != found.end(); ++c) {
      const int32_t size = clusters.sizes[static_cast<size_t>(c)];
      if (*next == base + c) {
        ++next;
        while (at < selection.tokens.size() && selection.clusters[at] < base + c) ++at;
        for (int32_t m = 0; m < size; ++m) {
          const auto row = static_cast<int32_t>(segment.row_begin + members[m]);
          if (at < selection.tokens.size() && selection.tokens[at] == row) {
            make_certain(task, at++);
          } else if (task.filter.reads_indexed(row) &&
                     !std::binary_search(task.expected.begin(), task.expected.end(), row)) {
            task.refined.tokens.push_back(row);
            task.refined_from.push_back(base + c);
          }
        }
      }
      members += size;
    }
    base += padded_clusters(segment.num_clusters);
  }
  grow_scores(task.refined, task.group_size, old_size);
  const int64_t added = task.refined.size() - old_size;
  attend_scores(task.query->kv.k, task.head, task.refined.tokens.data() + old_size, added, task.q.data(),
                task.head_dim(), task.group_size, task.refined.scores.data() + old_size, task.refined.stride);
  for (int32_t g = 0; g < task.group_size; ++g) {
    exp_weights(task.refined.scores_of(g) + old_size, added, task.state[static_cast<size_t>(g)].max,
                task.refined.weights_of(g) + old_size);
  }
}

// Clusters of which a sampled row speaks for too large a share in any head: they were underestimated.
std::vector<int32_t> underestimated(const Task& task) {
  std::vector<int32_t> found;
  for (int64_t i = next_heavy(task, 0, task.selected.size()); i < task.selected.size();
       i = next_heavy(task, i + 1, task.selected.size()))
    found.push_back(task.selection.clusters[static_cast<size_t>(i)]);
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  return found;
}

// The state from the sums of weights. Returns the total, or 0 when it is out of range.
double settle_head(Task& task, int32_t g, const WeightSums& sum) {
  const SoftmaxState& exact = task.exact_state[static_cast<size_t>(g)];
  const double total = exact.sum + sum.certain + sum.sampled;
  if (!(total > 1e-20 && total < 1e30)) task.not_finite = true;
  task.state[static_cast<size_t>(g)] = {exact.max, static_cast<float>(total)};
  task.certain[static_cast<size_t>(g)] = total - sum.sampled;
  return task.not_finite ? 0 : total;
}

// Sums over all weights anew, some clusters having been read whole.
void settle_again(Task& task) {
  for (int32_t g = 0; g < task.group_size; ++g) {
    WeightSums sum;
    const float* weights = task.selected.weights_of(g);
    for (int64_t i = 0; i < task.selected.size(); ++i)
      (task.selection.log_weights[static_cast<size_t>(i)] == 0 ? sum.certain : sum.sampled) += weights[i];
    for (int64_t i = 0; i < task.refined.size(); ++i) sum.certain += task.refined.weights_of(g)[i];
    settle_head(task, g, sum);
  }
}

// The masses as the draws that speak measure them, and how sure they are. `alone`: as in speaks(), to decide by, for
// which what is usual stays as it is (docs/method.md, verified mass). `first`: what steps find usual is to learn of it.
std::vector<HeadMass> measure(Task& task, bool alone, bool first) {
  const Calibration& known = task.query->index->state().calibration[static_cast<size_t>(task.head)];
  const Undrawn undrawn =
      undrawn_rows(task.query->index->state(), task.clusters.sizes, task.inclusion.probability, task.readings, alone);
  std::vector<HeadMass> masses;
  const bool read = all_read(task.clusters.sizes, task.readings);
  const int64_t draws = task.selected.size() - task.selection.num_certain;
  for (int32_t g = 0; g < task.group_size; ++g) {
    DrawnVariance drawn;
    double rest = 0;  // what was drawn, less the true weights of rows read whole because of that
    for (int64_t i = 0; i < draws; ++i) {
      const auto cluster =
          static_cast<size_t>(task.selection.clusters[static_cast<size_t>(task.selection.num_certain + i)]);
      if (!speaks(task.readings[cluster], alone)) continue;
      const float z = task.drawn[static_cast<size_t>(g * draws + i)];
      drawn.add(z, task.inclusion.probability[cluster]);
      rest += z;
      if (task.readings[cluster] == Reading::kRefined)
        rest -= task.selected.weights_of(g)[task.selection.num_certain + i];
    }
    for (int64_t i = 0; i < task.refined.size() && !alone; ++i) {
      if (task.readings[static_cast<size_t>(task.refined_from[static_cast<size_t>(i)])] == Reading::kRefined)
        rest -= task.refined.weights_of(g)[i];
    }
    const double certain = task.certain[static_cast<size_t>(g)];
    const double total = certain + (read ? 0.0 : std::max(0.0, rest));
    const double mass = certain / total,
                 of_all = known.usual_of(static_cast<size_t>(g), static_cast<size_t>(task.group_size)),
                 usual = alone ? of_all : drawn.for_draws(of_all, draws);
    const double tau = unseen_tau(task.inclusion, static_cast<size_t>(g));
    const double variance = undrawn.any && !read ? drawn.variance(total, tau, undrawn.count_variance, usual) : 0;
    if (first)
      task.relative_variance[static_cast<size_t>(g)] = undrawn.any ? drawn.relative(undrawn.count_variance) : 0;
    masses.push_back({mass, mass * std::sqrt(variance) / total, drawn.freedom(usual),
                      task.state[static_cast<size_t>(g)].max + std::log(total)});
  }
  return masses;
}

// Reads the clusters that the draw found underestimated.
void refine_clusters(Task& task) {
  const std::vector<int32_t> found = underestimated(task);
  task.refined_clusters = static_cast<int64_t>(found.size());
  for (const int32_t c : found) task.readings[static_cast<size_t>(c)] = Reading::kRefined;
  read_whole(task, found);
  settle_again(task);
}

// Reads on until every head has the mass for certain, by what the draws of clusters not read whole say of the rest.
void reach_mass(Task& task, float target_mass) {
  const SelectParams params{task.group_size, task.q_norms2.data(), task.exact_state.data(), task.beta, 1};
  bool read = false;
  while (!task.not_finite) {
    const NextClusters next = read_on(task.clusters, params, task.readings, measure(task, true, false), target_mass);
    if (next.read.empty()) break;
    for (const int32_t c : next.read) task.readings[static_cast<size_t>(c)] = Reading::kWhole;
    for (const int32_t c : next.silent) task.readings[static_cast<size_t>(c)] = Reading::kWhole;
    read_whole(task, next.read);
    settle_again(task);
    read = true;
  }
  if (read) task.masses = measure(task, false, false);
}

// `changes`, row by row, as weights of the corrected rows.
void list_changes(Task& task) {
  task.corrected.reserve_scores(task.group_size);
  auto change = task.changes.begin();
  for (int64_t i = 0; i < task.corrected.size(); ++i) {
    for (int32_t g = 0; g < task.group_size; ++g) task.corrected.weights_of(g)[i] = *change++;
  }
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
    sampled_weights(scores + middle, selection.log_weights.data() + middle, end - middle, max, weights + middle,
                    sums[g]);
  }
}

bool draws_too_heavy(const Task& task, const WeightSums* sums) {
  for (size_t g = 0; g < task.heavy.size(); ++g) {
    if (sums[g].largest_sampled > task.heavy[g]) return true;
  }
  return false;
}

int64_t next_heavy(const Task& task, int64_t begin, int64_t end) {
  int64_t i = std::max(begin, task.selection.num_certain);
  while (i < end && !is_heavy(task, i)) ++i;
  return std::min(std::max(i, begin), end);
}

void settle_weights(Task& task, const DecodeOptions& options, const WeightSums* sums) {
  const bool sample = options.select == Select::kSample;
  for (int32_t g = 0; g < task.group_size; ++g) {
    const double total = settle_head(task, g, sums[g]);
    task.independent_variance[static_cast<size_t>(g)] = sums[g].variance / (total * total);
  }
  if (task.not_finite || !sample) return;
  task.readings.resize(task.inclusion.probability.size());
  for (size_t c = 0; c < task.readings.size(); ++c)
    task.readings[c] = task.inclusion.probability[c] >= 1 ? Reading::kWhole : Reading::kDrawn;
  task.drawn.clear();
  for (int32_t g = 0; g < task.group_size; ++g) {
    const float* weights = task.selected.weights_of(g);
    task.drawn.insert(task.drawn.end(), weights + task.selection.num_certain, weights + task.selected.size());
  }
  if (draws_too_heavy(task, sums)) refine_clusters(task);
  task.masses = measure(task, false, true);
  if (options.target_mass > 0) reach_mass(task, options.target_mass);
  list_changes(task);
}

bool rows_unchanged(const Task& task, const RowList& list, int64_t begin, int64_t end) {
  const KvView& kv = task.query->kv;
  const size_t k_bytes = row_bytes(kv.k.dtype, kv.head_dim), v_bytes = row_bytes(kv.v.dtype, kv.v_head_dim);
  const IndexState& index = task.query->index->state();
  const Segment* segment = nullptr;
  constexpr int64_t kBlock = 32;
  const uint8_t* stored[kBlock];
  uint32_t difference = 0;
  for (; begin < end; begin += kBlock) {
    const int32_t* rows = list.tokens.data() + begin;
    const int64_t count = std::min(kBlock, end - begin);
    for (int64_t i = 0; i < count; ++i) {  // the check values lie anywhere in memory
      if (segment == nullptr || rows[i] < segment->row_begin || rows[i] >= segment->row_begin + segment->num_rows)
        segment = find_segment(index, rows[i]);
      stored[i] = segment->row_checks.data() + int64_t{task.head} * segment->num_rows + (rows[i] - segment->row_begin);
      __builtin_prefetch(stored[i]);
    }
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t k = check_row(kv.k.row(task.head, rows[i]), k_bytes, rows[i]);
      const uint32_t v = check_row(kv.v.row(task.head, rows[i]), v_bytes, rows[i]);
      difference |= (k | v << 4) ^ *stored[i];
    }
  }
  return difference == 0;
}

namespace {

int64_t rows_read(const Task& task) { return task.exact.size() + task.selected.size() + task.refined.size(); }

}  // namespace

void report(const Task& task) {
  const DecodeQuery& query = *task.query;
  if (query.head_stats != nullptr && task.sparse) {
    HeadStats& head = query.head_stats[task.head];
    head = {rows_read(task), task.exact.size(), 0, 0, task.inclusion.tau, task.beta};
    for (size_t g = 0; g < static_cast<size_t>(task.group_size); ++g) {
      head.exact_mass += double{task.exact_state[g].sum} / task.state[g].sum / task.group_size;
      head.estimated_mass += task.masses[g].mass / task.group_size;
    }
  }
  if (query.masses != nullptr) {
    for (size_t g = 0; g < static_cast<size_t>(task.group_size); ++g) {
      const HeadMass& m = task.masses[g];
      query.masses[static_cast<size_t>(task.head * task.group_size) + g] = {
          m.mass, m.std_error, mass_bound(m, kNormal95), mass_bound(m, -kNormal95)};
    }
  }
  if (query.selection == nullptr) return;
  HeadSelection& out = query.selection->heads[static_cast<size_t>(task.head)];
  out.clear();
  const auto push = [&](int32_t row, float log_weight, int32_t cluster) {
    out.tokens.push_back(row);
    out.log_weights.push_back(log_weight);
    out.clusters.push_back(cluster);
  };
  for (const int32_t row : task.exact.tokens) push(row, 0, -1);
  for (size_t i = 0; i < task.refined.tokens.size(); ++i) push(task.refined.tokens[i], 0, task.refined_from[i]);
  for (const bool certain : {true, false}) {
    for (size_t i = 0; i < task.selected.tokens.size(); ++i) {
      const float log_weight = task.selection.log_weights[i];
      if ((log_weight == 0) == certain) push(task.selected.tokens[i], log_weight, task.selection.clusters[i]);
    }
    if (certain) out.num_certain = static_cast<int64_t>(out.tokens.size());
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
  const int64_t read = rows_read(task);
  stats.tokens_certain += read - sampled;
  stats.tokens_sampled += sampled;
  stats.tokens_value += read;
  stats.refined_clusters += task.refined_clusters;
  stats.kv_bytes += read * (k_bytes + v_bytes) + task.probed * k_bytes;
  for (int32_t g = 0; g < task.group_size; ++g) {
    const double share = 1.0 / task.query->num_q_heads;
    const HeadMass& m = task.masses[static_cast<size_t>(g)];
    stats.estimated_mass += m.mass * share;
    stats.mass_std_error += m.std_error * m.std_error * share;  // a variance until the step is done
  }
  for (const Segment& segment : task.query->index->state().segments) {
    // Per cluster: 8-bit residuals, scale, spread, size. Per row read: its number and check value.
    stats.index_bytes += int64_t{segment.num_clusters} * (kv.head_dim + 10) + kv.head_dim * 4;
  }
  stats.index_bytes += (task.selected.size() + task.refined.size()) * 3;
}

}  // namespace tactic::cpu
