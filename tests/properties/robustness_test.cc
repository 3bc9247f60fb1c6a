// What is not finite, hidden, rewritten or changed unseen stays where it is; a caller's mistake is named.
#include <algorithm>

#include "support.h"
#include "tactic/error.h"

namespace tactic::test {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

constexpr Select kSelectors[] = {Select::kDense, Select::kSample, Select::kFit, Select::kTopK};
constexpr Backend kBackends[] = {Backend::kCpu, Backend::kReference};

CacheSpec spec_of(int64_t kv_len, DType dtype = DType::kF16) {
  CacheSpec spec;
  spec.k_dtype = spec.v_dtype = dtype;
  spec.kv_len = kv_len;
  return spec;
}

// fn(problem, options, backend) for every selector and backend, on a new problem each.
template <class Fn>
void for_all(const CacheSpec& spec, int32_t group, Fn fn) {
  for (const Backend backend : kBackends) {
    for (const Select select : kSelectors) {
      SCOPED_TRACE(text(select_name(select), backend == Backend::kCpu ? " cpu" : " reference"));
      Problem problem(spec, group, 7, 0.3f);
      fn(problem, DecodeOptions{.select = select, .tau = 300, .beta = 1}, backend);
    }
  }
}

std::vector<float> head_of(const std::vector<float>& out, size_t head, size_t dim = 64) {
  return {out.begin() + static_cast<std::ptrdiff_t>(head * dim),
          out.begin() + static_cast<std::ptrdiff_t>((head + 1) * dim)};
}

bool all_finite(const std::vector<float>& x) {
  return std::all_of(x.begin(), x.end(), [](float value) { return std::isfinite(value); });
}

TEST(Robustness, ABadKeyStaysInItsHead) {
  for (const float bad : {std::nanf(""), HUGE_VALF}) {
    for_all(spec_of(1500), 2, [&](Problem& problem, const DecodeOptions& options, Backend backend) {
      std::vector<float> k = problem.cache.key(1, 700);
      k[10] = bad;
      problem.cache.set_key(1, 700, k);
      problem.build_index();
      const StepStats stats = problem.run(options, backend);
      EXPECT_EQ(stats.dense, options.select == Select::kDense ? DenseReason::kAsked : DenseReason::kNotFinite);
      const std::vector<float> out = problem.out;
      problem.cache.set_key(1, 700, problem.cache.key(0, 700));
      problem.run({.select = Select::kDense}, backend);
      for (size_t h = 0; h < 2; ++h)
        EXPECT_LT(relative_error(head_of(out, h), head_of(problem.out, h)), 1e-5) << "head " << h;
      if (std::isnan(bad)) {
        for (size_t h = 2; h < 4; ++h) EXPECT_TRUE(std::isnan(out[h * 64])) << "head " << h;
      }
    });
  }
}

TEST(Robustness, ABadValueStaysInItsElement) {
  for (const float bad : {std::nanf(""), HUGE_VALF}) {
    for_all(spec_of(1500), 2, [&](Problem& problem, const DecodeOptions& options, Backend backend) {
      std::vector<float> v = problem.cache.value(1, 700);
      v[10] = bad;
      problem.cache.set_value(1, 700, v);
      problem.build_index();
      problem.run(options, backend);
      for (size_t i = 0; i < problem.out.size(); ++i) {
        EXPECT_EQ(std::isfinite(problem.out[i]), i < 128 || i % 64 != 10) << "element " << i;
      }
      EXPECT_TRUE(all_finite(problem.lse));
    });
  }
}

TEST(Robustness, ABadQueryStaysInItsHead) {
  for (const float bad : {std::nanf(""), HUGE_VALF}) {
    for_all(spec_of(1500), 2, [&](Problem& problem, const DecodeOptions& options, Backend backend) {
      problem.build_index();
      problem.run({.select = Select::kDense}, backend);
      const std::vector<float> exact = problem.out;
      problem.q[64 + 5] = bad;
      const StepStats stats = problem.run(options, backend);
      EXPECT_EQ(stats.dense, options.select == Select::kDense ? DenseReason::kAsked : DenseReason::kNotFinite);
      for (const size_t h : {0, 2, 3})
        EXPECT_LT(relative_error(head_of(problem.out, h), head_of(exact, h)), 1e-5) << "head " << h;
      EXPECT_FALSE(all_finite(head_of(problem.out, 1)));
    });
  }
}

// The CPU answers as the reference does, or falls back to dense where f32 cannot hold the weights.
void expect_reference_or_dense(Problem& problem, const DecodeOptions& options, double tolerance) {
  const StepStats expected = problem.run(options, Backend::kReference);
  std::vector<float> out = problem.out, lse = problem.lse;
  const StepStats stats = problem.run(options);
  if (stats.dense != DenseReason::kNone && expected.dense == DenseReason::kNone) {
    const std::vector<float> answer = problem.out, answer_lse = problem.lse;
    problem.run({.select = Select::kDense}, Backend::kReference);
    out = problem.out, lse = problem.lse;
    problem.out = answer, problem.lse = answer_lse;
    tolerance = 1e-4;
  }
  EXPECT_LT(relative_error(problem.out, out), tolerance);
  for (size_t h = 0; h < lse.size(); ++h)
    EXPECT_NEAR(problem.lse[h], lse[h], tolerance + 1e-5 * std::fabs(lse[h])) << "head " << h;
}

TEST(Robustness, HugeScoresAreNumbers) {
  for (const Select select : kSelectors) {
    for (const float factor : {10.0f, 30.0f, 100.0f, 1000.0f}) {
      SCOPED_TRACE(text(select_name(select), " times ", factor));
      Problem problem(spec_of(1500), 2, 7, 0.3f);
      problem.build_index();
      for (float& x : problem.q) x *= factor;
      expect_reference_or_dense(problem, {.select = select, .tau = 300, .beta = 1}, 0.02);
    }
  }
}

// Hidden rows that would outweigh all visible ones by far, as when sequences share a pool of rows.
TEST(Robustness, HiddenClustersDoNotDrownTheVisible) {
  for (const Select select : kSelectors) {
    for (const float lead : {20.0f, 60.0f, 80.0f, 88.0f, 92.0f, 96.0f, 100.0f, 104.0f, 150.0f}) {
      SCOPED_TRACE(text(select_name(select), " lead ", lead));
      Problem problem(spec_of(1500), 1, 7, 0.1f);
      std::vector<uint64_t> visible(24, ~uint64_t{0});
      for (int64_t row = 256; row < 512; ++row) {  // hidden, and along the query
        visible[row >> 6] &= ~(uint64_t{1} << (row & 63));
        for (int32_t head = 0; head < 2; ++head) {
          std::vector<float> k = head_of(problem.q, static_cast<size_t>(head));
          double norm2 = 0;
          for (const float x : k) norm2 += x * x;
          for (float& x : k) x *= static_cast<float>(lead / problem.query.sm_scale / norm2);
          problem.cache.set_key(head, row, k);
        }
      }
      problem.build_index();
      problem.query.visible = visible.data();
      expect_reference_or_dense(problem,
                                {.select = select, .tau = 300, .target_mass = 0.999f, .budget = 1400, .beta = 1},
                                select == Select::kSample ? 0.1 : 0.01);
    }
  }
}

// A sequence whose first row lies in a cluster of another's: its other members are hidden, long and far apart, so that
// nothing of the cluster is left when the sink is taken out of it.
TEST(Robustness, ASinkInAClusterOfHiddenRowsLeavesTheOthersReadable) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    SCOPED_TRACE(text("seed ", seed));
    CacheSpec spec = spec_of(4096, DType::kF32);
    spec.num_kv_heads = 1;
    spec.topic_scale = 0;
    spec.seed = seed;
    Problem problem(spec, 1, seed + 100);
    problem.query.sm_scale = 1;
    for (int64_t row = 0; row < 2048; ++row) {
      std::vector<float> k = problem.cache.key(0, row);
      for (float& x : k) x *= 30;
      problem.cache.set_key(0, row, k);
    }
    problem.build_index();
    std::vector<uint64_t> visible(64);
    std::fill(visible.begin() + 32, visible.end(), ~uint64_t{0});
    visible[15] = uint64_t{1} << 40;
    problem.query.visible = visible.data();
    problem.run({.select = Select::kDense});
    const std::vector<float> exact = problem.out;
    for (const Backend backend : kBackends) {
      problem.run({.tau = 2000}, backend);
      EXPECT_LT(relative_error(problem.out, exact), 0.2);
    }
  }
}

TEST(Robustness, HiddenRowsMayHoldAnything) {
  for (const DType dtype : kAllTypes) {
    for_all(spec_of(1500, dtype), 2, [&](Problem& problem, const DecodeOptions& options, Backend backend) {
      problem.build_index();
      const std::vector<uint64_t> visible = random_bits(1500, 0.5, 3);
      problem.query.visible = visible.data();
      problem.run(options, backend);
      const std::vector<float> out = problem.out;
      if (problem.index != nullptr) problem.index->state().calibration.assign(2, {});
      for (int64_t row = 0; row < 1500; ++row) {
        if ((visible[row >> 6] >> (row & 63) & 1) == 0) problem.cache.poison(row);
      }
      problem.run(options, backend);
      EXPECT_TRUE(same_bits(problem.out, out));
    });
  }
}

// As in ggml: a row whose bias is -infinity takes no part, whatever it holds.
TEST(Robustness, ABiasOfMinusInfinityHidesTheRow) {
  for_all(spec_of(1500), 2, [&](Problem& problem, const DecodeOptions& options, Backend backend) {
    problem.build_index();
    const std::vector<uint64_t> visible = random_bits(1500, 0.5, 3);
    problem.query.visible = visible.data();
    problem.run({.select = Select::kDense}, backend);
    const std::vector<float> out = problem.out;
    problem.query.visible = nullptr;
    std::vector<float> bias(1500);
    for (int64_t row = 0; row < 1500; ++row) bias[row] = (visible[row >> 6] >> (row & 63) & 1) != 0 ? 0 : -HUGE_VALF;
    problem.query.bias = bias.data();
    const StepStats stats = problem.run(options, backend);
    EXPECT_EQ(stats.dense, options.select == Select::kDense ? DenseReason::kAsked : DenseReason::kMask);
    EXPECT_LT(relative_error(problem.out, out), 1e-6);
    for (int64_t row = 0; row < 1500; ++row) {
      if (bias[row] != 0) problem.cache.poison(row);
    }
    problem.run(options, backend);
    EXPECT_LT(relative_error(problem.out, out), 1e-6) << "with NaN in the hidden rows";
    std::fill(bias.begin(), bias.end(), -HUGE_VALF);
    problem.run(options, backend);
    EXPECT_EQ(problem.out, std::vector<float>(problem.out.size())) << "all hidden";
    EXPECT_EQ(problem.lse, std::vector<float>(problem.lse.size(), -HUGE_VALF));
  });
}

TEST(Robustness, RewrittenRowsAreReadAsTheyAre) {
  for_all(spec_of(2000), 2, [&](Problem& problem, const DecodeOptions& options, Backend backend) {
    problem.build_index();
    for (int32_t head = 0; head < 2;
         ++head) {  // the key that the head's first query looks for, and a value to know it by
      std::vector<float> k = head_of(problem.q, static_cast<size_t>(head) * 2);
      double norm2 = 0;
      for (const float x : k) norm2 += x * x;
      for (float& x : k) x *= static_cast<float>(40 / problem.query.sm_scale / norm2);
      problem.cache.set_key(head, 900, k);
      problem.cache.set_value(head, 900, std::vector<float>(64, 77.0f));
    }
    problem.index->write(900, 1);
    const StepStats stats = problem.run(options, backend);
    EXPECT_EQ(stats.dense, options.select == Select::kDense ? DenseReason::kAsked : DenseReason::kNone);
    for (const size_t h : {0, 2}) EXPECT_NEAR(problem.out[h * 64 + 9], 77, 0.01);
  });
}

// Rows that change without a write(): the step finds one that it reads, and answers exactly.
TEST(Robustness, ARowChangedUnseenMakesTheStepDense) {
  for (const bool keys : {true, false}) {
    for (const DType dtype : {DType::kF16, DType::kQ4_0}) {
      for_all(spec_of(2000, dtype), 2, [&](Problem& problem, const DecodeOptions& options, Backend backend) {
        if (options.select == Select::kDense) return;
        problem.build_index();
        EXPECT_EQ(problem.run(options, backend).dense, DenseReason::kNone);
        Random random(5);
        std::vector<float> x(64);
        for (int64_t row = 100; row < 2000; ++row) {
          for (float& value : x) value = random.normal();
          keys ? problem.cache.set_key(1, row, x) : problem.cache.set_value(1, row, x);
        }
        const std::vector<Calibration> known = problem.index->state().calibration;
        EXPECT_EQ(problem.run(options, backend).dense, DenseReason::kRowChanged)
            << dtype_name(dtype) << (keys ? " K" : " V");
        for (size_t head = 0; head < known.size(); ++head) {  // such a step teaches nothing, in no head
          const Calibration& now = problem.index->state().calibration[head];
          EXPECT_EQ(now.expected, known[head].expected);
          EXPECT_EQ(now.variance_ratio, known[head].variance_ratio);
          EXPECT_EQ(now.usual_variance, known[head].usual_variance);
          EXPECT_EQ(now.sum_xx, known[head].sum_xx);
        }
        const std::vector<float> out = problem.out;
        problem.run({.select = Select::kDense}, backend);
        EXPECT_TRUE(same_bits(problem.out, out));
        DecodeOptions unchecked = options;
        unchecked.check_rows = false;
        EXPECT_EQ(problem.run(unchecked, backend).dense, DenseReason::kNone);
        problem.index->verify(problem.cache.view());  // and then the changed rows are read exactly
        EXPECT_NE(problem.run(options, backend).dense, DenseReason::kRowChanged);
      });
    }
  }
}

// Rows that a step reads on for, or because a drawn one was too heavy, are checked as well.
TEST(Robustness, AChangedRowIsFoundAmongThoseReadForAMass) {
  for (const Backend backend : kBackends) {
    for (uint64_t seed = 1; seed <= 5; ++seed) {
      CacheSpec spec = spec_of(4000);
      spec.num_kv_heads = 1;
      spec.topic_scale = 0;
      spec.seed = seed;
      Problem problem(spec, 1, seed + 20);
      problem.query.sm_scale = 0.15f;
      problem.build_index();
      for (int64_t row = 100; row < 3800; row += 40) {
        problem.cache.set_key(0, row, problem.cache.key(0, row + 1));
        problem.cache.set_value(0, row, problem.cache.value(0, row + 1));
      }
      const StepStats stats = problem.run({.tau = 1, .target_mass = 0.9999f}, backend, 2);
      EXPECT_EQ(stats.dense, DenseReason::kRowChanged) << "seed " << seed;
      const std::vector<float> out = problem.out;
      problem.run({.select = Select::kDense}, backend, 2);
      EXPECT_TRUE(same_bits(problem.out, out));
    }
  }
}

TEST(Robustness, TheAnswerMayTakeTheQuerysPlace) {
  for (const bool changed : {false, true}) {
    for_all(spec_of(2000), 2, [&](Problem& problem, const DecodeOptions& options, Backend backend) {
      problem.build_index();
      for (int64_t row = 100; changed && row < 2000; ++row)  // the other head is done by then
        problem.cache.set_value(1, row, problem.cache.value(0, row));
      const StepStats stats = problem.run(options, backend);
      if (changed && options.select != Select::kDense) {
        EXPECT_EQ(stats.dense, DenseReason::kRowChanged);
      }
      const std::vector<float> out = problem.out;
      problem.index->forget_learned();
      problem.query.out = problem.q.data();
      problem.run(options, backend);
      EXPECT_TRUE(same_bits(problem.q, out));
    });
  }
}

TEST(Robustness, OneQueryThatFallsBackLeavesTheOthersAlone) {
  Problem good(spec_of(2000), 2, 7, 0.3f), bad(spec_of(1500), 3, 8, 0.3f), other(spec_of(1700), 1, 9, 0.3f);
  for (Problem* problem : {&good, &bad, &other}) problem->build_index();
  const DecodeOptions options{.tau = 300, .beta = 1};
  const StepStats alone = good.run(options);
  other.run(options);
  bad.q[3] = std::nanf("");
  const std::vector<float> out = good.out, other_out = other.out;
  bad.run(options);
  const std::vector<float> bad_out = bad.out;
  const DecodeQuery queries[] = {good.query, bad.query, other.query};
  for (const int32_t threads : {1, 3}) {
    SCOPED_TRACE(text("threads ", threads));
    for (Problem* problem : {&good, &other}) problem->index->state().calibration.assign(2, {});
    StepStats stats[3];
    Attention(options, Backend::kCpu, threads).run(queries, stats);
    EXPECT_EQ(stats[0].dense, DenseReason::kNone);
    EXPECT_EQ(stats[1].dense, DenseReason::kNotFinite);
    EXPECT_EQ(stats[2].dense, DenseReason::kNone);
    EXPECT_EQ(stats[0].tokens_certain, alone.tokens_certain);
    EXPECT_EQ(stats[0].tokens_sampled, alone.tokens_sampled);
    EXPECT_EQ(stats[0].kv_bytes, alone.kv_bytes);
    if (threads == 1) {
      EXPECT_TRUE(same_bits(good.out, out));
      EXPECT_TRUE(same_bits(other.out, other_out));
    }
    const float bound = threads == 1 ? 0 : 1e-5f;  // several threads add the same rows in another order
    for (size_t i = 0; i < out.size(); ++i) EXPECT_NEAR(good.out[i], out[i], bound);
    for (size_t i = 0; i < other_out.size(); ++i) EXPECT_NEAR(other.out[i], other_out[i], bound);
    for (size_t i = 0; i < bad_out.size(); ++i) {
      EXPECT_EQ(std::isnan(bad.out[i]), std::isnan(bad_out[i]));
      if (std::isnan(bad_out[i])) continue;
      EXPECT_NEAR(bad.out[i], bad_out[i], bound);
    }
  }
}

TEST(Robustness, TheIndexGoesOnWhileTheCacheGrows) {
  CacheSpec spec = spec_of(3000);
  for (const Select select : {Select::kSample, Select::kFit, Select::kTopK}) {
    Problem problem(spec, 2, 7, 0.3f);
    problem.index =
        std::make_unique<KvIndex>(IndexOptions{.segment_tokens = 512, .provisional_tokens = 128}, KvShape{2, 64, 64});
    problem.index->set_num_threads(1);
    const KvView whole = problem.cache.view();
    for (int64_t len = 100; len <= 3000; len += 145) {
      SCOPED_TRACE(text(select_name(select), " at ", len));
      KvView kv = whole;
      kv.kv_len = len;
      problem.index->write(problem.index->state().rows_end, len - problem.index->state().rows_end);
      if (len % 2 == 0) problem.index->maintain(kv, 0.5);
      DecodeQuery query = problem.query;
      query.kv = kv;
      query.index = problem.index.get();
      query.position = len;
      StepStats stats;
      Attention({.select = Select::kDense}, Backend::kCpu, 1).run({&query, 1});
      const std::vector<float> exact = problem.out;
      Attention({.select = select, .tau = 2000, .target_mass = 0.99f, .beta = 1}, Backend::kCpu, 1)
          .run({&query, 1}, &stats);
      EXPECT_LT(relative_error(problem.out, exact), 0.1);
      EXPECT_LE(stats.tokens_value, 2 * len);
    }
  }
}

TEST(Robustness, MistakesAreNamed) {
  Problem problem(spec_of(600), 2);
  problem.build_index();
  problem.run({});
  const DecodeQuery sound = problem.query;
  Attention attention;
  const auto expect_error = [&](const DecodeQuery& query, const char* what) {
    EXPECT_THAT([&] { attention.run({&query, 1}); }, ThrowsMessage<Error>(HasSubstr(what)));
  };
  DecodeQuery query = sound;
  query.num_q_heads = 3;
  expect_error(query, "num_q_heads (3) must be a positive multiple of num_kv_heads (2)");
  query = sound;
  query.kv.num_kv_heads = 0;
  expect_error(query, "num_kv_heads (0)");
  query = sound;
  query.kv.head_dim = 60;
  expect_error(query, "head_dim (60)");
  query = sound;
  query.kv.k.dtype = DType::kQ8_0;
  query.kv.head_dim = 80;
  expect_error(query, "multiple of 32");
  query = sound;
  query.kv.kv_len = -1;
  expect_error(query, "kv_len (-1)");
  query = sound;
  query.kv.k.data = nullptr;
  expect_error(query, "K data");
  query = sound;
  query.q = nullptr;
  expect_error(query, "q must not be null");
  query = sound;
  query.out = nullptr;
  expect_error(query, "out must not be null");
  query = sound;
  query.kv.v_head_dim = 32;
  expect_error(query, "the index is for");
  const int32_t pages[1] = {0};
  query = sound;
  query.kv.k.page_table = pages;
  expect_error(query, "page_tokens (0)");
  EXPECT_THAT([] { Attention({.budget = 0}); }, ThrowsMessage<Error>(HasSubstr("budget (0)")));
  EXPECT_THAT([&] { attention.set_options({.refine = 2}); }, ThrowsMessage<Error>(HasSubstr("refine")));
  EXPECT_EQ(attention.options().refine, DecodeOptions{}.refine) << "a rejected option leaves the old ones";
  attention.run({&sound, 1});
  attention.run({});
}

}  // namespace
}  // namespace tactic::test
