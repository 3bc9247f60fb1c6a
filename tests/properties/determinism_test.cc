// Same inputs, same bits, for each thread count; other seeds, other draws.
#include <unistd.h>

#include "support.h"

namespace tactic::test {
namespace {

CacheSpec spec_of(int64_t kv_len) {
  CacheSpec spec;
  spec.kv_len = kv_len;
  return spec;
}

constexpr Select kSelectors[] = {Select::kDense, Select::kSample, Select::kFit, Select::kTopK};

TEST(Determinism, SameBitsForSameInputs) {
  for (const Select select : kSelectors) {
    for (const int32_t threads : {1, 2, 3, 5}) {
      SCOPED_TRACE(text(select_name(select), ", threads ", threads));
      std::vector<float> out, lse;
      for (int time = 0; time < 3; ++time) {  // each time from scratch, index and all
        Problem problem(spec_of(3000), 3, 7, 0.3f);
        problem.build_index();
        problem.run({.select = select}, Backend::kCpu, threads);
        if (time == 0) out = problem.out, lse = problem.lse;
        EXPECT_TRUE(same_bits(problem.out, out));
        EXPECT_TRUE(same_bits(problem.lse, lse));
      }
    }
  }
}

TEST(Determinism, ScratchLeavesNoTrace) {
  for (const Select select : kSelectors) {
    SCOPED_TRACE(select_name(select));
    Problem large(spec_of(4000), 4, 7, 0.3f), small(spec_of(900), 1, 8, 0.3f);
    large.build_index();
    small.build_index();
    small.run({.select = select, .tau = 100, .beta = 1});
    const std::vector<float> out = small.out, lse = small.lse;
    large.run({.select = select, .tau = 100, .beta = 1});
    Attention attention({.select = select, .tau = 100, .beta = 1}, Backend::kCpu, 1);
    attention.run({&large.query, 1});  // other shapes before
    small.index->state().calibration.assign(2, {});
    attention.run({&small.query, 1});
    EXPECT_TRUE(same_bits(small.out, out));
    EXPECT_TRUE(same_bits(small.lse, lse));
  }
}

TEST(Determinism, ThreadsChangeRoundingOnly) {
  for (const Select select : kSelectors) {
    std::vector<float> out;
    for (const int32_t threads : {1, 2, 3, 5, 16}) {
      Problem problem(spec_of(3000), 3, 7, 0.3f);
      problem.build_index();
      problem.run({.select = select}, Backend::kCpu, threads);
      if (out.empty()) out = problem.out;
      EXPECT_LT(relative_error(problem.out, out), 1e-5) << select_name(select) << ", threads " << threads;
    }
  }
}

TEST(Determinism, EverythingThatNamesTheStepChangesTheDraw) {
  Problem problem(spec_of(3000), 3, 7, 0.3f);
  problem.build_index();
  const DecodeOptions options{.tau = 100, .beta = 1};
  problem.run(options);
  const std::vector<float> out = problem.out;
  const DecodeQuery query = problem.query;
  const auto differs = [&](const DecodeOptions& o) {
    problem.build_index();  // a step learns, and may read rows next time that it found heavy
    problem.run(o);
    return !same_bits(problem.out, out);
  };
  EXPECT_FALSE(differs(options));
  problem.query.layer = 1;
  EXPECT_TRUE(differs(options));
  problem.query = query;
  problem.query.position = 1;
  EXPECT_TRUE(differs(options));
  problem.query = query;
  problem.query.stream_id = 1;
  EXPECT_TRUE(differs(options));
  problem.query = query;
  EXPECT_TRUE(differs({.tau = 100, .beta = 1, .seed = 1}));
  EXPECT_FALSE(differs(options));
}

// A caller's own OpenMP loop, with more queries for one thread than for another: no step waits for another's.
TEST(Determinism, StepsInsideACallersParallelRegion) {
  constexpr int kQueries = 3;
  std::vector<std::unique_ptr<Problem>> problems;
  std::vector<std::vector<float>> alone;
  for (int i = 0; i < kQueries; ++i) {
    problems.push_back(std::make_unique<Problem>(spec_of(1500), 2, 7 + i, 0.3f));
    problems.back()->build_index();
    problems.back()->run({.tau = 100});
    alone.push_back(problems.back()->out);
    problems.back()->index->forget_learned();
  }
  alarm(60);  // a step that waits for ever ends the program
#pragma omp parallel for num_threads(2) schedule(static)
  for (int i = 0; i < kQueries; ++i) problems[static_cast<size_t>(i)]->run({.tau = 100});
  alarm(0);
  for (size_t i = 0; i < kQueries; ++i) EXPECT_TRUE(same_bits(problems[i]->out, alone[i]));
}

}  // namespace
}  // namespace tactic::test
