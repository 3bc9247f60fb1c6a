// read_on: which clusters come next.
#include "core/read_on.h"

#include <algorithm>
#include <cmath>

#include "support.h"

namespace tactic::test {
namespace {

// Eight clusters of 10 rows, cluster c with share 2^-c of the two heads' rest (the second head in reverse order).
struct Scene {
  ClusterScores scores{8, std::vector<float>(16), std::vector<float>(8, 0.0f), std::vector<float>(8, 10.0f)};
  std::vector<float> norms2{1, 1};
  std::vector<SoftmaxState> exact{2};
  std::vector<Reading> readings = std::vector<Reading>(8, Reading::kDrawn);
  SelectParams params{2, norms2.data(), exact.data(), 1, 1};
  Scene() {
    for (int c = 0; c < 8; ++c)
      scores.dots[static_cast<size_t>(c)] = scores.dots[static_cast<size_t>(15 - c)] =
          static_cast<float>(-c * std::log(2.0));
  }
  std::vector<int32_t> next(std::vector<HeadMass> masses, double target) const {
    return read_on(scores, params, readings, masses, target).read;
  }
};

TEST(ReadOn, StopsWhenEveryHeadIsSure) {
  const Scene scene;
  EXPECT_TRUE(scene.next({{0.95, 0.005, 50}, {0.93, 0.005, 50}}, 0.9).empty());
  EXPECT_FALSE(scene.next({{0.95, 0.005, 50}, {0.91, 0.005, 50}}, 0.9).empty())
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
  scene.readings[0] = Reading::kWhole;
  scene.scores.sizes[1] = 0;
  EXPECT_EQ(scene.next({{0.5, 0, 5}, {1, 0, 5}}, 0.7), (std::vector<int32_t>{2}));
  std::fill(scene.readings.begin(), scene.readings.end(), Reading::kWhole);
  EXPECT_TRUE(scene.next({{0.5, 0, 5}, {1, 0, 5}}, 0.7).empty());
}

// Those that would have been read whole whatever was drawn from them, had they not been refined.
TEST(ReadOn, RefinedClustersOfTheSameRankGoSilent) {
  Scene scene;
  for (const size_t c : {1, 5}) scene.readings[c] = Reading::kRefined;
  const auto next = [&](double target) {
    return read_on(scene.scores, scene.params, scene.readings, std::vector<HeadMass>{{0.5, 0, 5}, {1, 0, 5}}, target);
  };
  // Of what is left the clusters 0, 2, 3, 4 hold 128, 32, 16, 8 of 187 parts.
  EXPECT_EQ(next(0.5 + 0.5 * 127 / 187).read, (std::vector<int32_t>{0}));
  EXPECT_TRUE(next(0.5 + 0.5 * 127 / 187).silent.empty());
  EXPECT_EQ(next(0.5 + 0.5 * 129 / 187).read, (std::vector<int32_t>{0, 2}));
  EXPECT_EQ(next(0.5 + 0.5 * 129 / 187).silent, (std::vector<int32_t>{1}));
  EXPECT_EQ(next(0.5 + 0.5 * 186.5 / 187).silent, (std::vector<int32_t>{1, 5}));
  EXPECT_TRUE(next(0.5).read.empty());
  EXPECT_TRUE(next(0.5).silent.empty());
  std::fill(scene.readings.begin(), scene.readings.end(), Reading::kRefined);
  EXPECT_TRUE(next(0.9).read.empty()) << "nothing is left";
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

}  // namespace
}  // namespace tactic::test
