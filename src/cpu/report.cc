// report: what a step says of itself, for those who ask.
#include "cpu/task.h"

namespace tactic::cpu {

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
