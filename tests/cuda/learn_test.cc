// On a GPU: tau from target_error, and what steps learn, against the CPU.
#include "cuda/device.h"
#include "cuda/layer_index.h"

namespace tactic::test {
namespace {

std::vector<cuda::HeadCalibration> calibration_of(const cuda::LayerIndex& index) {
  std::vector<cuda::HeadCalibration> all(static_cast<size_t>(index.impl().shape.num_kv_heads));
  cudaMemcpy(all.data(), index.impl().view.calibration, all.size() * sizeof(all[0]), cudaMemcpyDeviceToHost);
  return all;
}

TEST(Learn, TauFollowsFromTheErrorAskedFor) {
  Problem problem(spec_of(DType::kF16, 64, 5000), 4);
  round_queries(problem);
  problem.build_index();
  for (const float error : {0.02f, 0.05f, 0.2f}) {
    for (const double ratio : {1.0, 4.0}) {
      for (Calibration& known : problem.index->state().calibration) known.variance_ratio = ratio;
      DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
      cuda::LayerIndex index({}, {2, 64, 64}, 1, 5000);
      index.upload(0, *problem.index, nullptr);
      cuda::Decode by_error({.target_error = error, .seed = 3}, device.limits);
      by_error.run(device.batch, &index, nullptr);
      const std::vector<float> out = device.out(0);
      SelectParams params;
      params.variance_ratio = static_cast<float>(ratio);
      cuda::Decode by_tau({.tau = tau_of({.target_error = error}, params), .seed = 3}, device.limits);
      by_tau.run(device.batch, &index, nullptr);
      // The same rows but for one that the last bit of tau decides.
      EXPECT_LT(relative_error(out, device.out(0)), 0.02) << error << " " << ratio;
    }
  }
}

TEST(Learn, WhatTheCpuLearns) {
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    for (const int32_t dim : {64, 128}) {
      for (const int32_t group : {1, 4, 7}) {
        SCOPED_TRACE(text(dtype_name(dtype), " d", dim, " g", group));
        Problem problem(spec_of(dtype, dim, 6001), group);
        round_queries(problem);
        if (group == 4) make_sink(problem, 3);
        problem.build_index();
        problem.query.position = 6000;  // a multiple of eight
        DeviceBatch device({&problem}, DeviceLayout::kPages16);
        device.batch.learn = true;
        cuda::LayerIndex index({}, {2, dim, dim}, 1, 6001);
        index.upload(0, *problem.index, nullptr);
        const DecodeOptions options{.tau = 1000, .refine = 1};
        cuda::Decode decode(options, device.limits);
        for (int step = 1; step <= 2; ++step) {
          decode.run(device.batch, &index, nullptr);
          problem.run(options, Backend::kCpu);
          const std::vector<cuda::HeadCalibration> learned = calibration_of(index);
          for (size_t h = 0; h < 2; ++h) {
            Calibration& expected = problem.index->state().calibration[h];
            if (group != 4) {
              EXPECT_GT(expected.sum_xx, 1);  // beside the sink no cluster need be read whole
            }
            // A cluster at the limit of being read whole is in one's pairs and not in the other's.
            EXPECT_NEAR(learned[h].sum_xx, expected.sum_xx, 0.02 * expected.sum_xx);
            EXPECT_NEAR(learned[h].sum_xy, expected.sum_xy, 0.02 * std::abs(expected.sum_xy) + 0.01 * expected.sum_xx);
            EXPECT_NEAR(learned[h].beta, expected.beta(), 0.01);
            // The CPU adjusts the ratio a little at every step, the device at every eighth as much as in eight. A row
            // that only one of them drew makes a fifth of the variance at most.
            if (step == 1) {
              const double per_step = 0.02, per_eight = 1 - std::pow(0.98, 8);
              EXPECT_NEAR(std::log(learned[h].variance_ratio), std::log(expected.variance_ratio) * per_eight / per_step,
                          per_eight * 0.2);
            }
            expected.expected.clear();  // the CPU names rows after exact ones too
          }
        }
        device.set_lens({6000});  // not a multiple
        const std::vector<cuda::HeadCalibration> known = calibration_of(index);
        decode.run(device.batch, &index, nullptr);
        for (size_t h = 0; h < 2; ++h) {
          EXPECT_EQ(calibration_of(index)[h].sum_xx, known[h].sum_xx);
          EXPECT_EQ(calibration_of(index)[h].variance_ratio, known[h].variance_ratio);
        }
      }
    }
  }
}

TEST(Learn, AnotherSequenceInTheSlotLearnsAnew) {
  Problem problem(spec_of(DType::kF16, 64, 6001), 4);
  DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
  device.batch.learn = true;
  cuda::LayerIndex index({}, {2, 64, 64}, 1, 6001);
  const Device<cuda::StepRecord> records(2);  // so that the draw is measured too
  cuda::Decode decode({.target_error = 0.03f, .refine = 1}, device.limits);
  std::vector<float> first;
  for (int request = 0; request < 3; ++request) {
    index.build(0, device.batch, 6001, nullptr);
    device.poison_out();
    decode.run(device.batch, &index, nullptr, records.get());
    if (request == 0) first = device.out(0);
    EXPECT_TRUE(same_bits(device.out(0), first)) << "request " << request;
    EXPECT_NE(calibration_of(index)[0].beta, index.impl().unknown[0].beta);
    EXPECT_GT(calibration_of(index)[0].usual_variance[0], 0);
    index.truncate(0, 0, nullptr);
    for (const cuda::HeadCalibration& known : calibration_of(index)) {
      EXPECT_EQ(known.beta, index.impl().unknown[0].beta);
      EXPECT_EQ(known.variance_ratio, 1);
      EXPECT_EQ(known.usual_variance[0], 0);
    }
  }
}

}  // namespace
}  // namespace tactic::test
