// What must hold of selections whatever the numbers: everything selected is dense, more accuracy reads more.
#include <algorithm>

#include "support.h"

namespace tactic::test {
namespace {

CacheSpec spec_of(int64_t kv_len, DType dtype = DType::kF16) {
  CacheSpec spec;
  spec.k_dtype = spec.v_dtype = dtype;
  spec.kv_len = kv_len;
  return spec;
}

constexpr Backend kBackends[] = {Backend::kCpu, Backend::kReference};

// Options that leave no row out.
const DecodeOptions kEverything[] = {
    {.select = Select::kSample, .tau = 1e9f, .beta = 1},
    {.select = Select::kFit, .target_mass = 1},
    {.select = Select::kTopK, .budget = 1 << 30},
};

// Two sequences in one cache, each of which finds a heavy row of its own.
TEST(Selection, QueriesOfOneIndexNameRowsForEachOfThem) {
  constexpr int64_t kRows = 1600, kHalf = 800;
  Problem problem(spec_of(kRows), 1, 7, 0.1f);
  const std::vector<float> one(64, 2.0f);
  for (const int64_t row : {300, 1100}) problem.cache.set_key(0, row, one);
  problem.build_index();
  std::vector<uint64_t> visible[2] = {std::vector<uint64_t>(kRows / 64), std::vector<uint64_t>(kRows / 64)};
  for (int64_t row = 0; row < kRows; ++row) visible[row / kHalf][row / 64] |= uint64_t{1} << (row % 64);
  std::vector<float> q(problem.q.size(), 0.0f), out[2] = {problem.out, problem.out};
  std::fill_n(q.begin(), 64, 1.0f);
  std::vector<DecodeQuery> queries(2, problem.query);
  for (size_t i = 0; i < 2; ++i) {
    queries[i].kv = problem.cache.view();
    queries[i].index = problem.index.get();
    queries[i].q = q.data();
    queries[i].visible = visible[i].data();
    queries[i].out = out[i].data();
    queries[i].lse = nullptr;
  }
  Attention attention({.select = Select::kSample, .tau = 300});
  attention.run(queries);
  const std::vector<int32_t>& expected = problem.index->state().calibration[0].expected;
  EXPECT_TRUE(std::binary_search(expected.begin(), expected.end(), 301)) << ::testing::PrintToString(expected);
  EXPECT_TRUE(std::binary_search(expected.begin(), expected.end(), 1101)) << ::testing::PrintToString(expected);
  queries.pop_back();
  attention.run(queries);
  EXPECT_TRUE(std::binary_search(expected.begin(), expected.end(), 301));
  EXPECT_FALSE(std::binary_search(expected.begin(), expected.end(), 1101)) << "of the step before";
}

TEST(Selection, EverythingSelectedIsDense) {
  for (const DType dtype : kAllTypes) {
    for (const double seen : {1.0, 0.5}) {
      Problem problem(spec_of(1800, dtype), 3, 7, 0.3f);  // blunt enough that no weight is below 1 / tau
      problem.build_index({.segment_tokens = 1024});
      const std::vector<uint64_t> visible = random_bits(1800, seen, 2);
      if (seen < 1) problem.query.visible = visible.data();
      for (const Backend backend : kBackends) {
        const StepStats dense = problem.run({.select = Select::kDense}, backend);
        const std::vector<float> out = problem.out, lse = problem.lse;
        for (const DecodeOptions& options : kEverything) {
          const char* name = backend == Backend::kCpu ? " cpu" : " reference";
          SCOPED_TRACE(text(dtype_name(dtype), " visible ", seen, " ", select_name(options.select), name));
          const StepStats stats = problem.run(options, backend);
          EXPECT_EQ(stats.dense, DenseReason::kNone);
          EXPECT_EQ(stats.tokens_certain, dense.tokens_certain);
          EXPECT_EQ(stats.tokens_sampled, 0);
          EXPECT_DOUBLE_EQ(stats.estimated_mass, 1);
          EXPECT_EQ(stats.mass_std_error, 0);
          EXPECT_LT(relative_error(problem.out, out), 1e-5);
          for (size_t h = 0; h < lse.size(); ++h) EXPECT_NEAR(problem.lse[h], lse[h], 1e-5);
        }
      }
    }
  }
}

TEST(Selection, SmallerTargetErrorReadsMoreAndErrsLess) {
  Problem problem(spec_of(8000), 3, 7, 0.3f);
  problem.build_index();
  problem.run({.select = Select::kDense});
  const std::vector<float> exact = problem.out;
  int64_t read = 0;
  double largest = 0, smallest = 0;
  for (const float target_error : {1.0f, 0.2f, 0.05f, 0.02f, 0.005f, 0.001f}) {
    double error = 0;
    int64_t tokens = 0;
    for (int64_t position = 0; position < 8; ++position) {
      problem.query.position = position;
      problem.index->state().calibration.assign(2, {});
      const StepStats stats = problem.run({.target_error = target_error, .refine = 1, .beta = 1});
      tokens += stats.tokens_value;
      error += relative_error(problem.out, exact) / 8;
    }
    EXPECT_GE(tokens, read) << "target_error " << target_error;
    read = tokens;
    if (largest == 0) largest = error;
    smallest = error;
  }
  EXPECT_GT(largest, 5 * smallest);
  EXPECT_LT(smallest, 0.005);
}

TEST(Selection, LargerTargetMassReadsMoreAndErrsLess) {
  Problem problem(spec_of(8000), 3, 7, 0.2f);
  problem.build_index();
  problem.run({.select = Select::kDense});
  const std::vector<float> exact = problem.out;
  int64_t read = 0;
  double error = HUGE_VAL;
  for (const float target_mass : {0.1f, 0.5f, 0.9f, 0.99f, 1.0f}) {
    const StepStats stats = problem.run({.select = Select::kFit, .target_mass = target_mass});
    EXPECT_GE(stats.tokens_certain, read);
    EXPECT_EQ(stats.tokens_sampled, 0);
    const double now = relative_error(problem.out, exact);
    EXPECT_LE(now, error);
    error = now;
    read = stats.tokens_certain;
  }
  EXPECT_EQ(read, 16000);
  EXPECT_LT(error, 1e-5);
}

// A head that reads certain rows alone has their mass: exp(lse) over the dense one.
TEST(Selection, FitReachesItsTargetMassMostly) {
  for (const float target_mass : {0.5f, 0.8f, 0.9f}) {
    int reached = 0, heads = 0;
    for (uint64_t seed = 1; seed <= 6; ++seed) {
      Problem problem(spec_of(6000), 2, seed, 0.15f);
      problem.build_index();
      problem.run({.select = Select::kDense});
      const std::vector<float> lse = problem.lse;
      problem.run({.select = Select::kFit, .target_mass = target_mass});
      for (size_t h = 0; h < lse.size(); ++h, ++heads) reached += std::exp(problem.lse[h] - lse[h]) >= target_mass;
    }
    EXPECT_GE(reached, heads * 6 / 10) << "target_mass " << target_mass;
  }
}

TEST(Selection, TopKReadsItsBudget) {
  Problem problem(spec_of(5000), 1);
  problem.build_index();
  const int64_t exact = 2 * (5000 - problem.index->rows_indexed());
  for (const int32_t budget : {1, 100, 1000}) {
    const StepStats stats = problem.run({.select = Select::kTopK, .budget = budget});
    EXPECT_GE(stats.tokens_certain, exact + 2 * budget);
    EXPECT_LE(stats.tokens_certain, exact + 2 * budget + 2 * 2 * 20) << "a cluster more for each head";
  }
}

TEST(Selection, SparseReadsLess) {
  Problem problem(spec_of(16000), 3);
  problem.build_index();
  for (const Select select : {Select::kSample, Select::kFit, Select::kTopK}) {
    const StepStats stats = problem.run({.select = select, .budget = 300});
    EXPECT_EQ(stats.dense, DenseReason::kNone);
    EXPECT_LT(stats.read_fraction(), 0.35) << select_name(select);
    EXPECT_GT(stats.read_fraction(), 0.01) << select_name(select);
    EXPECT_GT(stats.index_bytes, 0);
    EXPECT_EQ(stats.kv_bytes_present, int64_t{16000} * 2 * 256);
  }
  EXPECT_DOUBLE_EQ(problem.run({.select = Select::kDense}).read_fraction(), 1);
}

TEST(Selection, EqualKeysShareTheWeight) {
  CacheSpec spec = spec_of(3000);
  Problem problem(spec, 3);
  for (int64_t row = 0; row < spec.kv_len; ++row) {
    for (int32_t head = 0; head < 2; ++head) problem.cache.set_key(head, row, std::vector<float>(64, 0.25f));
  }
  problem.build_index();
  problem.run({.select = Select::kDense});
  const std::vector<float> lse = problem.lse;
  StepStats stats = problem.run({.tau = 500, .beta = 1});
  for (size_t h = 0; h < lse.size(); ++h)
    EXPECT_NEAR(problem.lse[h], lse[h], 0.01) << "every row weighs the same, so only the count varies";
  EXPECT_NEAR(static_cast<double>(stats.tokens_sampled), 2 * 500 * 0.95, 80);
  stats = problem.run({.select = Select::kFit, .target_mass = 0.8f});
  EXPECT_NEAR(static_cast<double>(stats.tokens_certain), 0.8 * 2 * 3000, 10);
  for (size_t h = 0; h < lse.size(); ++h) EXPECT_NEAR(problem.lse[h], lse[h] + std::log(0.8f), 0.002);
  problem.run({.select = Select::kTopK, .budget = 100});
  for (const float x : problem.out) EXPECT_TRUE(std::isfinite(x));
}

TEST(Selection, OneRowIsItsValue) {
  for (const Select select : {Select::kDense, Select::kSample, Select::kFit, Select::kTopK}) {
    for (const Backend backend : kBackends) {
      Problem problem(spec_of(1), 3);
      problem.build_index();
      const StepStats stats = problem.run({.select = select}, backend);
      EXPECT_EQ(stats.dense, select == Select::kDense ? DenseReason::kAsked : DenseReason::kNoIndex);
      EXPECT_EQ(stats.tokens_certain, 2);
      for (size_t h = 0; h < 6; ++h) {
        const std::vector<float> v = problem.cache.value(static_cast<int32_t>(h / 3), 0);
        for (size_t d = 0; d < 64; ++d) EXPECT_NEAR(problem.out[h * 64 + d], v[d], 1e-6);
      }
    }
  }
}

TEST(Selection, OneVisibleRowAmongMany) {
  for (const Select select : {Select::kDense, Select::kSample, Select::kFit, Select::kTopK}) {
    for (const Backend backend : kBackends) {
      Problem problem(spec_of(2000), 3);
      problem.build_index();
      std::vector<uint64_t> visible(32);
      visible[1234 >> 6] |= uint64_t{1} << (1234 & 63);
      problem.query.visible = visible.data();
      problem.run({.select = select}, backend);
      for (size_t h = 0; h < 6; ++h) {
        const std::vector<float> v = problem.cache.value(static_cast<int32_t>(h / 3), 1234);
        for (size_t d = 0; d < 64; ++d) EXPECT_NEAR(problem.out[h * 64 + d], v[d], 1e-5);
      }
    }
  }
}

TEST(Selection, NoVisibleRowGivesZeros) {
  for (const Select select : {Select::kDense, Select::kSample, Select::kFit, Select::kTopK}) {
    for (const Backend backend : kBackends) {
      for (const int64_t kv_len : {0, 2000}) {
        Problem problem(spec_of(kv_len), 3);
        problem.build_index();
        const std::vector<uint64_t> visible(static_cast<size_t>(kv_len / 64 + 1));
        problem.query.visible = visible.data();
        const StepStats stats = problem.run({.select = select}, backend);
        EXPECT_EQ(stats.tokens_value, 0);
        EXPECT_EQ(stats.kv_len, 0);
        EXPECT_EQ(stats.read_fraction(), 0);
        EXPECT_EQ(problem.out, std::vector<float>(problem.out.size()));
        EXPECT_EQ(problem.lse, std::vector<float>(problem.lse.size(), -HUGE_VALF));
      }
    }
  }
}

// What steps with other groups have learned of their heads says nothing of these.
TEST(Selection, TheGroupOfAnIndexMayChange) {
  constexpr int32_t kGroup = 8;
  CacheSpec spec = spec_of(4000);
  spec.num_kv_heads = 1;
  Problem problem(spec, kGroup, 7, 0.1f);
  const DecodeOptions options{.tau = 100, .refine = 1, .beta = 1};
  for (const Backend backend : kBackends) {
    std::vector<MassEstimate> masses[2];
    std::vector<double> usual[2];
    for (const bool changes : {false, true}) {
      problem.build_index();
      std::vector<double>& known = problem.index->state().calibration[0].usual_variance;
      problem.query.masses = nullptr;
      if (changes) {
        problem.query.num_q_heads = 1;
        problem.run(options);
        ASSERT_EQ(known.size(), 1u);
        const std::vector<double> of_one = known;
        problem.index->forget_learned();
        known = of_one;
        known[0] *= 100;
      }
      problem.query.num_q_heads = kGroup;
      masses[changes].resize(kGroup);
      problem.query.masses = masses[changes].data();
      problem.run(options, backend);
      usual[changes] = known;
    }
    for (size_t g = 0; g < kGroup; ++g) {
      EXPECT_GT(masses[0][g].std_error, 0);
      EXPECT_EQ(masses[0][g].std_error, masses[1][g].std_error) << "head " << g;
    }
    if (backend == Backend::kCpu) {
      EXPECT_EQ(usual[0], usual[1]);
    }
  }
}

TEST(Selection, HeadStatsNeedNoOtherStats) {
  Problem problem(spec_of(4000), 2, 7, 0.3f);
  problem.build_index();
  HeadStats heads[2][2];
  for (const bool others : {false, true}) {
    problem.index->forget_learned();
    problem.query.head_stats = heads[others];
    problem.query.kv = problem.cache.view();
    problem.query.index = problem.index.get();
    StepStats stats;
    Attention({.tau = 100}, Backend::kCpu, 1).run({&problem.query, 1}, others ? &stats : nullptr);
  }
  for (size_t head = 0; head < 2; ++head) {
    EXPECT_GT(heads[0][head].tokens, 0);
    EXPECT_EQ(heads[0][head].tokens, heads[1][head].tokens);
    EXPECT_GT(heads[0][head].estimated_mass, 0);
    EXPECT_EQ(heads[0][head].estimated_mass, heads[1][head].estimated_mass);
    EXPECT_EQ(heads[0][head].tau, 100);
  }
}

// Rows that were read on for too.
TEST(Selection, EveryRowOfAClusterNamesIt) {
  Problem problem(spec_of(4000), 2, 7, 0.1f);
  for (const Backend backend : kBackends) {
    problem.build_index();
    std::vector<std::vector<int32_t>> cluster_of(2, std::vector<int32_t>(4000, -1));
    for (size_t head = 0; head < 2; ++head) {
      int32_t base = 0;
      for (const Segment& segment : problem.index->state().segments) {
        const HeadClusters& clusters = segment.heads[head];
        auto member = clusters.members.begin();
        for (size_t c = 0; c < clusters.sizes.size(); ++c) {
          for (int i = 0; i < clusters.sizes[c]; ++i)
            cluster_of[head][static_cast<size_t>(segment.row_begin) + *member++] = base + static_cast<int32_t>(c);
        }
        base += padded_clusters(segment.num_clusters);
      }
    }
    Selection selection;
    problem.query.selection = &selection;
    const int64_t few = problem.run({.tau = 200, .beta = 1}, backend).tokens_certain;
    problem.index->forget_learned();
    EXPECT_GT(problem.run({.tau = 200, .target_mass = 0.8f, .beta = 1}, backend).tokens_certain, few);
    for (size_t head = 0; head < 2; ++head) {
      const HeadSelection& rows = selection.heads[head];
      for (size_t i = 0; i < rows.tokens.size(); ++i)
        ASSERT_EQ(rows.clusters[i], cluster_of[head][static_cast<size_t>(rows.tokens[i])]) << "row " << rows.tokens[i];
    }
  }
}

// They know nothing of the rows that they do not read.
TEST(Selection, FitAndTopKMeasureNoMass) {
  for (const Backend backend : kBackends) {
    for (const Select select : {Select::kFit, Select::kTopK}) {
      Problem problem(spec_of(4000), 2, 7, 0.1f);
      problem.build_index();
      std::vector<MassEstimate> masses(4, {-1, -1, -1, -1});
      problem.query.masses = masses.data();
      const StepStats stats = problem.run({.select = select, .target_mass = 0.3f, .budget = 32}, backend);
      EXPECT_EQ(stats.dense, DenseReason::kNone);
      EXPECT_DOUBLE_EQ(stats.estimated_mass, 1);
      EXPECT_EQ(stats.mass_std_error, 0);
      for (const MassEstimate& mass : masses) {
        EXPECT_EQ(mass.mass, 1);
        EXPECT_EQ(mass.std_error, 0);
        EXPECT_EQ(mass.low, 1);
        EXPECT_EQ(mass.high, 1);
      }
    }
  }
}

}  // namespace
}  // namespace tactic::test
