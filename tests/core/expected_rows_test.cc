#include "core/expected_rows.h"

#include <gtest/gtest.h>

namespace tactic::test {
namespace {

TEST(ExpectedRows, LeaveTheSelectionAndKeepItsOrder) {
  HeadSelection selection;
  selection.tokens = {5, 69, 7, 133, 6, 200};
  selection.log_weights = {0, 0, 0, 1, 2, 3};
  selection.clusters = {0, 0, 1, 2, 2, 3};
  selection.num_certain = 3;
  leave_out({}, selection);
  EXPECT_EQ(selection.tokens.size(), 6u);
  leave_out({69, 200, 4000}, selection);  // 5, 69 and 133 share their low bits
  EXPECT_EQ(selection.tokens, (std::vector<int32_t>{5, 7, 133, 6}));
  EXPECT_EQ(selection.log_weights, (std::vector<float>{0, 0, 1, 2}));
  EXPECT_EQ(selection.clusters, (std::vector<int32_t>{0, 1, 2, 2}));
  EXPECT_EQ(selection.num_certain, 2);
}

TEST(ExpectedRows, AreThoseThatStandInClustersAndAreVisible) {
  IndexState index;
  index.calibration.resize(2);
  index.calibration[1].expected = {3, 70, 71, 300};
  index.calibration[1].heavy = {70, 80, 90};
  index.indexed.resize(200);
  index.indexed.set_range(64, 128);
  index.segments.resize(1);
  index.segments[0].row_begin = 64;
  index.segments[0].num_rows = 64;
  index.segments[0].heads.resize(2);
  index.segments[0].heads[1].not_finite = {7};  // row 71
  const uint64_t visible[] = {~uint64_t{0}, ~(uint64_t{1} << (90 - 64)), ~uint64_t{0}, ~uint64_t{0}};
  std::vector<int32_t> rows{1};
  expected_rows(index, 1, {visible, 200, &index.indexed}, {}, rows);
  EXPECT_EQ(rows, (std::vector<int32_t>{70, 80})) << "3 and 300 are not indexed, 71 is in no cluster, 90 is hidden";
  expected_rows(index, 0, {visible, 200, &index.indexed}, {}, rows);
  EXPECT_TRUE(rows.empty());
}

}  // namespace
}  // namespace tactic::test
