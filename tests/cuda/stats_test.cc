// On a GPU: what a step reports, as statistics of the CPU.
#include <cmath>

#include "cuda/device.h"
#include "cuda/launch_config.h"
#include "cuda/layer_index.h"

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

// Without refinement the rows read for certain are the same whatever the seed, and only the draw moves their mass.
TEST(Stats, TheDrawMeasuresItself) {
  constexpr int kSeeds = 40;
  for (const int32_t group : {1, 4, 7}) {
    for (const float refine : {1.0f, 0.02f}) {
      SCOPED_TRACE(text("group ", group, " refine ", refine));
      Problem problem(spec_of(DType::kF16, 64, 9000), group);
      round_queries(problem);
      problem.build_index();
      problem.query.position = 8999;
      DeviceBatch device({&problem}, DeviceLayout::kPages16);
      device.batch.learn = true;
      double got = 0, expected = 0;
      std::vector<double> masses[2], errors[2];
      for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
        const DecodeOptions options{.tau = 200, .refine = refine, .beta = 0.5f, .seed = seed};
        cuda::LayerIndex index({}, {2, 64, 64}, 1, 9000);  // knows of no step before
        index.upload(0, *problem.index, nullptr);
        cuda::Decode decode(options, device.limits);
        const Device<cuda::StepRecord> records(2);
        decode.run(device.batch, &index, nullptr, records.get());
        const std::vector<cuda::StepRecord> read = records.values();
        const StepStats stats = problem.run(options, Backend::kReference);
        ASSERT_EQ(stats.dense, DenseReason::kNone);
        got += cuda::step_stats(read.data(), device.batch, {}).mass_std_error;
        expected += stats.mass_std_error;
        for (size_t h = 0; h < 2; ++h) {
          masses[h].push_back(read[h].certain_mass);
          errors[h].push_back(read[h].mass_std_error);
        }
      }
      EXPECT_NEAR(got / expected, 1, 0.1);
      for (size_t h = 0; h < 2 && group == 1 && refine == 1; ++h) {
        double mean = 0, variance = 0, told = 0;
        for (const double mass : masses[h]) mean += mass / kSeeds;
        for (const double mass : masses[h]) variance += (mass - mean) * (mass - mean) / (kSeeds - 1);
        for (const double error : errors[h]) told += error * error / kSeeds;
        EXPECT_GT(told, 0);
        EXPECT_LT(std::sqrt(variance / told), 1.3) << "head " << h;  // 40 draws know it to a ninth
        EXPECT_GT(std::sqrt(variance / told), 0.2) << "head " << h;
      }
    }
  }
}

TEST(Stats, WhatIsUsualIsLearned) {
  Problem problem(spec_of(DType::kF16, 64, 9000), 4);
  round_queries(problem);
  problem.build_index();
  DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
  device.batch.learn = true;
  cuda::LayerIndex index({}, {2, 64, 64}, 1, 9000);
  index.upload(0, *problem.index, nullptr);
  const Device<cuda::StepRecord> records(2);
  problem.query.position = 8999;                 // no multiple of eight: no pairs for beta
  for (uint64_t seed = 1; seed <= 30; ++seed) {  // of one position, as if they followed one another
    const DecodeOptions options{.tau = 200, .refine = 0.02f, .beta = 0.5f, .seed = seed};
    cuda::Decode decode(options, device.limits);
    decode.run(device.batch, &index, nullptr, records.get());
    problem.run(options);
  }
  std::vector<cuda::HeadCalibration> known(2);
  cudaMemcpy(known.data(), index.impl().view.calibration, 2 * sizeof(known[0]), cudaMemcpyDeviceToHost);
  double got = 0, expected = 0;
  for (size_t h = 0; h < 2; ++h) {
    const std::vector<double>& usual = problem.index->state().calibration[h].usual_variance;
    ASSERT_EQ(usual.size(), 4u);
    for (size_t g = 0; g < 4; ++g) {
      EXPECT_GT(known[h].usual_variance[g], 0);
      got += std::log(known[h].usual_variance[g]) / 8;
      expected += std::log(usual[g]) / 8;
    }
  }
  EXPECT_NEAR(got, expected, 0.25);
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
