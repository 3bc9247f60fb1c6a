#include "core/index_state.h"

#include "support.h"

namespace tactic::test {
namespace {

TEST(RowBits, RangesAndCounts) {
  RowBits bits;
  EXPECT_FALSE(bits.test(5));
  EXPECT_EQ(bits.count_range(0, 1000), 0);
  bits.resize(200);
  bits.set_range(3, 130);
  EXPECT_EQ(bits.count_range(0, 1000), 127);
  bits.reset_range(64, 128);
  EXPECT_EQ(bits.count_range(0, 1000), 127 - 64);
  EXPECT_EQ(bits.count_range(63, 64), 1);
  EXPECT_EQ(bits.count_range(64, 128), 0);
  EXPECT_TRUE(bits.test(129));
  EXPECT_FALSE(bits.test(130));
  bits.reset_range(100, 100000);
  EXPECT_EQ(bits.count_range(0, 256), 61);
  bits.set_range(130, 135);  // rows 3 to 63 and 130 to 134 by now
  EXPECT_EQ(bits.find(true, 0, 200), 3);
  EXPECT_EQ(bits.find(false, 3, 200), 64);
  EXPECT_EQ(bits.find(true, 64, 200), 130);
  EXPECT_EQ(bits.find(true, 64, 100), 100);
  EXPECT_EQ(bits.find(true, 135, 5000), 5000);
  EXPECT_EQ(bits.find(false, 131, 133), 133);
  EXPECT_EQ(bits.end_below(1000), 135);
  EXPECT_EQ(bits.end_below(135), 135);
  EXPECT_EQ(bits.end_below(132), 132);
  EXPECT_EQ(bits.end_below(130), 64);
  EXPECT_EQ(bits.end_below(64), 64);
  EXPECT_EQ(bits.end_below(3), 0);
  EXPECT_EQ(bits.end_below(0), 0);
}

TEST(RowFilter, CountsAgreeWithSingleRows) {
  RowBits indexed;
  indexed.resize(300);
  indexed.set_range(70, 290);
  const std::vector<uint64_t> visible = random_bits(300, 0.5, 11);
  for (const int64_t kv_len : {0, 1, 63, 64, 65, 128, 299, 300}) {
    for (const uint64_t* bits : {static_cast<const uint64_t*>(nullptr), visible.data()}) {
      const RowFilter filter{bits, kv_len, &indexed};
      int64_t seen = 0, in_index = 0;
      for (int64_t row = 0; row < 300; ++row) {
        EXPECT_FALSE(filter.reads_exact(row) && filter.reads_indexed(row));
        EXPECT_EQ(filter.reads_exact(row) || filter.reads_indexed(row), filter.is_visible(row));
        seen += filter.is_visible(row);
        in_index += filter.reads_indexed(row);
      }
      EXPECT_EQ(filter.count_visible(0, 300), seen);
      EXPECT_EQ(filter.count_indexed(0, 300), in_index);
    }
  }
}

TEST(Outliers, AreAShareOfTheRowsButFewOfTheClusters) {
  EXPECT_EQ(outliers_of(0.0025f, 2048, 128), 5);
  EXPECT_EQ(outliers_of(0.0025f, 256, 64), 1);
  EXPECT_EQ(outliers_of(0.0025f, 2048, 32), 2);
  EXPECT_EQ(outliers_of(0.25f, 2048, 128), 8);
  EXPECT_EQ(outliers_of(0.25f, 2048, 15), 0);
  EXPECT_EQ(outliers_of(0, 2048, 128), 0);
}

// Rows found heavy once by chance, of which induction finds new ones all the time: the latest 64 are remembered.
TEST(FoundHeavy, SuspectsAreFewAndTheLatest) {
  IndexState index;
  index.calibration.resize(1);
  index.rows_end = 1 << 20;
  for (int32_t row = 0; row < 1000; ++row) found_heavy(index, 0, row);
  const std::vector<int32_t>& suspects = index.calibration[0].suspects;
  EXPECT_EQ(suspects.size(), 64u);
  EXPECT_EQ(suspects.front(), 936);
  EXPECT_EQ(suspects.back(), 999);
  found_heavy(index, 0, 0);
  EXPECT_TRUE(index.calibration[0].heavy.empty()) << "forgotten since";
  found_heavy(index, 0, 990);
  EXPECT_EQ(index.calibration[0].heavy, std::vector<int32_t>{990});
}

}  // namespace
}  // namespace tactic::test
