// Memory that runs out at any allocation: the caller gets the exception, from whatever thread, and what was there
// before still answers right.
#include "failing_new.h"
#include "support.h"

namespace tactic::test {
namespace {

// Whether fn ran to its end although the allocation after `allowed` ones fails.
template <class Fn>
bool survives(int64_t allowed, Fn fn) {
  allocations_left = allowed;
  try {
    fn();
    allocations_left = INT64_MAX;
    return true;
  } catch (const std::bad_alloc&) {
    allocations_left = INT64_MAX;
    return false;
  }
}

CacheSpec spec_of(int64_t kv_len) {
  CacheSpec spec;
  spec.kv_len = kv_len;
  return spec;
}

TEST(Memory, AStepThatRunsOutCanBeRepeated) {
  for (const Select select : {Select::kDense, Select::kSample, Select::kFit, Select::kTopK}) {
    for (const bool spoilt : {false, true}) {  // a query that is answered twice, sparsely and then densely
      for (const int32_t threads : {1, 2}) {
        SCOPED_TRACE(text(select_name(select), spoilt ? ", spoilt" : "", ", threads ", threads));
        Problem problem(spec_of(900), 2, 7, 0.3f), other(spec_of(700), 1, 8, 0.3f);
        problem.build_index();
        other.build_index();
        if (spoilt) other.q[3] = std::nanf("");
        const DecodeOptions options{.select = select, .tau = 100, .beta = 1};
        const auto run = [&](Attention& attention) {
          for (Problem* p : {&problem, &other}) p->index->state().calibration.assign(2, {});
          const DecodeQuery queries[] = {problem.query, other.query};
          StepStats stats[2];
          attention.run(queries, stats);
          return stats[0].tokens_value + stats[1].tokens_value;
        };
        problem.run(options), other.run(options);  // fills in the queries
        Attention sound(options, Backend::kCpu, threads);
        const int64_t tokens = run(sound);
        const std::vector<float> expected = problem.out;
        int64_t allowed = 0;
        for (bool done = false; !done; ++allowed) {
          Attention attention(options, Backend::kCpu, threads);
          done = survives(allowed, [&] { run(attention); });
          ASSERT_EQ(run(attention), tokens) << "after " << allowed << " allocations";
          ASSERT_TRUE(same_bits(problem.out, expected)) << "after " << allowed << " allocations";
        }
        EXPECT_GT(allowed, 10) << "memory never ran out";
      }
    }
  }
}

// Exact attention and attention over all rows of the index agree: no row is lost, none counts twice.
void expect_whole(Problem& problem) {
  problem.run({.select = Select::kDense});
  const std::vector<float> exact = problem.out;
  const StepStats stats = problem.run({.select = Select::kTopK, .budget = 1 << 20});
  EXPECT_EQ(stats.tokens_certain, problem.cache.spec().kv_len * 2);
  EXPECT_LT(relative_error(problem.out, exact), 1e-4);
}

TEST(Memory, UpkeepThatRunsOutLosesNoRow) {
  for (const Clustering clustering : {Clustering::kIncremental, Clustering::kWhole}) {
    Problem problem(spec_of(900), 1, 7, 0.3f);
    const KvView kv = problem.cache.view();
    const IndexOptions options{
        .clustering = clustering, .segment_tokens = 256, .provisional_tokens = 64, .iterations = 1};
    int64_t allowed = 0;
    for (bool done = false; !done; ++allowed) {
      problem.index = std::make_unique<KvIndex>(options, KvShape{2, 64, 64});
      KvIndex& index = *problem.index;
      index.set_num_threads(2);
      index.write(0, 300);
      index.maintain(kv);
      done = survives(allowed, [&] {
        index.write(250, 650);
        index.maintain(kv);
      });
      ASSERT_NO_FATAL_FAILURE(expect_whole(problem)) << "after " << allowed << " allocations";
      index.write(250, 650);
      index.maintain(kv);
      EXPECT_EQ(index.rows_written(), 900);
      EXPECT_GT(index.rows_indexed(), 800);
      ASSERT_NO_FATAL_FAILURE(expect_whole(problem)) << "repeated after " << allowed << " allocations";
      if (HasFailure()) FAIL() << "after " << allowed << " allocations";
    }
    EXPECT_GT(allowed, 20) << "memory never ran out";
  }
}

}  // namespace
}  // namespace tactic::test
