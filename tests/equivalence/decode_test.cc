// A whole decode step on the CPU against the reference: every selector, type, shape, layout, mask, batch, thread count
// and instruction set.
#include "support.h"

namespace tactic::test {
namespace {

struct Case {
  Select select;
  DType k_dtype, v_dtype;
  int32_t head_dim, v_head_dim, group;
  int64_t kv_len;
  Layout layout;
  int32_t num_kv_heads = 2;
};

std::string case_name(const testing::TestParamInfo<Case>& info) {
  const Case& c = info.param;
  return text(select_name(c.select), "_", dtype_name(c.k_dtype), "_", dtype_name(c.v_dtype), "_d", c.head_dim, "_v",
              c.v_head_dim, "_g", c.group, "_n", c.kv_len, "_", layout_name(c.layout));
}

void PrintTo(const Case& c, std::ostream* out) { *out << select_name(c.select) << " over " << c.kv_len << " rows"; }

constexpr Select kSelectors[] = {Select::kDense, Select::kSample, Select::kFit, Select::kTopK};

// Every selector with every pair of type and head_dim; group, length and layout take turns.
std::vector<Case> all_cases() {
  constexpr int32_t kGroups[] = {1, 3, 4, 8};
  constexpr int64_t kLengths[] = {700, 1500, 2300};
  constexpr Layout kLayouts[] = {Layout::kTokenMajor, Layout::kHeadMajor, Layout::kPadded, Layout::kPaged};
  std::vector<Case> cases;
  size_t turn = 0;
  const auto add = [&](Select select, DType k, DType v, int32_t dim, int32_t v_dim, int32_t group, int64_t kv_len) {
    if (fits(k, dim) && fits(v, v_dim)) cases.push_back({select, k, v, dim, v_dim, group, kv_len, kLayouts[turn % 4]});
    ++turn;
  };
  for (const Select select : kSelectors) {
    for (const DType dtype : kAllTypes) {
      for (const int32_t dim : {64, 80, 96, 128, 256})
        add(select, dtype, dtype, dim, dim, kGroups[turn / 3 % 4], kLengths[turn % 3]);
    }
    for (const int64_t kv_len : {0, 1, 31, 33, 127, 255, 260, 4096})
      add(select, DType::kF16, DType::kF16, 64, 64, kGroups[turn % 4], kv_len);
    add(select, DType::kF16, DType::kQ8_0, 64, 128, 3, 900);
    add(select, DType::kQ4_0, DType::kF32, 192, 80, 5, 900);
    cases.push_back({select, DType::kF16, DType::kF16, 64, 64, 2, 65537, Layout::kTokenMajor, 1});
  }
  return cases;
}

// Tolerances: dense differs in rounding only. A selector's cut may fall elsewhere by a row or so. A draw's running sum
// may pass a whole number one member later, and then the answers differ by what sampled rows weigh and by some
// clusters' refinement: here only the size of the error is checked, and SampledStepsAgreeMostly counts how rare that
// is.
void expect_alike(const Problem& problem, const StepStats& stats, const std::vector<float>& out,
                  const std::vector<float>& lse, const StepStats& expected, Select select) {
  const bool dense = expected.dense != DenseReason::kNone;
  const double slack = dense ? 0 : select == Select::kSample ? 0.04 : 0.002;
  EXPECT_EQ(stats.dense, expected.dense) << dense_reason_name(stats.dense) << " instead of "
                                         << dense_reason_name(expected.dense);
  EXPECT_LT(relative_error(problem.out, out), 2e-6 * std::sqrt(problem.cache.spec().head_dim) + 5e-6 + 2 * slack);
  for (size_t h = 0; h < lse.size(); ++h) {
    if (std::isinf(lse[h])) {
      EXPECT_EQ(problem.lse[h], lse[h]) << "head " << h;
    } else {
      EXPECT_NEAR(problem.lse[h], lse[h], 2e-5 + slack) << "head " << h;
    }
  }
  EXPECT_EQ(stats.kv_len, expected.kv_len);
  EXPECT_EQ(stats.num_kv_heads, expected.num_kv_heads);
  EXPECT_EQ(stats.kv_bytes_present, expected.kv_bytes_present);
  const double tokens = static_cast<double>(expected.tokens_certain + expected.tokens_sampled);
  const double token_slack = dense ? 0 : select == Select::kSample ? 0.08 * tokens + 4 : 0.01 * tokens + 4;
  EXPECT_NEAR(static_cast<double>(stats.tokens_certain), static_cast<double>(expected.tokens_certain), token_slack);
  EXPECT_NEAR(static_cast<double>(stats.tokens_sampled), static_cast<double>(expected.tokens_sampled), token_slack);
  EXPECT_NEAR(static_cast<double>(stats.tokens_value), tokens, token_slack);
  EXPECT_NEAR(stats.read_fraction(), expected.read_fraction(), dense ? 1e-12 : 0.05 * expected.read_fraction());
  EXPECT_NEAR(stats.estimated_mass, expected.estimated_mass, 1e-5 + slack);
  EXPECT_NEAR(stats.mass_std_error, expected.mass_std_error, 0.2 * expected.mass_std_error + 0.25 * slack);
  EXPECT_TRUE(!dense || (stats.kv_bytes == expected.kv_bytes && stats.index_bytes == 0));
}

DecodeOptions options_of(Select select) {
  return {.select = select,
          .tau = 200,
          .target_mass = 0.9f,
          .budget = 150,
          .beta = 1.0f};  // target_error may solve for tau to a percent
}

class Decode : public testing::TestWithParam<Case> {
 protected:
  CacheSpec spec() const {
    const Case& c = GetParam();
    CacheSpec spec;
    spec.k_dtype = c.k_dtype;
    spec.v_dtype = c.v_dtype;
    spec.head_dim = c.head_dim;
    spec.v_head_dim = c.v_head_dim;
    spec.kv_len = c.kv_len;
    spec.layout = c.layout;
    spec.num_kv_heads = c.num_kv_heads;
    return spec;
  }

  // The reference's answer, then the CPU's with every instruction set and some thread counts.
  void check(Problem& problem) {
    const DecodeOptions options = options_of(GetParam().select);
    const StepStats expected = problem.run(options, Backend::kReference);
    const std::vector<float> out = problem.out, lse = problem.lse;
    const int64_t rows = problem.cache.spec().kv_len;
    for (const int64_t target : highway_targets()) {
      for (const int32_t threads : {1, 2, 3}) {
        if (threads != 1 && (target != highway_targets().front() || rows > 10000)) continue;
        SCOPED_TRACE(text(target_name(target), ", threads ", threads));
        const OnTarget on(target);
        if (problem.index != nullptr) problem.index->state().calibration.assign(problem.cache.spec().num_kv_heads, {});
        const StepStats stats = problem.run(options, Backend::kCpu, threads);
        expect_alike(problem, stats, out, lse, expected, options.select);
      }
    }
  }
};

TEST_P(Decode, IsTheReference) {
  Problem problem(spec(), GetParam().group, 7, 0.3f);
  problem.build_index();
  check(problem);
}

TEST_P(Decode, IsTheReferenceUnderAMask) {
  Problem problem(spec(), GetParam().group, 8, 0.3f);
  problem.build_index();
  const std::vector<uint64_t> visible = random_bits(GetParam().kv_len + 64, 0.6, 3);
  problem.query.visible = visible.data();
  // Hidden rows may hold anything; rows that were rewritten since the index was built are read as they are now.
  for (int64_t row = 0; row < GetParam().kv_len; ++row) {
    if ((visible[row >> 6] >> (row & 63) & 1) == 0) problem.cache.poison(row);
  }
  if (GetParam().kv_len > 100) {
    problem.index->write(60, 20);
    for (int64_t row = 60; row < 80; ++row) {
      for (int32_t head = 0; head < GetParam().num_kv_heads; ++head) {
        problem.cache.set_key(head, row, problem.cache.topic(head, 0));
        problem.cache.set_value(head, row, std::vector<float>(GetParam().v_head_dim, 1.5f));
      }
    }
  }
  check(problem);
}

INSTANTIATE_TEST_SUITE_P(All, Decode, testing::ValuesIn(all_cases()), case_name);

CacheSpec spec_of(int64_t kv_len) {
  CacheSpec spec;
  spec.kv_len = kv_len;
  return spec;
}

class DecodeSelect : public testing::TestWithParam<Select> {};
INSTANTIATE_TEST_SUITE_P(All, DecodeSelect, testing::ValuesIn(kSelectors),
                         [](const auto& one) { return std::string(select_name(one.param)); });

// Queries of one call do not see each other: other lengths, no index, a mask, a bias, and an index that two of them
// share.
TEST_P(DecodeSelect, ABatchIsItsQueries) {
  const DecodeOptions options = options_of(GetParam());
  CacheSpec three_heads = spec_of(1200), one_head = spec_of(0);
  three_heads.num_kv_heads = 3, one_head.num_kv_heads = 1;
  Problem a(spec_of(3000), 3, 1, 0.3f), b(spec_of(700), 4, 2, 0.3f), c(three_heads, 3, 3, 0.3f),
      d(spec_of(900), 1, 4, 0.3f), e(one_head, 2, 5);
  a.build_index();
  b.build_index();
  const std::vector<uint64_t> visible = random_bits(3000, 0.5, 3);
  std::vector<float> bias(900);
  Random random(8);
  for (float& value : bias) value = random.normal();
  d.build_index();
  d.query.bias = bias.data();
  Problem* const problems[] = {&a, &b, &c, &d, &e};
  std::vector<DecodeQuery> queries;
  std::vector<StepStats> expected(6), stats(6);
  for (size_t i = 0; i < 5; ++i) {
    expected[i] = problems[i]->run(options, Backend::kReference);
    queries.push_back(problems[i]->query);
  }
  queries.push_back(a.query);  // the same pool of rows, other rows visible
  std::vector<float> shared_out(a.out.size()), shared_lse(a.lse.size());
  queries[5].visible = visible.data();
  queries[5].out = shared_out.data();
  queries[5].lse = shared_lse.data();
  queries[5].position = 77;
  Attention(options, Backend::kReference).run({&queries[5], 1}, &expected[5]);
  std::vector<std::vector<float>> outs, lses;
  for (Problem* problem : problems) outs.push_back(problem->out), lses.push_back(problem->lse);
  outs.push_back(shared_out), lses.push_back(shared_lse);
  Attention attention(options);
  for (const int32_t threads : {1, 2, 3, 5}) {
    SCOPED_TRACE(text("threads ", threads));
    for (Problem* problem : {&a, &b, &d}) problem->index->state().calibration.assign(2, {});
    attention.set_num_threads(threads);
    attention.run(queries, stats.data());
    for (size_t i = 0; i < 5; ++i) {
      SCOPED_TRACE(text("query ", i));
      expect_alike(*problems[i], stats[i], outs[i], lses[i], expected[i], GetParam());
    }
    a.out.swap(shared_out), a.lse.swap(shared_lse);  // expect_alike reads the problem's
    expect_alike(a, stats[5], outs[5], lses[5], expected[5], GetParam());
    a.out.swap(shared_out), a.lse.swap(shared_lse);
  }
}

TEST(DecodeSample, SampledStepsAgreeMostly) {
  int same = 0, heads = 0;
  for (const DType dtype : kAllTypes) {
    CacheSpec spec = spec_of(2000);
    spec.k_dtype = spec.v_dtype = dtype;
    Problem problem(spec, 2, 7, 0.3f);
    problem.build_index();
    for (int64_t i = 0; i < 12; ++i) {
      problem.query.position = i * 1234567;
      problem.query.layer = static_cast<int32_t>(i % 7);
      problem.query.stream_id = static_cast<uint64_t>(i / 5);
      const DecodeOptions options{.tau = 200, .refine = i % 2 == 0 ? 1.0f : 0.02f, .beta = 1, .seed = 99};
      problem.index->state().calibration.assign(2, {});
      problem.run(options, Backend::kReference);
      const std::vector<float> lse = problem.lse;
      problem.run(options, Backend::kCpu);
      for (size_t h = 0; h < lse.size(); ++h, ++heads) same += std::fabs(problem.lse[h] - lse[h]) < 1e-4f;
    }
  }
  EXPECT_GE(same, heads * 2 / 3) << "of " << heads << "; with other random numbers hardly any would";
}

TEST(DecodeSample, TauFactorIsALargerTau) {
  Problem problem(spec_of(2000), 2, 7, 0.3f);
  problem.build_index();
  for (const Backend backend : {Backend::kReference, Backend::kCpu}) {
    const auto rows_of = [&](const DecodeOptions& options, float factor) {
      Selection selection;
      problem.index->state().calibration.assign(2, {});
      problem.query.tau_factor = factor;
      problem.query.selection = &selection;
      problem.run(options, backend);
      std::vector<std::pair<int32_t, float>> rows;
      for (const HeadSelection& head : selection.heads) {
        for (size_t i = 0; i < head.tokens.size(); ++i) rows.emplace_back(head.tokens[i], head.log_weights[i]);
      }
      return rows;
    };
    const auto rows = rows_of({.tau = 256, .beta = 1}, 1), more = rows_of({.tau = 256, .beta = 1}, 4);
    EXPECT_EQ(more, rows_of({.tau = 1024, .beta = 1}, 1));
    EXPECT_EQ(more, rows_of({.target_error = 0.0625f, .beta = 1}, 4));
    EXPECT_GT(more.size(), rows.size() * 11 / 10);  // the recent rows are the same
  }
}

// A head with 95% of its weights on a sink reads as if tau were 4.5 times its value (core/steps.h, sink_factor), also
// in a cache where other sequences, which are hidden, stand before it.
TEST(DecodeSample, AHeadThatRestsOnASinkReadsMore) {
  for (const int64_t first : {0, 2050}) {
    for (const int32_t group : {1, 3}) {
      SCOPED_TRACE(text("first row ", first, " group ", group));
      Problem problem(spec_of(6000 + first), group, 7, 0.1f);
      std::vector<uint64_t> visible(static_cast<size_t>((6000 + first + 63) / 64), 0);
      for (int64_t row = first; row < 6000 + first; ++row)
        visible[static_cast<size_t>(row / 64)] |= uint64_t{1} << (row % 64);
      if (first > 0) problem.query.visible = visible.data();
      make_sink(problem, 19, first);
      problem.build_index();
      const DecodeOptions options{.tau = 300, .refine = 1, .beta = 1};
      std::vector<int32_t> rows;
      for (const Backend backend : {Backend::kReference, Backend::kCpu}) {
        problem.index->state().calibration.assign(2, {});
        Selection selection;
        problem.query.selection = &selection;
        ASSERT_EQ(problem.run(options, backend).dense, DenseReason::kNone);
        const HeadSelection& head = selection.heads[0];
        const auto certain_end = head.tokens.begin() + head.num_certain;
        for (int64_t row = first; row < first + 4; ++row)
          EXPECT_EQ(std::count(head.tokens.begin(), certain_end, row), 1) << row;
        std::vector<int32_t> read = head.tokens, different;
        std::sort(read.begin(), read.end());
        if (backend == Backend::kReference) rows = read;
        std::set_symmetric_difference(read.begin(), read.end(), rows.begin(), rows.end(),
                                      std::back_inserter(different));
        EXPECT_LE(different.size(), 4) << "a running sum in f32 passes a whole number a row later";
        const auto drawn = static_cast<double>(head.tokens.size()) - static_cast<double>(head.num_certain);
        const double expected = 300 / std::sqrt(20.0);  // the weights outside the sink are a twentieth
        EXPECT_GT(drawn, 0.6 * expected);
        EXPECT_LT(drawn, 1.5 * expected);
      }
    }
  }
}

TEST(DecodeSample, LikelyRowsAreReadForCertainAndOnce) {
  Problem problem(spec_of(2000), 2, 7, 0.3f);
  problem.build_index();
  const std::vector<int32_t> likely = {2, 100, 700, 701, 1990, 5000};  // a sink, a recent row, one that is not there
  const DecodeOptions options{.tau = 30, .refine = 1, .beta = 1};
  for (const Backend backend : {Backend::kReference, Backend::kCpu}) {
    Selection without, with;
    for (Selection* selection : {&without, &with}) {
      problem.index->state().calibration.assign(2, {});
      problem.query.selection = selection;
      problem.query.likely_rows = likely.data();
      problem.query.num_likely_rows = selection == &with ? static_cast<int32_t>(likely.size()) : 0;
      problem.run(options, backend);
    }
    for (size_t h = 0; h < with.heads.size(); ++h) {
      const HeadSelection &head = with.heads[h], &before = without.heads[h];
      for (const int32_t row : likely) {
        const auto end = head.tokens.begin() + head.num_certain;
        EXPECT_EQ(std::count(head.tokens.begin(), end, row), row < 2000) << row;
        EXPECT_EQ(std::count(end, head.tokens.end(), row), 0) << row;
      }
      EXPECT_EQ(head.num_certain, before.num_certain + 3) << "100, 700 and 701";
    }
  }
}

TEST_P(DecodeSelect, HeadStatsAddUpToTheSteps) {
  if (GetParam() == Select::kDense) return;
  Problem problem(spec_of(3000), 3, 7, 0.3f);
  problem.build_index();
  HeadStats heads[2];
  problem.query.head_stats = heads;
  const StepStats stats = problem.run(options_of(GetParam()));
  EXPECT_EQ(heads[0].tokens + heads[1].tokens, stats.tokens_value);
  EXPECT_NEAR((heads[0].estimated_mass + heads[1].estimated_mass) / 2, stats.estimated_mass, 1e-9);
  for (const HeadStats& head : heads) {
    EXPECT_GE(head.exact_tokens, 3000 - problem.index->rows_indexed());
    EXPECT_LT(head.exact_tokens, head.tokens);
    EXPECT_GT(head.exact_mass, 0);
    EXPECT_LT(head.exact_mass, head.estimated_mass);
    if (GetParam() != Select::kSample) continue;
    EXPECT_EQ(head.tau, 200);
    EXPECT_EQ(head.beta, 1);
  }
}

// Reading on to a target mass names the same clusters.
TEST(DecodeVerified, IsTheReference) {
  for (const float target : {0.6f, 0.9f, 0.999f, 1.0f}) {
    for (uint64_t seed = 1; seed <= 6; ++seed) {
      SCOPED_TRACE(text("target ", target, " seed ", seed));
      Problem problem({.kv_len = 2900}, 3, seed, 0.5f);
      problem.build_index();
      const DecodeOptions options{.tau = 400, .target_mass = target, .beta = 1};
      const StepStats expected = problem.run(options, Backend::kReference);
      if (target < 0.95f) {
        EXPECT_LT(expected.tokens_certain, 2 * 2900) << "everything was read";
      }
      const std::vector<float> out = problem.out, lse = problem.lse;
      const StepStats stats = problem.run(options);
      expect_alike(problem, stats, out, lse, expected, Select::kSample);
    }
  }
}

// Rows and masses that a step reports are those of its output and its statistics.
TEST_P(DecodeSelect, ReportsWhatItDid) {
  for (const Backend backend : {Backend::kCpu, Backend::kReference}) {
    Problem problem({.kv_len = 2900}, 3);
    problem.build_index();
    Selection selection;
    std::vector<MassEstimate> masses(6);
    problem.query.selection = &selection;
    problem.query.masses = masses.data();
    const StepStats stats = problem.run(options_of(GetParam()), backend);
    ASSERT_EQ(selection.heads.size(), 2u);
    int64_t certain = 0, sampled = 0, index_bytes = 0;
    for (const Segment& segment : problem.index->state().segments)
      index_bytes += 2 * (segment.num_clusters * (64 + 10) + 64 * 4);
    double mass = 0, variance = 0;
    for (const MassEstimate& m : masses) {
      mass += m.mass / 6;
      variance += m.std_error * m.std_error / 6;
      EXPECT_LE(m.low, m.mass);
      EXPECT_GE(m.high, m.mass);
    }
    EXPECT_NEAR(mass, stats.estimated_mass, 1e-9);
    EXPECT_NEAR(std::sqrt(variance), stats.mass_std_error, 1e-9);
    for (int32_t head = 0; head < 2; ++head) {
      const HeadSelection& rows = selection.heads[static_cast<size_t>(head)];
      const size_t n = rows.tokens.size();
      ASSERT_EQ(rows.log_weights.size(), n);
      ASSERT_EQ(rows.clusters.size(), n);
      certain += rows.num_certain;
      sampled += static_cast<int64_t>(n) - rows.num_certain;
      index_bytes += 3 * std::count_if(rows.clusters.begin(), rows.clusters.end(), [](int32_t c) { return c >= 0; });
      std::vector<int32_t> sorted = rows.tokens;
      std::sort(sorted.begin(), sorted.end());
      EXPECT_EQ(std::adjacent_find(sorted.begin(), sorted.end()), sorted.end());
      for (int32_t g = 0; g < 3; ++g) {
        const size_t q_head = static_cast<size_t>(head * 3 + g);
        double sum = 0, certain_sum = 0;
        std::vector<double> out(64);
        for (size_t i = 0; i < n; ++i) {
          EXPECT_EQ(rows.log_weights[i] == 0, static_cast<int64_t>(i) < rows.num_certain);
          const std::vector<float> key = problem.cache.key(head, rows.tokens[i]),
                                   value = problem.cache.value(head, rows.tokens[i]);
          double score = rows.log_weights[i];
          for (size_t d = 0; d < 64; ++d) score += double{problem.query.sm_scale} * problem.q[q_head * 64 + d] * key[d];
          const double weight = std::exp(score - problem.lse[q_head]);
          sum += weight;
          certain_sum += static_cast<int64_t>(i) < rows.num_certain ? weight : 0;
          for (size_t d = 0; d < 64; ++d) out[d] += weight * value[d];
        }
        EXPECT_NEAR(sum, 1, 1e-4);
        EXPECT_NEAR(certain_sum, masses[q_head].mass, 5 * masses[q_head].std_error + 1e-4);
        for (size_t d = 0; d < 64; ++d) EXPECT_NEAR(out[d], problem.out[q_head * 64 + d], 1e-3);
      }
    }
    EXPECT_EQ(certain, stats.tokens_certain);
    EXPECT_EQ(sampled, stats.tokens_sampled);
    if (backend == Backend::kCpu && stats.dense == DenseReason::kNone) {
      EXPECT_EQ(index_bytes, stats.index_bytes) << "centroids, and the numbers and check values of rows";
    }
  }
}

// Rows that the step before named are read for certain, once, and the rest as before.
TEST_P(DecodeSelect, ExpectedRowsAreReadOnce) {
  Problem problem(spec_of(5000), 3, 1, 0.3f);
  problem.build_index();
  Calibration known;
  for (int32_t row = 40; row < 3000; row += 97) known.expected.push_back(row);
  Selection selection;
  problem.query.selection = &selection;
  const DecodeOptions options = options_of(GetParam());
  problem.index->state().calibration.assign(2, known);
  const StepStats expected = problem.run(options, Backend::kReference);
  const std::vector<float> out = problem.out, lse = problem.lse;
  for (const Backend backend : {Backend::kReference, Backend::kCpu}) {
    problem.index->state().calibration.assign(2, known);
    expect_alike(problem, problem.run(options, backend, 2), out, lse, expected, GetParam());
    if (GetParam() == Select::kDense) continue;
    for (const HeadSelection& head : selection.heads) {
      for (const int32_t row : known.expected) {
        EXPECT_EQ(std::count(head.tokens.begin(), head.tokens.end(), row), 1);
        EXPECT_EQ(std::count(head.tokens.begin(), head.tokens.begin() + head.num_certain, row), 1);
      }
    }
  }
}

TEST_P(DecodeSelect, StridesLeaveGapsAlone) {
  Problem problem(spec_of(1500), 3, 1, 0.3f);
  problem.build_index();
  const DecodeOptions options = options_of(GetParam());
  problem.run(options);
  std::vector<float> q(6 * 70, std::nanf("")), out(6 * 67, 5.0f);
  for (size_t i = 0; i < 6 * 64; ++i) q[i / 64 * 70 + i % 64] = problem.q[i];
  DecodeQuery query = problem.query;
  query.q = q.data();
  query.q_head_stride = 70;
  query.out = out.data();
  query.out_head_stride = 67;
  query.lse = nullptr;
  for (const Backend backend : {Backend::kCpu, Backend::kReference}) {
    problem.index->state().calibration.assign(2, {});
    Attention(options, backend, 1).run({&query, 1});
    for (size_t h = 0; h < 6; ++h) {
      for (size_t d = 0; d < 64 && backend == Backend::kCpu; ++d)
        EXPECT_EQ(out[h * 67 + d], problem.out[h * 64 + d]) << "head " << h;
      for (size_t gap = 64; gap < 67; ++gap) EXPECT_EQ(out[h * 67 + gap], 5.0f);
    }
  }
}

// The K rows of a cache whose stride is the row itself and of one in pages give the same bits: the sums run in token
// order.
TEST_P(DecodeSelect, LayoutDoesNotMatter) {
  std::vector<float> expected;
  for (const Layout layout : {Layout::kTokenMajor, Layout::kHeadMajor, Layout::kPadded, Layout::kPaged}) {
    CacheSpec spec = spec_of(2500);
    spec.layout = layout;
    Problem problem(spec, 3, 1, 0.3f);
    problem.build_index();
    problem.run(options_of(GetParam()));
    if (expected.empty()) expected = problem.out;
    EXPECT_TRUE(same_bits(problem.out, expected)) << layout_name(layout);
  }
}

}  // namespace
}  // namespace tactic::test
