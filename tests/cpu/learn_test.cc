// What steps learn stays sound whatever they are asked.
#include <algorithm>
#include <cmath>

#include "support.h"

namespace tactic::test {
namespace {

CacheSpec spec_of(int64_t kv_len, int32_t dim = 64) {
  CacheSpec spec;
  spec.kv_len = kv_len;
  spec.num_kv_heads = 1;
  spec.head_dim = dim;
  spec.topic_scale = 0.5f;
  return spec;
}

// Queries of one call were all predicted with the ratio of its beginning.
TEST(Learn, ManyQueriesOfOneIndexSettle) {
  const CacheSpec spec = spec_of(4000);
  constexpr size_t kQueries = 128;
  Problem problem(spec, 1);
  problem.build_index();
  problem.run({});  // fills in the query
  problem.index->forget_learned();
  std::vector<float> q(kQueries * 64), out(q.size());
  Random random(3);
  for (float& x : q) x = random.normal();
  std::vector<DecodeQuery> queries(kQueries, problem.query);
  for (size_t i = 0; i < kQueries; ++i) {
    queries[i].q = q.data() + 64 * i;
    queries[i].out = out.data() + 64 * i;
    queries[i].stream_id = i;
  }
  Attention attention({.target_error = 0.03f}, Backend::kCpu, 1);
  for (int64_t step = 0; step < 12; ++step) {
    for (DecodeQuery& query : queries) query.position = 4000 + step;
    attention.run(queries);
    const double ratio = problem.index->state().calibration[0].variance_ratio;
    EXPECT_GT(ratio, 0.5) << step;
    EXPECT_LT(ratio, 2.5) << step;
  }
}

// A dimension that all keys leave at 0 (padding) makes no score, but the estimates of all clusters senseless.
TEST(Learn, OneOddQueryIsForgotten) {
  const CacheSpec spec = spec_of(3000, 96);
  for (const float odd : {1e5f, 1e9f, 1e20f, 1e21f}) {
    SCOPED_TRACE(odd);
    Problem problem(spec, 1);
    for (int64_t row = 0; row < spec.kv_len; ++row) {
      std::vector<float> key = problem.cache.key(0, row);
      std::fill(key.begin() + 80, key.end(), 0.0f);
      problem.cache.set_key(0, row, key);
    }
    problem.build_index();
    const auto step = [&](int64_t position) {
      problem.query.position = position;
      const StepStats stats = problem.run({.target_error = 0.05f});
      return stats.tokens_certain + stats.tokens_sampled;
    };
    const float usual = problem.q[95];
    const int64_t rows = step(3000), after_usual = step(3008);
    const float beta = problem.index->state().calibration[0].beta();
    problem.q[95] = odd;
    step(3016);
    problem.q[95] = usual;
    EXPECT_NEAR(problem.index->state().calibration[0].beta(), beta, 0.1);
    EXPECT_LT(step(3024), 2 * std::max(rows, after_usual));
  }
}

TEST(Learn, TheVarianceRatioGoesWhereMeasurementsAre) {
  for (const double before : {0.12, 9.0}) {
    Problem problem(spec_of(4000), 1);
    problem.build_index();
    problem.index->state().calibration[0].variance_ratio = before;
    for (problem.query.position = 4001; problem.query.position < 4101; ++problem.query.position)
      problem.run({.tau = 300, .beta = 0.75f});
    EXPECT_GT(problem.index->state().calibration[0].variance_ratio, 0.4);
    EXPECT_LT(problem.index->state().calibration[0].variance_ratio, 2.5);
  }
}

// Keys without structure: some rows weigh more than 1% in clusters that promise little.
TEST(Learn, HeavyRowsOfPoorClustersAreRemembered) {
  CacheSpec spec = spec_of(4000);
  spec.topic_scale = 0;
  Problem problem(spec, 2, 5);
  problem.query.sm_scale = 0.3f;
  problem.build_index();
  const DecodeOptions options{.target_error = 0.05f};
  for (problem.query.position = 4001; problem.query.position < 4041; ++problem.query.position) problem.run(options);
  const Calibration& known = problem.index->state().calibration[0];
  ASSERT_FALSE(known.heavy.empty());
  problem.run({.select = Select::kDense});
  for (const int32_t row : known.heavy) {
    const std::vector<float> key = problem.cache.key(0, row);
    double most = 0;
    for (size_t g = 0; g < 2; ++g) {
      double score = 0;
      for (size_t d = 0; d < key.size(); ++d) score += problem.q[64 * g + d] * key[d] * problem.query.sm_scale;
      most = std::max(most, std::exp(score - problem.lse[g]));
    }
    EXPECT_GT(most, 0.008) << "row " << row << ": 1% as the step estimated it";
  }
  ASSERT_EQ(known.usual_variance.size(), 2U);
  for (const double variance : known.usual_variance) EXPECT_GT(variance, 0);
}

TEST(Learn, AStepThatMeetsAChangedRowTeachesNothing) {
  CacheSpec spec = spec_of(3000);
  spec.num_kv_heads = 2;
  Problem problem(spec, 1);
  problem.build_index();
  problem.query.position = 8;
  const DecodeOptions options{.target_error = 0.05f};
  problem.run(options);
  const std::vector<Calibration> before = problem.index->state().calibration;
  EXPECT_GT(before[0].sum_xx, 0);
  for (int64_t row = 4; row < 3000; ++row) problem.cache.set_value(1, row, std::vector<float>(64, 1.0f));
  problem.query.position = 16;
  EXPECT_EQ(problem.run(options).dense, DenseReason::kRowChanged);
  for (size_t head = 0; head < 2; ++head) {
    const Calibration& after = problem.index->state().calibration[head];
    EXPECT_EQ(after.sum_xx, before[head].sum_xx) << head;
    EXPECT_EQ(after.variance_ratio, before[head].variance_ratio) << head;
    EXPECT_EQ(after.usual_variance, before[head].usual_variance) << head;
    EXPECT_EQ(after.expected, before[head].expected) << head;
  }
}

// What was measured long ago weighs next to nothing: the sums settle.
TEST(Learn, PairsAreForgotten) {
  Problem problem(spec_of(1500), 1);
  problem.build_index();
  double sum[2];
  for (int64_t step = 0; step < 600; ++step) {
    problem.query.position = 8 * step;  // a step that learns
    problem.run({.tau = 1000, .check_rows = false});
    sum[step / 300] = problem.index->state().calibration[0].sum_xx;
  }
  EXPECT_GT(sum[0], 0);
  EXPECT_NEAR(sum[1] / sum[0], 1, 0.2);
}

// Sixty rows of more than 1% each, and no more than 32 rows after them are named.
TEST(Learn, FollowersAreFew) {
  Problem problem(spec_of(1500), 1);
  double norm2 = 0;
  for (const float x : problem.q) norm2 += double{x} * x;
  for (int64_t row = 100; row < 700; row += 10) {
    std::vector<float> key(problem.q);
    for (float& x : key) x *= static_cast<float>(20 / (norm2 * problem.query.sm_scale));
    problem.cache.set_key(0, row, key);
  }
  problem.build_index();
  problem.run({.tau = 1e6f});
  const std::vector<int32_t>& expected = problem.index->state().calibration[0].expected;
  ASSERT_EQ(expected.size(), 32u);
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_EQ(expected[i], 101 + 10 * static_cast<int32_t>(i));
}

}  // namespace
}  // namespace tactic::test
