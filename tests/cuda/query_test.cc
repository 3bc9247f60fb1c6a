// On a GPU: sinks, and what comes with a query (likely rows, a factor of tau), against the reference.
#include <algorithm>

#include "cuda/device.h"
#include "cuda/layer_index.h"

namespace tactic::test {
namespace {

struct Step {
  std::vector<float> out, lse;
  std::vector<cuda::StepRecord> records;

  int64_t tokens() const {
    int64_t sum = 0;
    for (const cuda::StepRecord& r : records) sum += r.tokens_exact + r.tokens_selected + r.tokens_refined;
    return sum;
  }
};

Step run(const Problem& problem, DeviceBatch& device, const DecodeOptions& options) {
  const CacheSpec& spec = problem.cache.spec();
  cuda::LayerIndex index({}, {spec.num_kv_heads, spec.head_dim, spec.head_dim}, 1, static_cast<int32_t>(spec.kv_len));
  index.upload(0, *problem.index, nullptr);
  cuda::Decode decode(options, device.limits);
  const Device<cuda::StepRecord> records(static_cast<size_t>(spec.num_kv_heads));
  decode.run(device.batch, &index, nullptr, records.get());
  return {device.out(0), device.lse(0), records.values()};
}

TEST(Query, HeadsThatRestOnASinkReadAsTheReference) {
  for (const int32_t dim : {64, 128}) {
    for (const int32_t group : {1, 4, 7}) {
      for (const float times : {1.0f, 19.0f, 5000.0f}) {
        SCOPED_TRACE(text("d", dim, " g", group, " a sink of ", times));
        Problem problem(spec_of(DType::kF16, dim, 6000), group, 7, 0.3f);
        round_queries(problem);
        make_sink(problem, times);
        problem.build_index();
        problem.query.position = 5999;
        DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
        const DecodeOptions options{.tau = 300, .refine = 1};
        const Step step = run(problem, device, options);
        Selection selection;
        problem.query.selection = &selection;
        const StepStats stats = problem.run(options, Backend::kReference);
        const auto expected = static_cast<double>(stats.tokens_certain + stats.tokens_sampled);
        EXPECT_NEAR(static_cast<double>(step.tokens()), expected, 2 + 0.005 * expected);
        // The output is as small as the rest of the weights, its error beside it so much larger.
        expect_near(problem, step.out, step.lse, DType::kF16,
                    2 * (1 + times) * std::sqrt(read_mass(problem, selection).variance));
      }
    }
  }
}

TEST(Query, LikelyRowsAreReadForCertainAndOnce) {
  const std::vector<int32_t> likely = {701, -1, 2, 100, 700, 3999, 701, 5000, 2500};  // 2: a sink; 5000: not there
  std::vector<int32_t> ascending = {2, 100, 700, 701, 2500};
  const Device<int32_t> rows(likely);
  for (const bool learn : {false, true}) {
    for (const float tau : {30.0f, 1e9f}) {  // few rows, all rows
      SCOPED_TRACE(text("learn ", learn, " tau ", tau));
      Problem problem(spec_of(DType::kF16, 64, 4000), 4, 7, 0.3f);
      round_queries(problem);
      problem.build_index();
      problem.query.position = 3999;
      DeviceBatch device({&problem}, DeviceLayout::kPages16);
      device.batch.learn = learn;
      const DecodeOptions options{.tau = tau, .refine = 1, .beta = 1};
      const Step without = run(problem, device, options);
      device.batch.likely_rows = rows.get();
      device.batch.max_likely_rows = static_cast<int32_t>(likely.size());
      const Step with = run(problem, device, options);
      for (size_t h = 0; h < with.records.size(); ++h)
        EXPECT_EQ(with.records[h].tokens_exact, without.records[h].tokens_exact + 4) << "3999 is recent, 2 a sink";
      problem.query.likely_rows = ascending.data();
      problem.query.num_likely_rows = static_cast<int32_t>(ascending.size());
      Selection selection;
      problem.query.selection = &selection;
      const StepStats stats = problem.run(options, Backend::kReference);
      const auto expected = static_cast<double>(stats.tokens_certain + stats.tokens_sampled);
      EXPECT_NEAR(static_cast<double>(with.tokens()), expected, 2 + 0.005 * expected);
      expect_near(problem, with.out, with.lse, DType::kF16, 2 * std::sqrt(read_mass(problem, selection).variance));
    }
  }
}

TEST(Query, AFactorOfTauIsThatTau) {
  Problem problem(spec_of(DType::kF16, 64, 6000), 4, 7, 0.3f);
  round_queries(problem);
  problem.build_index();
  DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
  for (const float factor : {0.25f, 1.0f, 4.0f}) {
    const Device<float> factors(std::vector<float>{factor});
    device.batch.tau_factors = nullptr;
    const Step expected = run(problem, device, {.tau = 200 * factor});
    device.batch.tau_factors = factors.get();
    const Step step = run(problem, device, {.tau = 200});
    EXPECT_TRUE(same_bits(step.out, expected.out)) << factor;
    EXPECT_EQ(step.records[0].tau, 200 * factor);
  }
}

}  // namespace
}  // namespace tactic::test
