// The longest sequence there is.
#include "device.h"

namespace tactic::test {
namespace {

TEST(Limits, SixteenMillionRows) {
  // 2^24 rows are one problem's 2^16 rows 256 times over, so that exact attention is that problem's.
  constexpr int32_t kBlock = 1 << 16, kRows = 1 << 24, kDim = 64;
  constexpr size_t kBlockBytes = size_t{kBlock} * kDim * 2;
  size_t available = 0, total = 0;
  ASSERT_EQ(cudaMemGetInfo(&available, &total), cudaSuccess);
  if (available < (size_t{6} << 30)) GTEST_SKIP() << "needs 6 GiB of device memory";
  Problem problem(spec_of(DType::kF16, kDim, kBlock, 1), 2);
  DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
  ASSERT_EQ(device.batch.k.token_stride_bytes, kDim * 2);
  Device<uint16_t> k(size_t{kRows} * kDim), v(size_t{kRows} * kDim);
  for (size_t i = 0; i < kRows / kBlock; ++i) {
    const size_t at = i * kBlockBytes / 2;
    ASSERT_EQ(cudaMemcpy(k.get() + at, device.batch.k.data, kBlockBytes, cudaMemcpyDeviceToDevice), cudaSuccess);
    ASSERT_EQ(cudaMemcpy(v.get() + at, device.batch.v.data, kBlockBytes, cudaMemcpyDeviceToDevice), cudaSuccess);
  }
  device.batch.k.data = k.get();
  device.batch.v.data = v.get();
  device.limits.max_rows = kRows;
  device.set_lens({kRows});
  problem.query.kv = problem.cache.view();
  Attention({.select = Select::kDense}, Backend::kReference).run({&problem.query, 1});

  cuda::Decode dense({.select = Select::kDense}, device.limits);
  dense.run(device.batch, nullptr, nullptr);
  EXPECT_LT(relative_error(device.out(0), problem.out), 2e-3);

  cuda::LayerIndex index({}, {1, kDim, kDim}, 1, kRows);
  index.build(0, device.batch, kRows, nullptr);
  cuda::Decode decode({.tau = 4000}, device.limits);
  Device<cuda::StepRecord> record(1);
  device.poison_out();
  decode.run(device.batch, &index, nullptr, record.get());
  EXPECT_LT(relative_error(device.out(0), problem.out), 0.25);
  const cuda::StepRecord step = record.values()[0];
  EXPECT_EQ(step.kv_len, kRows);
  EXPECT_EQ(step.segments, kRows / 2048);
  EXPECT_EQ(step.dense, DenseReason::kNone);
  EXPECT_GT(step.tokens_selected, 1000);
  EXPECT_LT(step.tokens_selected, 16000);

  EXPECT_THROW(index.build(0, device.batch, kRows + 1, nullptr), Error);
}

}  // namespace
}  // namespace tactic::test
