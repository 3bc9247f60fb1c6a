// On a GPU: what a host asks that does not know what happened to its cache: which rows masks show, and which of those
// that are indexed are still the same.
#include <random>

#include "cuda/device.h"
#include "cuda/launch_config.h"
#include "cuda/layer_index.h"

namespace tactic::test {
namespace {

constexpr uint16_t kShown = 0, kHiddenValue = 0xFC00;
constexpr int32_t kCells = 20008;

std::vector<uint16_t> mask_of(int32_t begin, int32_t end) {
  std::vector<uint16_t> values(kCells, kHiddenValue);
  std::fill(values.begin() + begin, values.begin() + end, kShown);
  return values;
}

TEST(VisibleRows, AreCountedAndListed) {
  std::vector<uint16_t> masks;
  std::vector<std::vector<int32_t>> expected;
  std::mt19937 random(1);
  const auto add = [&](const std::vector<uint16_t>& values) {
    masks.insert(masks.end(), values.begin(), values.end());
    std::vector<int32_t>& cells = expected.emplace_back();
    for (int32_t i = 0; i < kCells; ++i) {
      if (values[static_cast<size_t>(i)] != kHiddenValue) cells.push_back(i);
    }
  };
  for (const int32_t shown : {0, 1, 7, 8, 8191, 8192, 8193, kCells - 1, kCells}) add(mask_of(0, shown));
  for (const int32_t hole : {0, 1, 4096, 9998}) {
    std::vector<uint16_t> values = mask_of(0, 10000);
    values[static_cast<size_t>(hole)] = kHiddenValue;
    add(values);
  }
  add(mask_of(5000, 15000));
  add(mask_of(kCells - 1, kCells));
  std::vector<uint16_t> some = mask_of(0, kCells);
  for (uint16_t& value : some) {
    if (random() % 3 != 0) value = kHiddenValue;
  }
  some[77] = 0x8000;  // minus zero
  add(some);
  const auto count = static_cast<int32_t>(expected.size());
  const Device<uint16_t> device(masks);
  const Device<cuda::VisibleRows> rows(expected.size());
  const Device<int32_t> tables(expected.size() * kCells);
  cuda::visible_rows(device.get(), int64_t{2} * kCells, kCells, count, rows.get(), tables.get(), nullptr);
  for (size_t i = 0; i < expected.size(); ++i) {
    const cuda::VisibleRows got = rows.values()[i];
    const auto shown = static_cast<int32_t>(expected[i].size());
    EXPECT_EQ(got.count, shown) << i;
    ASSERT_EQ(got.end, shown == 0 ? 0 : expected[i].back() + 1) << i;
    if (got.end == shown) continue;
    const std::vector<int32_t> all = tables.values();
    const auto begin = all.begin() + static_cast<int64_t>(i) * kCells;
    EXPECT_EQ(std::vector<int32_t>(begin, begin + shown), expected[i]) << i;
  }
}

TEST(VisibleRows, AreKnownAgain) {
  std::vector<uint16_t> masks;
  const auto add = [&](const std::vector<uint16_t>& values) {
    masks.insert(masks.end(), values.begin(), values.end());
  };
  std::vector<uint16_t> branch = mask_of(0, 5000);  // beside the first mask's last row
  branch[5000] = kShown;
  branch[4999] = kHiddenValue;
  for (const auto& values : {mask_of(0, 5000), mask_of(0, 5001), branch, mask_of(0, 0)}) add(values);
  const Device<uint16_t> device(masks);
  const Device<cuda::VisibleRows> rows(4);
  cuda::visible_rows(device.get(), int64_t{2} * kCells, kCells, 4, rows.get(), nullptr, nullptr);
  const std::vector<cuda::VisibleRows> got = rows.values();
  EXPECT_EQ(got[1].rows_before, got[0].rows);
  EXPECT_NE(got[1].rows, got[0].rows);
  EXPECT_EQ(got[2].count, got[0].count);
  EXPECT_NE(got[2].rows, got[0].rows);
  EXPECT_EQ(got[2].rows_before, got[0].rows_before);
  EXPECT_EQ(got[3].rows, got[3].rows_before);
}

TEST(VisibleRows, OtherValuesAreToldOf) {
  for (const unsigned bias : {0xC000u, 0x0001u, 0x7E00u}) {  // -2, the least number, NaN
    std::vector<uint16_t> biased = mask_of(0, 100);
    biased[50] = static_cast<uint16_t>(bias);
    const Device<uint16_t> device(biased);
    const Device<cuda::VisibleRows> rows(1);
    cuda::visible_rows(device.get(), int64_t{2} * kCells, kCells, 1, rows.get(), nullptr, nullptr);
    EXPECT_EQ(rows.values()[0].count, -1) << bias;
  }
}

TEST(VisibleRows, MasksThatCannotBeReadAreRefused) {
  EXPECT_EQ(message_of([] { cuda::visible_rows(nullptr, 24, 12, 1, nullptr, nullptr, nullptr); }),
            "n_kv (12) must be a multiple of 8");
  EXPECT_EQ(message_of([] { cuda::visible_rows(nullptr, 24, 8, 1, nullptr, nullptr, nullptr); }),
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
