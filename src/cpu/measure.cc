// measure: what the draw says of the mass that is read with certainty (docs/method.md, measuring itself).
#include <algorithm>
#include <cmath>

#include "core/drawn_variance.h"
#include "cpu/steps.h"
#include "cpu/task.h"

namespace tactic::cpu {

namespace {

// The draws whose clusters speak, and those among them of refined clusters: places in the order of the draw.
struct Speaking {
  std::vector<size_t> draws, refined;
  std::vector<float> probabilities, weights;  // of the draws; weights of one head at a time

  void list(const Task& task, bool alone) {
    draws.clear(), refined.clear(), probabilities.clear();
    const auto first = static_cast<size_t>(task.selection.num_certain);
    for (size_t i = 0; first + i < task.selection.clusters.size(); ++i) {
      const auto cluster = static_cast<size_t>(task.selection.clusters[first + i]);
      const Reading reading = task.readings[cluster];
      if (!speaks(reading, alone)) continue;
      draws.push_back(i);
      probabilities.push_back(task.inclusion.probability[cluster]);
      if (reading == Reading::kRefined) refined.push_back(i);
    }
    weights.resize(draws.size());
  }
  DrawnSums sums(const float* drawn) {
    for (size_t i = 0; i < draws.size(); ++i) weights[i] = drawn[draws[i]];
    DrawnSums sums;
    add_draws(weights.data(), probabilities.data(), static_cast<int64_t>(weights.size()), sums);
    return sums;
  }
};

}  // namespace

std::vector<HeadMass> measure(Task& task, bool alone, bool first) {
  thread_local Speaking speaking;
  const Calibration& known = task.query->index->state().calibration[static_cast<size_t>(task.head)];
  const Undrawn undrawn =
      undrawn_rows(task.query->index->state(), task.clusters.sizes, task.inclusion.probability, task.readings, alone);
  std::vector<HeadMass> masses;
  const bool read = all_read(task.clusters.sizes, task.readings);
  const int64_t draws = task.selected.size() - task.selection.num_certain;
  speaking.list(task, alone);
  for (int32_t g = 0; g < task.group_size; ++g) {
    const DrawnSums sums = speaking.sums(task.drawn.data() + g * draws);
    const DrawnVariance drawn(sums);
    double rest = sums.sum;  // what was drawn, less the true weights of rows read whole because of that
    const float* weights = task.selected.weights_of(g) + task.selection.num_certain;
    for (const size_t i : speaking.refined) rest -= weights[i];
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
