// On a GPU: a length below what the index holds hides the rows from there on, whatever memory their pages name.
#include "cuda/device.h"

namespace tactic::test {
namespace {

TEST(Hidden, NoRowFromTheLengthOnIsRead) {
  constexpr int32_t kRows = 5000, kLeft = 3001, kHeads = 2;
  std::vector<std::unique_ptr<Problem>> problems;
  std::vector<Problem*> pointers;
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    CacheSpec spec = spec_of(DType::kF16, 64, kRows, kHeads);
    spec.seed = seed;
    problems.push_back(std::make_unique<Problem>(spec, 4, seed));
    round_queries(*problems.back());
    pointers.push_back(problems.back().get());
  }
  Problem& cut = *problems[1];
  cut.query.kv = cut.cache.view();
  cut.query.kv.kv_len = kLeft;
  Attention({.select = Select::kDense}, Backend::kReference).run({&cut.query, 1});
  const Device<int32_t> likely(std::vector<int32_t>{100, 3500, 4999, 100, 3500, 4999, 100, 3500, 4999});
  struct Case {
    DecodeOptions options;
    bool learn = false, likely = false;
  };
  for (const Case& c : {Case{{.tau = 300, .check_rows = false}},
                        {{.tau = 300}},
                        {{.tau = 300}, true},
                        {{.tau = 300}, true, true},
                        {{.select = Select::kFit}},
                        {{.select = Select::kTopK}}}) {
    SCOPED_TRACE(text(select_name(c.options.select), " ", c.options.check_rows, c.learn, c.likely));
    std::vector<float> whole;
    for (const bool hidden : {false, true}) {
      DeviceBatch device(pointers, DeviceLayout::kPages16);
      device.batch.learn = c.learn;
      if (c.likely) {
        device.batch.likely_rows = likely.get();
        device.batch.max_likely_rows = 3;
      }
      cuda::LayerIndex index({}, {kHeads, 64, 64}, 3, kRows);
      for (int32_t s = 0; s < 3; ++s) index.build(s, device.batch, kRows, nullptr);
      if (hidden) {
        device.set_lens({0, kLeft, kRows});
        auto* pages = const_cast<int32_t*>(device.batch.page_tables);
        const int32_t all = device.batch.max_pages, left = (kLeft + 15) / 16;
        cudaMemset(pages, 0xFF, static_cast<size_t>(all) * sizeof(int32_t));
        cudaMemset(pages + all + left, 0xFF, static_cast<size_t>(all - left) * sizeof(int32_t));
      }
      cuda::Decode decode(c.options, device.limits);
      const Device<cuda::StepRecord> records(3 * kHeads);
      device.poison_out();
      decode.run(device.batch, &index, nullptr, records.get());
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      if (!hidden) {
        whole = device.out(2);
        continue;
      }
      for (const float x : device.out(0)) EXPECT_EQ(x, 0);
      for (const float x : device.lse(0)) EXPECT_EQ(x, -HUGE_VALF);
      expect_near(cut, device.out(1), device.lse(1), DType::kF16);
      EXPECT_TRUE(same_bits(device.out(2), whole)) << "others are read as before";
      const std::vector<cuda::StepRecord> read = records.values();
      for (size_t i = 0; i < read.size(); ++i) {
        const int32_t kv_len = i < kHeads ? 0 : i < 2 * kHeads ? kLeft : kRows;
        EXPECT_EQ(read[i].kv_len, kv_len) << i;
        EXPECT_EQ(read[i].dense, kv_len < kRows ? DenseReason::kNoIndex : DenseReason::kNone) << i;
        if (kv_len == kRows) continue;
        EXPECT_EQ(read[i].tokens_exact, kv_len) << i;
        EXPECT_EQ(read[i].tokens_selected + read[i].clusters, 0) << i;
      }
    }
  }
}

}  // namespace
}  // namespace tactic::test
