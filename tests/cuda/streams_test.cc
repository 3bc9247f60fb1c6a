// On a GPU: steps on several streams and from several threads.
#include "cuda/device.h"

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

}  // namespace
}  // namespace tactic::test
