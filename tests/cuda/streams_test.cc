// On a GPU: steps on several streams and from several threads.
#include <thread>

#include "cuda/device.h"
#include "cuda/launch_config.h"

namespace tactic::test {
namespace {

constexpr size_t kBusyBytes = size_t{1} << 30;

// The workspace lies where other numbers lay, and the stream waits for none of what clears it.
TEST(Streams, AStepRightAfterItsWorkspaceWasMade) {
  Problem problem(spec_of(DType::kF16, 64, 16384), 4);
  problem.run({.select = Select::kDense}, Backend::kReference);
  DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
  device.limits.max_sequences = 64;
  cuda::LayerIndex index({}, {2, 64, 64}, 1, 16384);
  index.build(0, device.batch, 16384, nullptr);
  const Device<std::byte> busy(kBusyBytes);
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  for (const DecodeOptions& options : {DecodeOptions{.select = Select::kDense},
                                       {.select = Select::kFit, .target_mass = 0.99f},
                                       {.select = Select::kTopK, .budget = 8000}}) {
    for (int again = 0; again < 8; ++again) {
      SCOPED_TRACE(text(select_name(options.select), " ", again));
      // All bits set, in memory that the next workspace is likely to get.
      { const Device<std::byte> dirty(cuda::Decode(options, device.limits).workspace_bytes()); }
      device.poison_out();
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      for (int i = 0; i < 8; ++i) cudaMemsetAsync(busy.get(), i, kBusyBytes, nullptr);
      cuda::Decode decode(options, device.limits);
      decode.run(device.batch, &index, stream);
      ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
      EXPECT_LT(relative_error(device.out(0), problem.out), 0.2);  // not if it was not written
    }
  }
  cudaStreamDestroy(stream);
}

// A step begins before the kernel in front of it has ended, here one whose output is the scales of its rows.
TEST(Streams, ScalesThatTheKernelInFrontWrites) {
  if (!cuda::is_compiled(DType::kF8E4M3, 64)) GTEST_SKIP() << "without fp8";
  Problem flat(spec_of(DType::kF16, 64, 16384), 1);  // its answer is 0.75 to the bit
  for (int32_t head = 0; head < 2; ++head) {
    for (int64_t row = 0; row < 16384; ++row) {
      flat.cache.set_key(head, row, std::vector<float>(64, 0.0f));
      flat.cache.set_value(head, row, std::vector<float>(64, 0.75f));
    }
  }
  const F8Scales scales{{0.75f, 0.75f}, {0.75f, 0.75f}};
  Problem problem(spec_of(DType::kF16, 64, 4000), 4);
  round_to_f8(problem.cache, scales);
  DeviceBatch writer({&flat}, DeviceLayout::kTokenMajor), device({&problem}, DeviceLayout::kTokenMajor, &scales);
  cuda::LayerIndex index({}, {2, 64, 64}, 1, 4000);
  index.build(0, device.batch, 4000, nullptr);
  cuda::Decode dense({.select = Select::kDense}, writer.limits), sample({.tau = 300}, device.limits);
  sample.run(device.batch, &index, nullptr);
  const std::vector<float> expected = device.out(0);
  device.batch.k.head_scales = device.batch.v.head_scales = static_cast<const float*>(writer.batch.out);
  for (int again = 0; again < 50; ++again) {
    writer.poison_out();
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    dense.run(writer.batch, nullptr, nullptr);
    sample.run(device.batch, &index, nullptr);
    EXPECT_TRUE(same_bits(device.out(0), expected)) << again;
  }
  for (const float x : writer.out(0)) ASSERT_EQ(x, 0.75f);
}

// One kernel with two sizes of shared memory.
TEST(Streams, ThreadsLaunchStepsOfDifferentSizes) {
  Problem problem(spec_of(DType::kF16, 64, 4000), 4);
  DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
  const auto steps = [&](int32_t max_rows, std::string* failed) {
    try {
      cudaStream_t stream = nullptr;
      cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
      const Device<float> out(problem.out.size());
      cuda::DecodeBatch batch = device.batch;
      batch.out = out.get();
      batch.lse = nullptr;
      cuda::DecodeLimits limits = device.limits;
      limits.max_rows = max_rows;
      cuda::LayerIndex index({}, {2, 64, 64}, 1, max_rows);
      index.build(0, batch, 4000, stream);
      cuda::Decode decode({.tau = 100}, limits);
      for (int i = 0; i < 20000; ++i) decode.run(batch, &index, stream);
      if (cudaStreamSynchronize(stream) != cudaSuccess) *failed = "steps";
      cudaStreamDestroy(stream);
    } catch (const Error& e) {
      *failed = e.what();
    }
  };
  std::string failed[2];
  std::thread other(steps, 4096, &failed[0]);
  steps(262144, &failed[1]);
  other.join();
  EXPECT_EQ(failed[0], "");
  EXPECT_EQ(failed[1], "");
}

}  // namespace
}  // namespace tactic::test
