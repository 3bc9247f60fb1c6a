// read_on: which clusters come next; and the variance of a systematic draw from the draw itself.
#include "core/read_on.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "support.h"

namespace tactic::test {
namespace {

// Eight clusters of 10 rows, cluster c with share 2^-c of the two heads' rest (the second head in reverse order).
struct Scene {
  ClusterScores scores{8, std::vector<float>(16), std::vector<float>(8, 0.0f), std::vector<float>(8, 10.0f)};
  std::vector<float> norms2{1, 1};
  std::vector<SoftmaxState> exact{2};
  std::vector<char> whole = std::vector<char>(8);
  SelectParams params{2, norms2.data(), exact.data(), 1, 1};
  Scene() {
    for (int c = 0; c < 8; ++c)
      scores.dots[static_cast<size_t>(c)] = scores.dots[static_cast<size_t>(15 - c)] =
          static_cast<float>(-c * std::log(2.0));
  }
  std::vector<int32_t> next(std::vector<HeadMass> masses, double target) const {
    return read_on(scores, params, whole, masses, target);
  }
};

TEST(ReadOn, StopsWhenEveryHeadIsSure) {
  const Scene scene;
  EXPECT_TRUE(scene.next({{0.95, 0.01, 5}, {0.93, 0.01, 5}}, 0.9).empty());
  EXPECT_FALSE(scene.next({{0.95, 0.01, 5}, {0.91, 0.01, 5}}, 0.9).empty())
      << "within " << kSureness << " standard errors";
}

TEST(ReadOn, TakesTheHeaviestOfTheHeadsThatLack) {
  const Scene scene;
  // The first head has half its mass to find, which its first cluster holds almost exactly: 0.5 * 128 / 255.
  EXPECT_EQ(scene.next({{0.5, 0, 5}, {1, 0, 5}}, 0.74), (std::vector<int32_t>{0}));
  EXPECT_EQ(scene.next({{0.5, 0, 5}, {1, 0, 5}}, 0.86), (std::vector<int32_t>{0, 1}));
  EXPECT_EQ(scene.next({{1, 0, 5}, {0.5, 0, 5}}, 0.86), (std::vector<int32_t>{6, 7}));
  EXPECT_EQ(scene.next({{0.5, 0, 5}, {0.5, 0, 5}}, 0.74), (std::vector<int32_t>{0, 7}));
}

TEST(ReadOn, LeavesOutWhatIsReadOrEmpty) {
  Scene scene;
  scene.whole[0] = 1;
  scene.scores.sizes[1] = 0;
  EXPECT_EQ(scene.next({{0.5, 0, 5}, {1, 0, 5}}, 0.7), (std::vector<int32_t>{2}));
  std::fill(scene.whole.begin(), scene.whole.end(), 1);
  EXPECT_TRUE(scene.next({{0.5, 0, 5}, {1, 0, 5}}, 0.7).empty());
}

TEST(ReadOn, ReadsAllWhenNothingLessWillDo) {
  const Scene scene;
  EXPECT_EQ(scene.next({{0.2, 0.1, 5}, {0.2, 0.1, 5}}, 1).size(), 8u);
  // Nothing was drawn, yet the head is not sure: there must be something left.
  EXPECT_FALSE(scene.next({{1, 0.2, 5}, {1, 0, 5}}, 0.9).empty());
  // Estimates without any weight are shared out evenly.
  Scene blank;
  std::fill(blank.scores.dots.begin(), blank.scores.dots.end(), -HUGE_VALF);
  EXPECT_EQ(blank.next({{0.5, 0, 5}, {1, 0, 5}}, 0.9).size(), 7u);
}

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
        DrawnVariance drawn;
        for (size_t i = 0; i < weights.size(); ++i) {
          const double before = at;
          at += probabilities[i];
          if (std::floor(at) == std::floor(before)) continue;
          drawn.add(weights[i] / probabilities[i], probabilities[i]);
          drawn_sum += weights[i] / probabilities[i];
        }
        estimated += drawn.relative(count_variance) * drawn_sum * drawn_sum / kOffsets;
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

// Beside what the draw shows there is always a row of twice the ordinary weight, 1 / tau of the total, that may have
// been missed.
TEST(DrawnVariance, FewDraws) {
  EXPECT_NEAR(DrawnVariance().variance(2, 10, 0.1, 0), 0.04 * 0.1 + 4 * 0.04, 1e-12);
  DrawnVariance drawn;
  drawn.add(3, 0.25);
  EXPECT_NEAR(drawn.variance(100, 10, 0.2, 0), 9 * 0.75 + 400, 1e-12);
  EXPECT_EQ(drawn.relative(0.2), 0);
  drawn.add(3, 0.25);
  EXPECT_NEAR(drawn.variance(100, 10, 0.2, 0), 9 * 0.2 + 400, 1e-12)
      << "equal weights err by the number of draws alone";
  EXPECT_NEAR(drawn.relative(0.2), 9 * 0.2 / 36, 1e-12);
  EXPECT_NEAR(drawn.variance(100, 10, 0.2, 0.5),
              (9 * 0.2 + DrawnVariance::kUsualFreedom * 0.5 * 36) / (1 + DrawnVariance::kUsualFreedom) + 400, 1e-9)
      << "earlier steps have the more to say the less this one knows";
  EXPECT_NEAR(drawn.freedom(0.5), 1 + DrawnVariance::kUsualFreedom, 1e-12);
}

// Student's quantile around the logarithm of the rest.
TEST(MassBound, IsThatOfAPositiveRest) {
  const HeadMass head{0.9, 0.02, 1e6, 0};
  EXPECT_NEAR(mass_bound(head, kNormal95), 1 - 0.1 * std::exp(kNormal95 * 0.2), 1e-4);
  EXPECT_NEAR(mass_bound(head, -kNormal95), 1 - 0.1 * std::exp(-kNormal95 * 0.2), 1e-4);
  const HeadMass few{0.9, 0.02, 5, 0};
  EXPECT_NEAR(mass_bound(few, kNormal95), 1 - 0.1 * std::exp(2.571 * 0.2), 1e-3);
  const HeadMass wide{0.99, 0.05, 1e6, 0};  // more than one standard error of its own size: linear
  EXPECT_NEAR(mass_bound(wide, kNormal95), 1 - std::exp(1.0) * kNormal95 * 0.05, 1e-4);
  EXPECT_EQ(mass_bound({0.3, 0, 1, 0}, kNormal95), 0.3);
  EXPECT_EQ(mass_bound({0.3, 10, 1, 0}, kNormal95), 0);
  EXPECT_EQ(mass_bound({1, 0.1, 1, 0}, -kNormal95), 1);
}

TEST(DrawnVariance, CountOfDrawsIsRoundedBySegment) {
  const Cache cache({.num_kv_heads = 1, .kv_len = 4400});
  const auto index = build_index(cache);
  const IndexState& state = index->state();
  ASSERT_GT(state.segments.size(), 2u);
  const auto n = static_cast<size_t>(state.total_clusters());
  std::vector<float> sizes(n), probability(n, 0.0f);
  std::vector<char> whole(n);
  sizes[0] = sizes[1] = 10;
  const auto second = static_cast<size_t>(padded_clusters(state.segments[0].num_clusters));
  sizes[second] = 10;
  EXPECT_FALSE(undrawn_rows(state, sizes, probability, whole).any);
  probability[0] = probability[1] = 0.125f;  // 2.5 draws
  probability[second] = 0.025f;              // a quarter of one
  EXPECT_TRUE(undrawn_rows(state, sizes, probability, whole).any);
  EXPECT_NEAR(undrawn_rows(state, sizes, probability, whole).count_variance, 0.25 + 0.25 * 0.75, 1e-6);
  whole[second] = 1;
  EXPECT_NEAR(undrawn_rows(state, sizes, probability, whole).count_variance, 0.25, 1e-6);
}

}  // namespace
}  // namespace tactic::test
