// What the command says of distributions, means and reading, against values from paper.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

#include "kl.h"
#include "report.h"

namespace tactic::tool {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

TEST(CompareLogits, IsTheDivergenceOfTheExactDistribution) {
  const float exact[] = {5, 5 + std::log(3.0f)}, other[] = {-2, -2};  // 1/4, 3/4 and 1/2, 1/2
  const TokenComparison token = compare_logits(exact, other, 2, 0);
  EXPECT_NEAR(token.kl, 0.25 * std::log(0.5) + 0.75 * std::log(1.5), 1e-6);
  EXPECT_NEAR(compare_logits(other, exact, 2, 0).kl, 0.5 * std::log(2) + 0.5 * std::log(2.0 / 3), 1e-6);
  EXPECT_NEAR(token.exact_nll, std::log(4), 1e-6);
  EXPECT_NEAR(token.nll, std::log(2), 1e-6);
  EXPECT_EQ(token.exact_top, 1);
  EXPECT_EQ(token.top, 0);  // the first of equal ones
}

TEST(CompareLogits, KnowsTokensThatCannotCome) {
  const float exact[] = {kNever, 0, 0}, other[] = {0, 0, 0};
  EXPECT_NEAR(compare_logits(exact, other, 3, 1).kl, std::log(1.5), 1e-6);
  EXPECT_EQ(compare_logits(exact, exact, 3, 1).kl, 0);
  EXPECT_TRUE(std::isinf(compare_logits(other, exact, 3, 1).kl));
  EXPECT_TRUE(std::isinf(compare_logits(exact, other, 3, 0).exact_nll));
}

TEST(Quantile, IsLinearBetweenRanks) {
  const double values[] = {3, 1, 2, 5};
  EXPECT_EQ(quantile(values, 0), 1);
  EXPECT_EQ(quantile(values, 0.5), 2.5);
  EXPECT_EQ(quantile(values, 0.9), 3 + 0.7 * 2);
  EXPECT_EQ(quantile(values, 1), 5);
  EXPECT_TRUE(std::isnan(quantile({}, 0.5)));
  EXPECT_EQ(mean(values), 2.75);
  EXPECT_TRUE(std::isnan(mean({})));
}

// Of 16 blocks that are all 0 or all 1 as often, a resample's mean is a binomial variable over 16: at most 3 of
// them 1.1% of the time, at most 4 3.8%.
TEST(BootstrapMean, HoldsTheMiddle95PercentOfTheResamples) {
  std::vector<double> values(16 * 16);
  for (size_t i = 0; i < values.size(); ++i) values[i] = i / 16 % 2 == 0 ? 0 : 1;
  const std::optional<Interval> interval = bootstrap_mean(values, values.size(), 16);
  ASSERT_TRUE(interval);
  EXPECT_EQ(interval->low, 4 / 16.0);
  EXPECT_EQ(interval->high, 12 / 16.0);
}

TEST(BootstrapMean, TakesEightBlocksAndNoneOverTheEndOfASeries) {
  const std::vector<double> values(4 * 24, 0.5);
  EXPECT_FALSE(bootstrap_mean(values, values.size(), 16));                  // 6 blocks
  const std::optional<Interval> interval = bootstrap_mean(values, 24, 16);  // 16 and 8 of each of 4
  ASSERT_TRUE(interval);
  EXPECT_EQ(interval->low, 0.5);
  EXPECT_EQ(interval->high, 0.5);
  EXPECT_FALSE(bootstrap_mean(std::span(values).first(3 * 24 + 16), 24, 16));  // 7
}

// A short block counts as many values as it has: blocks of 15 ones and one 0 have a mean of 15/16, not of 1/2.
TEST(BootstrapMean, WeighsBlocksByTheirValues) {
  std::vector<double> values(64 * 16);
  for (size_t i = 0; i < values.size(); ++i) values[i] = i % 16 < 15 ? 1 : 0;
  const std::optional<Interval> interval = bootstrap_mean(values, 16, 15);
  ASSERT_TRUE(interval);
  EXPECT_NEAR(interval->low, 15 / 16.0, 0.03);
  EXPECT_NEAR(interval->high, 15 / 16.0, 0.03);
}

// Over many series in which each value repeats the one before with probability 0.7, about 95% of the intervals hold the
// true rate; of those that take the values for independent far fewer do.
TEST(Wilson, OfSeriesInWhichNeighborsVaryTogether) {
  std::mt19937_64 random(5);
  std::bernoulli_distribution fresh(0.3), success(0.9);
  constexpr int kSeries = 400;
  int holds = 0, independent_holds = 0;
  for (int series = 0; series < kSeries; ++series) {
    std::vector<double> values(4 * 384);
    for (size_t i = 0; i < values.size(); ++i)
      values[i] = i % 384 == 0 || fresh(random) ? (success(random) ? 1 : 0) : values[i - 1];
    const auto holds_rate = [](const Interval& interval) { return interval.low <= 0.9 && 0.9 <= interval.high; };
    holds += holds_rate(wilson_of_series(values, 384, 16));
    independent_holds += holds_rate(wilson(std::accumulate(values.begin(), values.end(), 0.0), 4 * 384));
  }
  EXPECT_GT(holds, 0.88 * kSeries);
  EXPECT_LT(independent_holds, 0.75 * kSeries);
}

TEST(Wilson, OfASeriesWithoutScatterIsThatOfTrials) {
  const std::vector<double> all(384, 1.0), few{1, 0, 1, 1};
  EXPECT_EQ(wilson_of_series(all, 384, 16).low, wilson(384, 384).low);
  EXPECT_EQ(wilson_of_series(few, 4, 16).low, wilson(3, 4).low);
  EXPECT_EQ(wilson_of_series({}, 4, 16).high, 1);
}

TEST(Wilson, HasTheValuesOfTheTables) {
  const Interval most = wilson(8, 10), none = wilson(0, 10), all = wilson(10, 10), nothing = wilson(0, 0);
  EXPECT_NEAR(most.low, 0.4902, 1e-4);
  EXPECT_NEAR(most.high, 0.9433, 1e-4);
  EXPECT_NEAR(none.low, 0, 1e-12);
  EXPECT_NEAR(none.high, 0.2775, 1e-4);
  EXPECT_NEAR(all.low, 0.7225, 1e-4);
  EXPECT_NEAR(all.high, 1, 1e-12);
  EXPECT_EQ(nothing.low, 0);
  EXPECT_EQ(nothing.high, 1);
}

TEST(ReadFigures, CountTheIndexAndEveryRow) {
  tactic_totals totals = {};
  totals.queries = 4;
  totals.dense_queries = 1;
  totals.sparse_queries = 3;
  totals.kv_heads = 6;
  totals.tokens_certain = 300;
  totals.tokens_sampled = 60;
  totals.index_bytes = 100;
  totals.kv_bytes = 300;
  totals.kv_bytes_present = 1600;
  totals.mass_variance = 0.27;
  const ReadFigures read(totals, 1000);
  EXPECT_EQ(read.tokens_per_kv_head, 60);
  EXPECT_EQ(read.read_fraction, 0.25);
  EXPECT_NEAR(read.mass_std_error, 0.3, 1e-12);
  EXPECT_EQ(read.dense_share, 0.25);
  EXPECT_TRUE(read.taken);
}

TEST(ReadFigures, OfAModeThatTookNothingAreThoseOfAllRows) {
  const ReadFigures read({}, 1000);
  EXPECT_EQ(read.tokens_per_kv_head, 1000);
  EXPECT_EQ(read.read_fraction, 1);
  EXPECT_EQ(read.dense_share, 1);
  EXPECT_FALSE(read.taken);
}

TEST(Totals, AreAddedFieldByField) {
  tactic_totals part = {}, sum = {};
  int64_t next = 1;
  for (int64_t* field :
       {&part.nodes, &part.queries, &part.dense_queries, &part.changed_queries, &part.kv_heads, &part.tokens_certain,
        &part.tokens_sampled, &part.tokens_value, &part.refined_clusters, &part.index_bytes, &part.kv_bytes,
        &part.kv_bytes_present, &part.sparse_queries, &part.attend_ns, &part.write_ns, &part.cluster_ns})
    *field = next++;
  part.estimated_mass = 0.5;
  part.mass_variance = 0.25;
  part.index_memory_bytes = 7, part.kv_memory_bytes = 8;
  add_totals(sum, part);
  EXPECT_EQ(std::memcmp(&sum, &part, sizeof sum), 0);  // NOLINT(bugprone-suspicious-memory-comparison)
  add_totals(sum, part);
  next = 1;
  for (const int64_t field :
       {sum.nodes, sum.queries, sum.dense_queries, sum.changed_queries, sum.kv_heads, sum.tokens_certain,
        sum.tokens_sampled, sum.tokens_value, sum.refined_clusters, sum.index_bytes, sum.kv_bytes, sum.kv_bytes_present,
        sum.sparse_queries, sum.attend_ns, sum.write_ns, sum.cluster_ns})
    EXPECT_EQ(field, 2 * next++);
  EXPECT_EQ(sum.estimated_mass, 1);
  EXPECT_EQ(sum.mass_variance, 0.5);
  EXPECT_EQ(sum.index_memory_bytes, 7) << "what there is now";
  EXPECT_EQ(sum.kv_memory_bytes, 8);
}

}  // namespace
}  // namespace tactic::tool
