// Curves fitted to the tail: the paper's is select_fit's, and each finds the truth in data of its own kind.
#include <functional>
#include <numeric>

#include "paper/fit.h"
#include "reference/steps.h"
#include "support.h"

namespace tactic::eval {
namespace {

TEST(Fit, TheReciprocalIsTheLibrarysSelector) {
  for (const uint64_t seed : {1u, 2u, 3u}) {
    test::Problem p({.num_kv_heads = 1, .kv_len = 4096, .seed = seed}, 1, seed);
    p.build_index({.cluster_tokens = 32, .sink_tokens = 0, .outlier_fraction = 0});
    const RowFilter filter = test::filter_of(*p.index, 4096);
    std::vector<float> q(p.q);
    for (float& x : q) x *= p.query.sm_scale;
    ClusterScores scores;
    reference::score(p.index->state(), 0, filter, q.data(), 1, scores);
    const HeadSelection all = reference::readable(p.index->state(), 0, filter);
    std::vector<double> weights;
    double max = -HUGE_VAL;
    for (const size_t i : reference::rank(all, scores.dots.data()))
      weights.push_back(reference::dot_row(p.cache.view().k, 0, all.tokens[i], q.data(), 64));
    for (const double score : weights) max = std::max(max, score);
    for (double& weight : weights) weight = std::exp(weight - max);
    for (const float target : {0.5f, 0.9f, 0.98f}) {
      const SoftmaxState none;
      HeadSelection selection;
      reference::select_fit(p.index->state(), 0, filter, scores, p.cache.view().k, q.data(), 64, 1, &none, target,
                            selection);
      EXPECT_NEAR(static_cast<double>(fitted_tokens(weights, 0, Curve::kReciprocal, target)),
                  static_cast<double>(selection.tokens.size()), 1)
          << seed << " " << target;
    }
  }
}

TEST(Fit, EachCurveFindsTheTruthInItsOwnKind) {
  constexpr int64_t n = 5000;
  const std::function<double(double)> shapes[] = {
      [](double x) { return 30 / x + 0.002; }, [](double x) { return 30 / x; }, [](double x) { return 1.2 - x / 5000; },
      [](double x) { return std::exp(-x / 1500); }, [](double x) { return std::pow(1.1 - x / 5000, 2); }};
  for (size_t c = 0; c < std::size(kCurves); ++c) {
    std::vector<double> weights;
    double total = 0, mass = 0;
    for (int64_t i = 1; i <= n; ++i) total += weights.emplace_back(shapes[c](static_cast<double>(i)));
    int64_t truth = 0;
    while (mass < 0.9 * total) mass += weights[static_cast<size_t>(truth++)];
    const auto found = static_cast<double>(fitted_tokens(weights, 0, kCurves[c], 0.9));
    EXPECT_NEAR(found, static_cast<double>(truth), 0.02 * static_cast<double>(truth)) << curve_name(kCurves[c]);
  }
}

TEST(Fit, EdgesAreHandled) {
  EXPECT_EQ(fitted_tokens({}, 0, Curve::kReciprocal, 0.9), 0);
  const std::vector<double> few(100, 1.0), equal(1000, 1.0);
  for (const Curve curve : kCurves) {
    EXPECT_EQ(fitted_tokens(few, 0, curve, 0.5), 50) << curve_name(curve);
    EXPECT_EQ(fitted_tokens(equal, 0, curve, 1.0), 1000) << curve_name(curve);
  }
  for (const Curve curve : {Curve::kReciprocal, Curve::kLinear, Curve::kExponential, Curve::kQuadratic}) {
    EXPECT_NEAR(static_cast<double>(fitted_tokens(equal, 0, curve, 0.5)), 500, 1) << curve_name(curve);
  }
  EXPECT_EQ(fitted_tokens(few, 100, Curve::kReciprocal, 0.75), 50);  // half of the mass is there already
  std::vector<double> rising(1000);
  std::iota(rising.begin(), rising.end(), 0);
  for (const Curve curve : kCurves) EXPECT_LE(fitted_tokens(rising, 0, curve, 0.9), 1000) << curve_name(curve);
  std::vector<double> dead(1000, 0.0);
  std::fill(dead.begin(), dead.begin() + 200, 1.0);  // nothing left in the far window
  for (const Curve curve : kCurves) EXPECT_GT(fitted_tokens(dead, 0, curve, 0.9), 0) << curve_name(curve);
}

}  // namespace
}  // namespace tactic::eval
