// On a GPU: what becomes of an index when it is given, grown, cut and handed on.
#include "cuda/layer_index.h"

#include "cuda/device.h"

namespace tactic::test {
namespace {

// Of the first kv_len rows, every one read.
std::vector<float> exact(Problem& problem, int64_t kv_len) {
  problem.query.kv = problem.cache.view();
  problem.query.kv.kv_len = kv_len;
  Attention({.select = Select::kDense}, Backend::kReference).run({&problem.query, 1});
  return problem.out;
}

TEST(Upload, AnIndexThatDoesNotFitIsRefusedAndChangesNothing) {
  Problem problem(spec_of(DType::kF16, 64, 8192), 4);
  DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
  cuda::LayerIndex index({}, {2, 64, 64}, 2, 8192);
  index.build(0, device.batch, 8192, nullptr);
  cuda::Decode decode({.tau = 300}, device.limits);
  decode.run(device.batch, &index, nullptr);
  const std::vector<float> before = device.out(0);

  KvIndex parts({}, {2, 64, 64});  // never given the time for a full segment
  parts.write(0, 8192);
  for (int i = 0; i < 40; ++i) parts.maintain(problem.cache.view(), 0.5);
  ASSERT_EQ(parts.state().segments.size(), 32u);
  EXPECT_THROW(index.upload(0, parts, nullptr), Error);
  for (const auto& [heads, dim] : {std::pair{1, 64}, {4, 64}, {2, 128}}) {
    const KvIndex other({}, {heads, dim, dim});
    EXPECT_THROW(index.upload(0, other, nullptr), Error);
  }
  KvIndex hole({}, {2, 64, 64});  // begins as one that fits
  hole.write(0, 8192);
  hole.maintain(problem.cache.view());
  hole.remove(3000, 1);
  EXPECT_THROW(index.upload(0, hole, nullptr), Error);
  device.poison_out();
  decode.run(device.batch, &index, nullptr);
  EXPECT_TRUE(same_bits(device.out(0), before));
}

TEST(Upload, SegmentsWhoseRowsAreGoneAreLeftOut) {
  Problem problem(spec_of(DType::kF16, 64, 5000), 4);
  problem.build_index();
  problem.index->truncate(3000);  // the second segment stays, for its rows before
  for (int64_t row = 3000; row < 5000; ++row) problem.cache.poison(row);
  DeviceBatch device({&problem}, DeviceLayout::kPages16);
  device.set_lens({3000});
  cuda::LayerIndex index({}, {2, 64, 64}, 1, 5000);
  index.upload(0, *problem.index, nullptr);
  const Device<cuda::StepRecord> records(2);
  for (const DecodeOptions& options : {DecodeOptions{.tau = 500},
                                       {.select = Select::kFit, .target_mass = 0.99f},
                                       {.select = Select::kTopK, .budget = 1000}}) {
    SCOPED_TRACE(select_name(options.select));
    cuda::Decode decode(options, device.limits);
    decode.run(device.batch, &index, nullptr, records.get());
    EXPECT_EQ(records.values()[0].tokens_exact, 4 + 3000 - 2048);
    EXPECT_LT(relative_error(device.out(0), exact(problem, 3000)), 0.4);  // not if it is no number
  }
  // A row that was rewritten is read as it is.
  problem.build_index();
  problem.index->write(4500, 1);
  index.upload(0, *problem.index, nullptr);
  EXPECT_EQ(index.impl().states[0], (cuda::SequenceState{2, (4500 - 4096) / 256}));
}

// All of the device's memory, in blocks of 2 MiB at least.
std::vector<Device<std::byte>> all_memory() {
  std::vector<Device<std::byte>> blocks;
  for (size_t bytes = size_t{4} << 30; bytes >= size_t{2} << 20; bytes /= 2) {
    try {
      while (true) blocks.emplace_back(bytes);
    } catch (const Error&) {
      cudaGetLastError();
    }
  }
  return blocks;
}

TEST(Build, MemoryThatRunsOutChangesNothing) {
  // A full segment, whose scratch memory is small, and seven parts, which want 2.4 MB.
  constexpr int32_t kHeads = 16, kBefore = 300, kAfter = 3900;
  Problem problem(spec_of(DType::kF16, 64, kAfter, kHeads), 1);
  DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
  device.set_lens({kBefore});
  const IndexOptions options{.cluster_tokens = 64};
  device.limits.index = options;
  cuda::LayerIndex index(options, {kHeads, 64, 64}, 1, kAfter);
  index.build(0, device.batch, kBefore, nullptr);
  cuda::Decode decode({.tau = 300}, device.limits);
  decode.run(device.batch, &index, nullptr);
  const std::vector<float> before = device.out(0);
  {
    int number = 0;
    cudaMemPool_t pool = nullptr;
    cudaGetDevice(&number);
    cudaDeviceGetDefaultMemPool(&pool, number);
    cudaMemPoolTrimTo(pool, 0);  // what the build before gave back
    const std::vector<Device<std::byte>> blocks = all_memory();
    try {
      index.build(0, device.batch, kAfter, nullptr);
      GTEST_SKIP() << "there is memory that a test cannot take";
    } catch (const Error&) {
    }
  }
  device.poison_out();
  decode.run(device.batch, &index, nullptr);
  EXPECT_TRUE(same_bits(device.out(0), before));
}

TEST(Build, TheBatchMustHaveTheSequence) {
  Problem problem(spec_of(DType::kF16, 64, 300), 1);
  DeviceBatch device({&problem}, DeviceLayout::kPages16);
  cuda::LayerIndex index({}, {2, 64, 64}, 2, 300);
  EXPECT_THROW(index.build(1, device.batch, 300, nullptr), Error);
}

TEST(Build, ThePageTableMustHaveThePages) {
  Problem problem(spec_of(DType::kF16, 64, 300), 1);
  DeviceBatch device({&problem}, DeviceLayout::kPages16);
  cuda::LayerIndex index({}, {2, 64, 64}, 1, 300);
  device.batch.max_pages = 18;
  EXPECT_EQ(message_of([&] { index.build(0, device.batch, 300, nullptr); }), "pages of kv_len (19) must be in 0..18");
  device.batch.max_pages = 19;
  index.build(0, device.batch, 300, nullptr);
}

}  // namespace
}  // namespace tactic::test
