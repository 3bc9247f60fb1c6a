// Weights, their sums and the heavy ones among them against doubles, on every instruction set of the machine.
#include "core/drawn_variance.h"
#include "cpu/steps.h"
#include "support.h"

namespace tactic::test {
namespace {

TEST(ExpWeights, ExponentialsAndTheirSum) {
  Random random(2);
  for (const int64_t target : highway_targets()) {
    const OnTarget on(target);
    for (int64_t count = 0; count <= 70; ++count) {
      SCOPED_TRACE(text(target_name(target), ", count ", count));
      std::vector<float> scores(static_cast<size_t>(count)), weights(scores.size() + 1, -5.0f);
      for (float& score : scores) score = 10 * random.normal();
      if (count > 3) scores[2] = -HUGE_VALF, scores[3] = -1000;
      const float max = cpu::max_score(scores.data(), count);
      EXPECT_EQ(max, count == 0 ? -HUGE_VALF : *std::max_element(scores.begin(), scores.end()));
      const float sum = cpu::exp_weights(scores.data(), count, max, weights.data());
      double expected = 0;
      for (int64_t i = 0; i < count; ++i) {
        const double weight = std::exp(static_cast<double>(scores[i]) - max);
        expected += weight;
        ASSERT_NEAR(weights[i], weight, 2e-6 * weight + 1e-37);
      }
      EXPECT_NEAR(sum, expected, 2e-6 * expected);
      EXPECT_EQ(weights.back(), -5.0f);
      EXPECT_EQ(cpu::exp_weights(scores.data(), count, max, scores.data()), sum) << "in place";
    }
  }
}

TEST(ExpWeights, NanStaysNanAndHugeScoresAreHuge) {
  for (const int64_t target : highway_targets()) {
    const OnTarget on(target);
    for (const int64_t count : {1, 5, 16, 21}) {
      for (int64_t at = 0; at < count; ++at) {
        SCOPED_TRACE(text(target_name(target), ", count ", count, ", at ", at));
        std::vector<float> scores(static_cast<size_t>(count), 1.0f), weights(scores.size());
        scores[at] = std::nanf("");
        ASSERT_TRUE(std::isnan(cpu::exp_weights(scores.data(), count, 1, weights.data())));
        ASSERT_TRUE(std::isnan(weights[at]));
        for (const float above : {80.0f, 100.0f, 130.0f, 200.0f, 1000.0f, 1e6f, HUGE_VALF}) {
          scores[at] = above;
          ASSERT_GT(cpu::exp_weights(scores.data(), count, 0, weights.data()), 1e30f) << "score " << above;
        }
      }
    }
  }
}

TEST(SampledWeights, WeightsAndTheirSums) {
  Random random(2);
  for (const int64_t target : highway_targets()) {
    const OnTarget on(target);
    for (int64_t count = 0; count <= 200; count += count < 70 ? 1 : 61) {
      SCOPED_TRACE(text(target_name(target), ", count ", count));
      std::vector<float> scores(static_cast<size_t>(count)), log_weights(scores.size()),
          weights(scores.size() + 1, -5.0f);
      DrawnSums sums, expected;
      sums.add(1.5, 0.25), expected.add(1.5, 0.25);  // draws before
      double largest = 0;
      for (int64_t i = 0; i < count; ++i) {
        scores[i] = 3 * random.normal();
        log_weights[i] = i % 5 == 0 ? 0 : 4 * static_cast<float>(random.uniform());
      }
      const float found = cpu::sampled_weights(scores.data(), log_weights.data(), count, 2.0f, weights.data(), sums);
      for (int64_t i = 0; i < count; ++i) {
        const double weight = std::exp(static_cast<double>(scores[i]) + log_weights[i] - 2);
        ASSERT_NEAR(weights[i], weight, 3e-6 * weight);
        largest = std::max(largest, weight);
        expected.add(weights[i], std::exp(-double{log_weights[i]}));
      }
      EXPECT_NEAR(found, largest, 3e-6 * largest);
      EXPECT_NEAR(sums.differences, expected.differences, 1e-6 * expected.differences);
      EXPECT_NEAR(sums.squares, expected.squares, 1e-6 * expected.squares);
      EXPECT_NEAR(sums.independent, expected.independent, 1e-6 * expected.independent);
      EXPECT_NEAR(sums.sum, expected.sum, 1e-12 * expected.sum);
      EXPECT_EQ(sums.count, expected.count);
      EXPECT_EQ(sums.first, 1.5);
      EXPECT_EQ(sums.last, expected.last);
      EXPECT_NEAR(sums.last_left, expected.last_left, 1e-6);
      EXPECT_EQ(weights.back(), -5.0f);
      if (count == 0) continue;
      scores[count / 2] = std::nanf("");
      cpu::sampled_weights(scores.data(), log_weights.data(), count, 2.0f, weights.data(), sums);
      EXPECT_TRUE(std::isnan(sums.sum));
    }
  }
}

TEST(MaxScore, FindsNanAnywhere) {
  for (const int64_t target : highway_targets()) {
    const OnTarget on(target);
    for (const int64_t count : {1, 7, 16, 17, 40}) {
      for (int64_t at = 0; at < count; ++at) {
        SCOPED_TRACE(text(target_name(target), ", count ", count, ", at ", at));
        std::vector<float> scores(static_cast<size_t>(count), 1.0f);
        scores[at] = std::nanf("");
        ASSERT_TRUE(std::isnan(cpu::max_score(scores.data(), count)));
        scores[at] = HUGE_VALF;
        ASSERT_EQ(cpu::max_score(scores.data(), count), HUGE_VALF);
        std::fill(scores.begin(), scores.end(), -HUGE_VALF);
        ASSERT_EQ(cpu::max_score(scores.data(), count), -HUGE_VALF);
      }
    }
  }
}

TEST(MaxUsed, LooksAtClustersThatHoldRowsAlone) {
  constexpr int64_t kCount = 48;
  for (const int64_t target : highway_targets()) {
    const OnTarget on(target);
    for (int64_t at = 0; at < kCount; ++at) {
      SCOPED_TRACE(text(target_name(target), ", at ", at));
      std::vector<float> dots(kCount, -3.0f), sizes(kCount, 2.0f);
      const auto max_used = [&] { return cpu::max_used(dots.data(), sizes.data(), kCount, -1.0f); };
      ASSERT_EQ(max_used(), -1.0f);  // the floor
      dots[at] = 5;
      ASSERT_EQ(max_used(), 5.0f);
      for (const float odd : {std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
        dots[at] = odd;
        sizes[at] = 2;
        ASSERT_TRUE(std::isnan(max_used())) << odd;
        sizes[at] = 0;
        ASSERT_EQ(max_used(), -1.0f) << odd;
      }
    }
  }
}

TEST(Heavier, PlacesOfAllAboveTheLimit) {
  Random random(5);
  for (const int64_t target : highway_targets()) {
    const OnTarget on(target);
    for (int64_t count = 0; count <= 70; ++count) {
      SCOPED_TRACE(text(target_name(target), ", count ", count));
      for (const float limit : {-1.0f, 0.5f, 0.97f, 1.0f}) {  // all, half, few, none
        std::vector<float> weights(static_cast<size_t>(count));
        std::vector<int32_t> expected;
        for (int64_t i = 0; i < count; ++i) {
          weights[i] = i % 7 == 3 ? limit : static_cast<float>(random.uniform());
          if (weights[i] > limit) expected.push_back(static_cast<int32_t>(i));
        }
        std::vector<int32_t> found(static_cast<size_t>(count) + 1, -5);
        const int64_t num = cpu::heavier(weights.data(), count, limit, found.data());
        EXPECT_EQ(found.back(), -5);
        found.resize(static_cast<size_t>(num));
        ASSERT_EQ(found, expected) << "limit " << limit;
      }
    }
  }
}

}  // namespace
}  // namespace tactic::test
