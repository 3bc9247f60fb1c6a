// On a GPU: what a step reports, as statistics of the CPU.
#include <cmath>

#include "cuda/device.h"
#include "cuda/launch_config.h"

namespace tactic::test {
namespace {

// Device figures of one sequence against the reference's of the same step.
void expect_same(const StepStats& got, const StepStats& expected, double slack) {
  EXPECT_EQ(got.kv_len, expected.kv_len);
  EXPECT_EQ(got.num_kv_heads, expected.num_kv_heads);
  EXPECT_EQ(got.kv_bytes_present, expected.kv_bytes_present);
  EXPECT_EQ(got.dense, expected.dense);
  const auto near = [&](int64_t a, int64_t b) {
    EXPECT_NEAR(static_cast<double>(a), static_cast<double>(b), slack * static_cast<double>(b));
  };
  near(got.tokens_certain, expected.tokens_certain);
  near(got.tokens_sampled, expected.tokens_sampled);
  near(got.tokens_value, expected.tokens_value);
  near(got.kv_bytes, expected.kv_bytes);
  // Places take four bytes here, and every 16 clusters of 64 + 12 bytes bring 2 x 64 + 16 of their segment's mean key.
  EXPECT_NEAR(static_cast<double>(got.index_bytes), static_cast<double>(expected.index_bytes),
              (slack + 0.05 + 144.0 / (16 * 76)) * static_cast<double>(expected.index_bytes));
  // The draws may differ; each errs by its standard error, all heads alike at worst.
  EXPECT_NEAR(got.estimated_mass, expected.estimated_mass, 4 * std::sqrt(2) * expected.mass_std_error + 1e-3);
}

TEST(Stats, AreTheReferences) {
  for (const int64_t kv_len : {700, 12001}) {
    Problem problem(spec_of(DType::kF16, 64, kv_len), 4);
    round_queries(problem);
    const IndexOptions index_options{.outlier_fraction = 0.01f};
    problem.build_index(index_options);
    problem.query.position = kv_len - 1;
    DeviceBatch device({&problem}, DeviceLayout::kHeadMajor);
    device.limits.index = index_options;
    cuda::LayerIndex index(index_options, {2, 64, 64}, 1, static_cast<int32_t>(kv_len));
    index.upload(0, *problem.index, nullptr);
    for (const DecodeOptions& options : {DecodeOptions{.tau = 300, .refine = 1, .seed = 5},
                                         {.tau = 300, .refine = 0.03f, .beta = 0.2f, .seed = 5},
                                         {.select = Select::kDense},
                                         {.select = Select::kTopK, .budget = 100}}) {
      SCOPED_TRACE(text("kv_len ", kv_len, " ", select_name(options.select), " refine ", options.refine));
      cuda::Decode decode(options, device.limits);
      const Device<cuda::StepRecord> records(2);
      decode.run(device.batch, &index, nullptr, records.get());
      const std::vector<cuda::StepRecord> read = records.values();
      const StepStats expected = problem.run(options, Backend::kReference);
      // Ties between two ways to round draw other rows, or refine another cluster.
      expect_same(cuda::step_stats(read.data(), device.batch, index_options), expected,
                  options.select == Select::kSample ? 0.03 : 0.005);
      if (options.select == Select::kSample) {
        EXPECT_EQ(read[0].tau, options.tau);
        EXPECT_NEAR(read[0].beta, options.beta > 0 ? options.beta : 0.75, 1e-6);
      }
    }
  }
}

TEST(Stats, FitCountsItsProbes) {
  Problem problem(spec_of(DType::kF16, 64, 9000, 1), 4);
  problem.build_index();
  DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
  cuda::LayerIndex index({}, {1, 64, 64}, 1, 9000);
  index.upload(0, *problem.index, nullptr);
  cuda::Decode decode({.select = Select::kFit}, device.limits);
  const Device<cuda::StepRecord> records(1);
  decode.run(device.batch, &index, nullptr, records.get());
  const cuda::StepRecord record = records.values()[0];
  // 8960 rows are in segments, 4 of them sinks.
  EXPECT_EQ(record.tokens_probed, 4 * (8956 / 50 + 2 * (8956 / 100)));
}

}  // namespace
}  // namespace tactic::test
