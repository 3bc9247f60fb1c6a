// On a GPU: rows that changed since they were clustered are noticed, and then every row is read.
#include "cuda/device.h"
#include "cuda/launch_config.h"
#include "cuda/layer_index.h"
#include "reference/steps.h"

namespace tactic::test {
namespace {

std::vector<uint8_t> checks_of(const cuda::LayerIndex& index, int32_t head, int32_t rows) {
  std::vector<uint8_t> checks(static_cast<size_t>(rows));
  const cuda::IndexView& view = index.impl().view;
  cudaMemcpy(checks.data(), view.row_checks + static_cast<int64_t>(head) * view.geometry.max_rows, checks.size(),
             cudaMemcpyDeviceToHost);
  return checks;
}

TEST(RowChecks, AreTheCpus) {
  for (const DType dtype : kTypes) {
    for (const int32_t dim : kDims) {
      if (!fits(dtype, dim) || !cuda::is_compiled(dtype, dim)) continue;
      Problem problem(spec_of(dtype, dim, 2048 + 256), 1);
      problem.build_index();
      for (const DeviceLayout layout : kLayouts) {
        DeviceBatch device({&problem}, layout);
        cuda::LayerIndex uploaded({}, {2, dim, dim}, 1, 4096), built({}, {2, dim, dim}, 1, 4096);
        uploaded.upload(0, *problem.index, nullptr);
        built.build(0, device.batch, 2048 + 256, nullptr);
        for (int32_t head = 0; head < 2; ++head)
          EXPECT_EQ(checks_of(uploaded, head, 2304), checks_of(built, head, 2304)) << dtype_name(dtype) << " d" << dim;
      }
    }
  }
}

constexpr DecodeOptions kSelectors[] = {
    {.tau = 400}, {.select = Select::kFit, .target_mass = 0.9f}, {.select = Select::kTopK, .budget = 400}};

TEST(RowChecks, AChangedRowMakesTheHeadDenseAlsoInAGraph) {
  for (const DType dtype : {DType::kF16, DType::kBF16, DType::kQ8_0}) {
    for (const auto& [group, options] : {std::pair{2, kSelectors[0]},
                                         {8, kSelectors[0]},
                                         {2, kSelectors[1]},
                                         {8, kSelectors[1]},
                                         {2, kSelectors[2]},
                                         {8, kSelectors[2]}}) {
      if (!cuda::is_compiled(dtype, 64)) continue;
      SCOPED_TRACE(text(dtype_name(dtype), " g", group, " ", select_name(options.select)));
      Problem problem(spec_of(dtype, 64, 5000), group);
      round_queries(problem);
      problem.build_index();
      // A copy of the cache in which head 0 has other values in some rows: some of them are read.
      Problem other(spec_of(dtype, 64, 5000), group);
      other.q = problem.q;
      for (int64_t row = 1000; row < 3000; ++row) other.cache.set_value(0, row, other.cache.value(0, row + 1500));
      DeviceBatch device({&problem, &other}, DeviceLayout::kPages16);
      cuda::LayerIndex index({}, {2, 64, 64}, 2, 5000);
      for (int32_t s = 0; s < 2; ++s) index.upload(s, *problem.index, nullptr);
      cudaStream_t stream = nullptr;
      cudaGraph_t graph = nullptr;
      cudaGraphExec_t executable = nullptr;
      ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
      for (const bool check : {true, false}) {
        DecodeOptions with = options;
        with.check_rows = check;
        cuda::Decode decode(with, device.limits);
        const Device<cuda::StepRecord> records(4);
        ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
        decode.run(device.batch, &index, stream, records.get());
        ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
        ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
        for (int again = 0; again < 2; ++again) {
          device.poison_out();
          ASSERT_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
          ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
          for (size_t i = 0; i < 4; ++i) {  // sequence 0, then 1, two heads each
            const cuda::StepRecord record = records.values()[i];
            const bool dense = check && i == 2;
            EXPECT_EQ(record.dense, dense ? DenseReason::kRowChanged : DenseReason::kNone) << i;
            EXPECT_EQ(record.tokens_exact == 5000, dense) << i;
            EXPECT_EQ(record.tokens_selected == 0, dense) << i;
            EXPECT_EQ(record.kv_len, 5000);
          }
          if (!check) continue;
          other.run({.select = Select::kDense}, Backend::kReference);
          std::vector<float> out = device.out(1), expected = other.out, lse = device.lse(1);
          const auto heads = static_cast<size_t>(group);
          out.resize(heads * 64), expected.resize(heads * 64);
          EXPECT_LT(relative_error(out, expected), tolerance(dtype));
          for (size_t h = 0; h < heads; ++h) EXPECT_NEAR(lse[h], other.lse[h], 10 * tolerance(dtype));
        }
        cudaGraphExecDestroy(executable);
        cudaGraphDestroy(graph);
      }
      cudaStreamDestroy(stream);
    }
  }
}

// A row of the same bytes elsewhere, as a cache that moves rows unseen leaves it, is another row.
TEST(RowChecks, MovedRowsAreChangedRows) {
  Problem problem(spec_of(DType::kF16, 64, 4096, 1), 4);
  problem.build_index();
  for (int64_t row = 4095; row > 100; --row) {
    problem.cache.set_key(0, row, problem.cache.key(0, row - 1));
    problem.cache.set_value(0, row, problem.cache.value(0, row - 1));
  }
  DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
  cuda::LayerIndex index({}, {1, 64, 64}, 1, 4096);
  index.upload(0, *problem.index, nullptr);
  problem.run({.select = Select::kDense}, Backend::kReference);
  for (const DecodeOptions& options : kSelectors) {
    SCOPED_TRACE(select_name(options.select));
    cuda::Decode decode(options, device.limits);
    const Device<cuda::StepRecord> records(1);
    device.poison_out();
    decode.run(device.batch, &index, nullptr, records.get());
    EXPECT_EQ(records.values()[0].dense, DenseReason::kRowChanged);
    expect_near(problem, device.out(0), device.lse(0), DType::kF16);
  }
}

// fit and topk look at every row that they select, key and value, and at no other.
TEST(RowChecks, EverySelectedRowIsLookedAt) {
  constexpr int32_t kRows = 4096 + 256 + 40, kDim = 64, kBudget = 300;
  Problem problem(spec_of(DType::kF16, kDim, kRows, 1), 1);
  round_queries(problem);
  problem.build_index();
  // One query head: it reads the first rows of the clusters with the greatest dots.
  const RowFilter filter = filter_of(*problem.index, kRows);
  std::vector<float> scaled = problem.q;
  for (float& x : scaled) x *= problem.query.sm_scale;
  ClusterScores scores;
  reference::score(problem.index->state(), 0, filter, scaled.data(), 1, scores);
  HeadSelection selection;
  reference::select_topk(problem.index->state(), 0, filter, scores, 1, kBudget, selection);
  ASSERT_EQ(selection.tokens.size(), size_t{kBudget});
  std::vector<bool> selected(kRows);
  for (const int32_t row : selection.tokens) selected[static_cast<size_t>(row)] = true;

  DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
  cuda::LayerIndex index({}, {1, kDim, kDim}, 1, kRows);
  index.upload(0, *problem.index, nullptr);
  cuda::Decode decode({.select = Select::kTopK, .budget = kBudget}, device.limits);
  const Device<cuda::StepRecord> records(1);
  // Another check value is stored for the row, so that no value of the row itself has to be found that has one.
  uint8_t* checks = index.impl().view.row_checks;
  const std::vector<uint8_t> stored = checks_of(index, 0, kRows);
  int32_t noticed = 0;
  for (int32_t row = 0; row < kRows; ++row) {
    if (!selected[static_cast<size_t>(row)] && row % 37 != 0) continue;
    for (const uint8_t bit : {uint8_t{0x01}, uint8_t{0x80}}) {  // of the key's, of the value's
      const auto other = static_cast<uint8_t>(stored[static_cast<size_t>(row)] ^ bit);
      cudaMemcpy(checks + row, &other, 1, cudaMemcpyHostToDevice);
      decode.run(device.batch, &index, nullptr, records.get());
      const bool dense = records.values()[0].dense == DenseReason::kRowChanged;
      EXPECT_EQ(dense, selected[static_cast<size_t>(row)]) << row << " bit " << int{bit};
      noticed += dense;
    }
    cudaMemcpy(checks + row, &stored[static_cast<size_t>(row)], 1, cudaMemcpyHostToDevice);
  }
  EXPECT_EQ(noticed, 2 * kBudget);
  decode.run(device.batch, &index, nullptr, records.get());
  EXPECT_EQ(records.values()[0].dense, DenseReason::kNone) << "the next step is not dense for it";
}

}  // namespace
}  // namespace tactic::test
