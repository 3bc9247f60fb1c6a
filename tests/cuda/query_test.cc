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
      for (const auto& [times, tau] : {std::pair{1.0f, 300.0f}, {19.0f, 300.0f}, {100.0f, 3000.0f}}) {
        SCOPED_TRACE(text("d", dim, " g", group, " a sink of ", times));
        Problem problem(spec_of(DType::kF16, dim, 6000), group, 7, 0.3f);
        round_queries(problem);
        make_sink(problem, times);
        problem.build_index();
        problem.query.position = 5999;
        DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
        const DecodeOptions options{.tau = tau, .refine = 1};
        const Step step = run(problem, device, options);
        Selection selection;
        problem.query.selection = &selection;
        const StepStats stats = problem.run(options, Backend::kReference);
        const auto expected = static_cast<double>(stats.tokens_certain + stats.tokens_sampled);
        EXPECT_NEAR(static_cast<double>(step.tokens()), expected, 2 + 0.005 * expected);
        // The output is as small as the rest of the weights, the error beside it so much larger.
        const double noise = 2 * std::sqrt(read_mass(problem, selection).variance);
        for (size_t h = 0; h < step.lse.size(); ++h) {
          EXPECT_NEAR(step.lse[h], problem.lse[h], noise + 2e-3) << "head " << h;
          const size_t size = static_cast<size_t>(dim);
          const auto part = [&](const std::vector<float>& x) {
            return std::vector<float>(x.begin() + static_cast<ptrdiff_t>(h * size),
                                      x.begin() + static_cast<ptrdiff_t>((h + 1) * size));
          };
          EXPECT_LT(relative_error(part(step.out), part(problem.out)), 0.3)
              << "a rounding tie draws another row, of a hundred";
        }
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
      if (tau > 1e8f) {
        EXPECT_EQ(with.tokens(), 2 * 4000) << "each row once";
        EXPECT_EQ(without.tokens(), 2 * 4000);
      }
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

TEST(Query, EachSequenceHasItsOwn) {
  std::vector<std::unique_ptr<Problem>> problems;
  std::vector<Problem*> pointers;
  for (const int64_t kv_len : {3000, 5000, 2500}) {
    CacheSpec spec = spec_of(DType::kF16, 64, kv_len);
    spec.seed = static_cast<uint64_t>(kv_len);
    problems.push_back(std::make_unique<Problem>(spec, 4, static_cast<uint64_t>(kv_len), 0.3f));
    round_queries(*problems.back());
    pointers.push_back(problems.back().get());
  }
  DeviceBatch device(pointers, DeviceLayout::kHeadMajor);
  const Device<int32_t> rows(std::vector<int32_t>{-1, -1, -1, 900, 4000, 901, 100, -1, 100});
  const Device<float> factors(std::vector<float>{1, 4, 0.25f});
  device.batch.likely_rows = rows.get();
  device.batch.max_likely_rows = 3;
  device.batch.tau_factors = factors.get();
  cuda::LayerIndex index({}, {2, 64, 64}, 3, 8192);
  for (int32_t i = 0; i < 3; ++i)
    index.build(i, device.batch, static_cast<int32_t>(pointers[static_cast<size_t>(i)]->cache.spec().kv_len), nullptr);
  cuda::Decode decode({.tau = 100, .refine = 1}, device.limits);
  const Device<cuda::StepRecord> records(6);
  decode.run(device.batch, &index, nullptr, records.get());
  const int32_t likely[] = {0, 3, 1};
  const float tau[] = {100, 400, 25};
  for (size_t i = 0; i < 6; ++i) {
    const cuda::StepRecord r = records.values()[i];
    const auto kv_len = static_cast<int32_t>(pointers[i / 2]->cache.spec().kv_len);
    EXPECT_EQ(r.tokens_exact, 4 + kv_len % 256 + likely[i / 2]) << i;  // sinks, recent rows
    EXPECT_EQ(r.tau, tau[i / 2]) << i;
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
