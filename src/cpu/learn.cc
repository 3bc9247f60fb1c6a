// learn: what a step found out about the index's estimates, for later steps (docs/method.md, calibration, followers).
#include <algorithm>
#include <cmath>

#include "core/drawn_variance.h"
#include "core/read_on.h"
#include "cpu/steps.h"
#include "cpu/task.h"

namespace tactic::cpu {

namespace {

constexpr double kForget = 0.98;
constexpr float kHeavy = 0.01f;   // share of a head
constexpr size_t kExpected = 32;  // rows that a step names for the next, at most; the first of them

void sort_unique(std::vector<int32_t>& rows) {
  std::sort(rows.begin(), rows.end());
  rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
}

// Calls found(i) for rows [begin, end) of `list` that weigh more than kHeavy in some head; `log_weights`, where they
// were drawn: what they were drawn to speak for does not count.
template <class Fn>
void for_heavy_rows(const Task& task, const RowList& list, int64_t begin, int64_t end,
                    const std::vector<float>* log_weights, Fn found) {
  thread_local std::vector<int32_t> places;
  places.resize(static_cast<size_t>(end - begin));
  for (int32_t g = 0; g < task.group_size; ++g) {
    const float* weights = list.weights.data() + g * list.stride;
    const float limit = kHeavy * task.state[static_cast<size_t>(g)].sum;
    const int64_t count = heavier(weights + begin, end - begin, limit, places.data());
    for (int64_t j = 0; j < count; ++j) {
      const int64_t i = begin + places[static_cast<size_t>(j)];
      if (log_weights == nullptr || weights[i] * std::exp(-(*log_weights)[static_cast<size_t>(i)]) > limit) found(i);
    }
  }
}

// Heavy rows whose clusters were not meant to be read whole are suspects; the rows after all heavy ones are expected to
// weigh much in the next step.
void find_heavy(const Task& task, Calibration& known) {
  std::vector<int32_t> expected, surprises;
  const auto look = [&](const RowList& list, int64_t begin, int64_t end, const std::vector<float>* log_weights,
                        bool surprise) {
    for_heavy_rows(task, list, begin, end, log_weights, [&](int64_t i) {
      const int32_t row = list.tokens[static_cast<size_t>(i)];
      if (surprise) surprises.push_back(row);
      if (task.filter.reads_indexed(row + 1)) expected.push_back(row + 1);
    });
  };
  const int64_t certain = task.selection.num_certain;
  look(task.exact, 0, task.exact.size(), nullptr, false);
  look(task.selected, 0, certain, nullptr, false);
  look(task.selected, certain, task.selected.size(), &task.selection.log_weights, true);
  look(task.refined, 0, task.refined.size(), nullptr, true);
  sort_unique(expected);
  if (expected.size() > kExpected) expected.resize(kExpected);
  known.expected.insert(known.expected.end(), expected.begin(), expected.end());
  sort_unique(known.expected);
  sort_unique(surprises);
  for (const int32_t row : surprises) found_heavy(task.query->index->state(), task.head, row);
}

}  // namespace

void forget_expected(Task& task, const DecodeOptions& options) {
  if (options.select != Select::kSample) return;  // learns nothing
  task.query->index->state().calibration[static_cast<size_t>(task.head)].expected.clear();
}

void learn(Task& task, const DecodeOptions& options) {
  if (options.select != Select::kSample) return;
  Calibration& known = task.query->index->state().calibration[static_cast<size_t>(task.head)];
  double measured = 0;
  for (const double variance : task.independent_variance) measured += variance;
  measured /= task.group_size;
  const double predicted = task.inclusion.predicted_variance / task.variance_ratio;
  if (measured > 0 && predicted > 0) {
    const double ratio = std::clamp(measured / predicted, 0.05, 20.0);
    known.variance_ratio = std::clamp(known.variance_ratio * std::pow(ratio / known.variance_ratio, 0.02), 0.1, 10.0);
  }
  for (size_t g = 0; g < task.relative_variance.size(); ++g) {
    if (!(task.relative_variance[g] > 0)) continue;
    if (known.usual_variance.size() != task.relative_variance.size())  // that of another group is not known of this one
      known.usual_variance.assign(task.relative_variance.size(), 0.0);
    double& usual = known.usual_variance[g];
    usual += (usual > 0 ? DrawnVariance::kUsualRate : 1.0) * (task.relative_variance[g] - usual);
  }
  find_heavy(task, known);
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
        const double x =
            spread_growth(task.q_norms2[static_cast<size_t>(g)] * task.clusters.spreads[static_cast<size_t>(cluster)],
                          static_cast<double>(end - i));
        const double y = std::log(sum / static_cast<double>(end - i)) + task.state[static_cast<size_t>(g)].max -
                         task.clusters.dots[static_cast<size_t>(g) * static_cast<size_t>(task.clusters.num_clusters) +
                                            static_cast<size_t>(cluster)];
        if (!std::isfinite(y) || !(x < kMaxTerm)) continue;
        known.sum_xx += x * x;
        known.sum_xy += x * y;
      }
    }
    i = end;
  }
}

}  // namespace tactic::cpu
