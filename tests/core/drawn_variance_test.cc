// The variance of a systematic draw from the draw itself.
#include "core/drawn_variance.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "support.h"

namespace tactic::test {
namespace {

// Over all offsets of systematic sampling the estimate averages to the true variance of the sum. Where clusters are
// read nearly whole, neighbors of different clusters differ by more than the draw errs, and it is too large; never as
// large as the variance of independent draws, as half a squared difference is at most half the sum of the squares.
TEST(DrawnVariance, AveragesToTheVarianceOfSystematicDraws) {
  struct Case {
    double between, within;  // scatter of the logarithms of the clusters' and the rows' weights
    double rate;             // mean probability
  };
  for (const Case& c :
       {Case{0.2, 0.3, 0.02}, Case{0.2, 0.3, 0.1}, Case{0.2, 0.3, 0.5}, Case{0.2, 1, 0.02}, Case{0.2, 1, 0.1},
        Case{0.2, 1, 0.5}, Case{1, 0.3, 0.02}, Case{1, 1, 0.02}, Case{1, 0.3, 0.5}, Case{1, 1, 0.5}}) {
    SCOPED_TRACE(text("between ", c.between, " within ", c.within, " rate ", c.rate));
    constexpr int kPopulations = 100, kOffsets = 200;
    double sum_difference = 0, sum_difference2 = 0, sum_estimated = 0, sum_independent = 0;
    bool is_capped = false;
    for (uint64_t seed = 1; seed <= kPopulations; ++seed) {
      Random random(seed);
      std::vector<double> weights, probabilities;
      for (int cluster = 0; cluster < 100; ++cluster) {  // of 16 rows, with a probability in proportion to their mean
        const double mean = std::exp(c.between * random.normal());
        for (int m = 0; m < 16; ++m) {
          weights.push_back(mean * std::exp(c.within * random.normal()));
          probabilities.push_back(mean);
        }
      }
      const double sum = std::accumulate(probabilities.begin(), probabilities.end(), 0.0);
      double independent = 0;
      for (size_t i = 0; i < weights.size(); ++i) {
        double& p = probabilities[i];
        p *= c.rate * 1600 / sum;
        is_capped = is_capped || p > 0.95;
        p = std::min(0.95, p);
        independent += weights[i] * weights[i] * (1 - p) / p;
      }
      const double expected = std::accumulate(probabilities.begin(), probabilities.end(), 0.0);
      const double part = expected - std::floor(expected), count_variance = part * (1 - part);
      double estimated = 0, squared = 0;
      const double truth = std::accumulate(weights.begin(), weights.end(), 0.0);
      for (int o = 0; o < kOffsets; ++o) {
        double at = (o + 0.5) / kOffsets, drawn_sum = 0;
        DrawnSums drawn;
        for (size_t i = 0; i < weights.size(); ++i) {
          const double before = at;
          at += probabilities[i];
          if (std::floor(at) == std::floor(before)) continue;
          drawn.add(weights[i] / probabilities[i], probabilities[i]);
          drawn_sum += weights[i] / probabilities[i];
        }
        estimated += DrawnVariance(drawn).relative(count_variance) * drawn_sum * drawn_sum / kOffsets;
        squared += (drawn_sum - truth) * (drawn_sum - truth) / kOffsets;
      }
      const double difference = (estimated - squared) / (truth * truth);
      sum_difference += difference, sum_difference2 += difference * difference;
      sum_estimated += estimated / (truth * truth), sum_independent += independent / (truth * truth);
    }
    const double mean = sum_difference / kPopulations;
    const double std_error = std::sqrt((sum_difference2 / kPopulations - mean * mean) / (kPopulations - 1));
    EXPECT_EQ(is_capped, c.between == 1 && c.rate == 0.5);
    EXPECT_GT(mean, -4 * std_error);
    if (!is_capped) {
      EXPECT_LT(mean, 4 * std_error);
    }
    EXPECT_LT(sum_estimated, sum_independent);
  }
}

// Beside what the draw shows there is always a row of the ordinary weight, 1 / tau of the total, that may have been
// missed.
TEST(DrawnVariance, FewDraws) {
  EXPECT_NEAR(DrawnVariance(DrawnSums()).variance(2, 10, 0.1, 0), 0.04 * 0.1 + 0.04, 1e-12);
  DrawnSums sums;
  sums.add(3, 0.25);
  EXPECT_NEAR(DrawnVariance(sums).variance(100, 10, 0.2, 0), 9 * 0.75 + 100, 1e-12);
  EXPECT_EQ(DrawnVariance(sums).relative(0.2), 0);
  sums.add(3, 0.25);
  EXPECT_NEAR(DrawnVariance(sums).variance(100, 10, 0.2, 0), 9 * 0.2 + 100, 1e-12)
      << "equal weights err by the number of draws alone";
  EXPECT_NEAR(DrawnVariance(sums).relative(0.2), 9 * 0.2 / 36, 1e-12);
  EXPECT_NEAR(DrawnVariance(sums).variance(100, 10, 0.2, 0.5), 0.5 * 36 + 100, 1e-12) << "more scatter is usual";
  EXPECT_NEAR(DrawnVariance(sums).variance(100, 10, 0.2, 0.01), 9 * 0.2 + 100, 1e-12) << "less is";
  EXPECT_NEAR(DrawnVariance(sums).freedom(0.5), 1 + DrawnVariance::kUsualFreedom, 1e-12);
  EXPECT_NEAR(DrawnVariance(sums).for_draws(0.5, 2), 0.5, 1e-12);
  EXPECT_NEAR(DrawnVariance(sums).for_draws(0.5, 6), 1.5, 1e-12)
      << "a third of the draws, three times the relative variance";
}

TEST(DrawnVariance, CountOfDrawsIsRoundedBySegment) {
  const Cache cache({.num_kv_heads = 1, .kv_len = 4400});
  const auto index = build_index(cache);
  const IndexState& state = index->state();
  ASSERT_GT(state.segments.size(), 2u);
  const auto n = static_cast<size_t>(state.total_clusters());
  std::vector<float> sizes(n), probability(n, 0.0f);
  std::vector<Reading> readings(n, Reading::kDrawn);
  sizes[0] = sizes[1] = 10;
  const auto second = static_cast<size_t>(padded_clusters(state.segments[0].num_clusters));
  sizes[second] = 10;
  EXPECT_FALSE(undrawn_rows(state, sizes, probability, readings, false).any);
  probability[0] = probability[1] = 0.125f;  // 2.5 draws
  probability[second] = 0.025f;              // a quarter of one
  EXPECT_TRUE(undrawn_rows(state, sizes, probability, readings, false).any);
  EXPECT_NEAR(undrawn_rows(state, sizes, probability, readings, false).count_variance, 0.25 + 0.25 * 0.75, 1e-6);
  readings[second] = Reading::kRefined;
  EXPECT_NEAR(undrawn_rows(state, sizes, probability, readings, false).count_variance, 0.25 + 0.25 * 0.75, 1e-6);
  EXPECT_NEAR(undrawn_rows(state, sizes, probability, readings, true).count_variance, 0.25, 1e-6);
  readings[second] = Reading::kWhole;
  EXPECT_NEAR(undrawn_rows(state, sizes, probability, readings, false).count_variance, 0.25, 1e-6);
  readings[0] = Reading::kRefined;
  EXPECT_FALSE(all_read(sizes, readings));
  readings[1] = Reading::kRefined;
  EXPECT_TRUE(all_read(sizes, readings));
}

}  // namespace
}  // namespace tactic::test
