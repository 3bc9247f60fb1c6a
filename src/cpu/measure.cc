// measure: what the draw says of the mass that is read with certainty (docs/method.md, measuring itself).
#include <algorithm>
#include <cmath>

#include "core/drawn_variance.h"
#include "cpu/task.h"

namespace tactic::cpu {

namespace {

// Whether every draw speaks.
bool all_speak(const Task& task, bool alone) { return !alone && !task.silenced; }

// Head g's draws whose clusters speak.
DrawnSums speaking(const Task& task, int32_t g, bool alone) {
  if (all_speak(task, alone)) return task.draws[static_cast<size_t>(g)];
  DrawnSums sums;
  const auto first = static_cast<size_t>(task.selection.num_certain), draws = task.selection.clusters.size() - first;
  for (size_t i = 0; i < draws; ++i) {
    const auto cluster = static_cast<size_t>(task.selection.clusters[first + i]);
    if (speaks(task.readings[cluster], alone))
      sums.add(task.drawn_weights[static_cast<size_t>(g) * draws + i], task.inclusion.probability[cluster]);
  }
  return sums;
}

}  // namespace

std::vector<HeadMass> measure(Task& task, bool alone, bool first) {
  const Calibration& known = task.query->index->state().calibration[static_cast<size_t>(task.head)];
  const Undrawn undrawn = all_speak(task, alone) ? task.undrawn
                                                 : undrawn_rows(task.query->index->state(), task.clusters.sizes,
                                                                task.inclusion.probability, task.readings, alone);
  std::vector<HeadMass> masses;
  const bool read = all_read(task.clusters.sizes, task.readings);
  const int64_t draws = task.selected.size() - task.selection.num_certain;
  for (int32_t g = 0; g < task.group_size; ++g) {
    const DrawnSums sums = speaking(task, g, alone);
    const DrawnVariance drawn(sums);
    double rest = sums.sum;  // what was drawn, less the true weights of rows read whole because of that
    for (size_t i = 0; i < task.certain_since.size() && !alone; ++i) {
      const int64_t at = task.certain_since[i];
      const auto cluster = static_cast<size_t>(task.selection.clusters[static_cast<size_t>(at)]);
      if (task.readings[cluster] == Reading::kRefined) rest -= task.selected.weights_of(g)[at];
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

}  // namespace tactic::cpu
