// On a GPU: what a host asks that does not know what happened to its cache: which rows masks show, and which of those
// that are indexed are still the same.
#include "cuda/device.h"
#include "cuda/launch_config.h"
#include "cuda/layer_index.h"

namespace tactic::test {
namespace {

constexpr uint16_t kShown = 0, kHiddenValue = 0xFC00;

std::vector<int32_t> visible_rows(const std::vector<uint16_t>& masks, int32_t n_kv) {
  const Device<uint16_t> device(masks);
  const auto count = static_cast<int32_t>(masks.size()) / n_kv;
  const Device<int32_t> lens(static_cast<size_t>(count));
  cuda::visible_rows(device.get(), int64_t{2} * n_kv, n_kv, count, lens.get(), nullptr);
  return lens.values();
}

TEST(VisibleRows, AreTheFirstOnesOrNone) {
  constexpr int32_t kRows = 20008;
  const auto mask = [](int32_t shown) {
    std::vector<uint16_t> values(kRows, kHiddenValue);
    std::fill_n(values.begin(), shown, kShown);
    return values;
  };
  std::vector<uint16_t> masks;
  std::vector<int32_t> expected;
  const auto add = [&](const std::vector<uint16_t>& values, int32_t rows) {
    masks.insert(masks.end(), values.begin(), values.end());
    expected.push_back(rows);
  };
  for (const int32_t shown : {0, 1, 7, 8, 8191, 8192, 8193, kRows - 1, kRows}) add(mask(shown), shown);
  for (const int32_t hole : {0, 1, 4096, 9998}) {
    std::vector<uint16_t> values = mask(10000);
    values[static_cast<size_t>(hole)] = kHiddenValue;
    add(values, -1);
  }
  std::vector<uint16_t> island = mask(100);
  island[kRows - 1] = kShown;
  add(island, -1);
  std::vector<uint16_t> negative_zero = mask(100);
  negative_zero[50] = 0x8000;
  add(negative_zero, 100);
  for (const uint16_t bias : {0xC000, 0x0001, 0x7E00}) {  // -2, the least number, NaN
    std::vector<uint16_t> biased = mask(100);
    biased[50] = bias;
    add(biased, -1);
  }
  EXPECT_EQ(visible_rows(masks, kRows), expected);
}

TEST(VisibleRows, MasksThatCannotBeReadAreRefused) {
  EXPECT_EQ(message_of([] { cuda::visible_rows(nullptr, 24, 12, 1, nullptr, nullptr); }),
            "n_kv (12) must be a multiple of 8");
  EXPECT_EQ(message_of([] { cuda::visible_rows(nullptr, 24, 8, 1, nullptr, nullptr); }),
            "masks must lie at multiples of 16 bytes, not 24 apart");
}

TEST(Verify, FindsTheFirstRowThatChangedAndDropsWhatHoldsIt) {
  for (const DType dtype : kTypes) {
    if (!cuda::is_compiled(dtype, 64)) continue;
    SCOPED_TRACE(dtype_name(dtype));
    constexpr int32_t kRows = 5000, kIndexed = 4096 + 3 * 256;
    Problem problem(spec_of(dtype, 64, kRows), 4);
    for (const DeviceLayout layout : kLayouts) {
      DeviceBatch device({&problem}, layout);
      cuda::LayerIndex index({}, {2, 64, 64}, 1, kRows);
      index.build(0, device.batch, kRows, nullptr);
      ASSERT_EQ(index.rows_indexed(0), kIndexed);
      EXPECT_EQ(index.verify(0, device.batch, kRows, nullptr), kIndexed);
      EXPECT_EQ(index.rows_indexed(0), kIndexed);
      EXPECT_EQ(index.verify(0, device.batch, 4500, nullptr), 4096 + 256) << "rows from 4500 on are gone";
      index.build(0, device.batch, kRows, nullptr);

      // Rows 3000 to 3039 come from another text: of the first few, one passes now and then.
      Problem other(spec_of(dtype, 64, kRows), 4);
      for (int64_t row = 3000; row < 3040; ++row) {
        for (int32_t head = 0; head < 2; ++head) {
          other.cache.set_key(head, row, problem.cache.key(head, row - 2000));
          other.cache.set_value(head, row, problem.cache.value(head, row - 2000));
        }
      }
      const DeviceBatch changed({&other}, layout);
      const int32_t first = index.verify(0, changed.batch, kRows, nullptr);
      EXPECT_GE(first, 3000);
      EXPECT_LT(first, 3003);
      EXPECT_EQ(index.rows_indexed(0), 2048);
    }
  }
}

TEST(Verify, ASinkMayChange) {
  Problem problem(spec_of(DType::kF16, 64, 2048), 4);
  DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
  cuda::LayerIndex index({}, {2, 64, 64}, 1, 2048);
  index.build(0, device.batch, 2048, nullptr);
  Problem other(spec_of(DType::kF16, 64, 2048), 4);
  other.cache.set_key(0, 0, other.cache.key(0, 1000));
  const DeviceBatch changed({&other}, DeviceLayout::kTokenMajor);
  EXPECT_EQ(index.verify(0, changed.batch, 2048, nullptr), 2048) << "steps read sinks as they are";
}

TEST(ForgetLearned, StepsReadAgainWhatTheFirstOnesRead) {
  Problem problem(spec_of(DType::kF16, 64, 6001), 4);
  round_queries(problem);
  DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
  device.batch.learn = true;
  cuda::LayerIndex index({}, {2, 64, 64}, 1, 6001);
  index.build(0, device.batch, 6001, nullptr);
  cuda::Decode decode({.target_error = 0.05f}, device.limits);
  const auto steps = [&] {
    std::vector<std::vector<float>> out;
    for (int i = 0; i < 3; ++i) {
      decode.run(device.batch, &index, nullptr);
      out.push_back(device.out(0));
    }
    return out;
  };
  const std::vector<std::vector<float>> first = steps(), then = steps();
  EXPECT_FALSE(same_bits(first[0], then[0])) << "a step learns nothing here";
  index.forget_learned(0, nullptr);
  const std::vector<std::vector<float>> again = steps();
  for (size_t i = 0; i < first.size(); ++i) EXPECT_TRUE(same_bits(first[i], again[i])) << i;
}

}  // namespace
}  // namespace tactic::test
