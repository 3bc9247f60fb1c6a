// When a step goes on from the one before, and what is taken out of the index when it does not.
#include "cache_watch.h"

#include <gtest/gtest.h>

namespace tactic::plugin {
namespace {

constexpr int64_t kCells = 1024, kMaxRows = 8;

class Steps : public ::testing::Test {
 protected:
  Steps() : entry_({}, {1, 64, 64}) { entry_.index.write(0, kCells); }

  // A token is written to `cell` and a step shows the cells [begin, end). Returns whether a step began.
  bool step(int64_t begin, int64_t end, int64_t cell) {
    entry_.written = {static_cast<int32_t>(cell)};
    entry_.written_since_step += 1;
    return show(begin, end);
  }
  bool show(int64_t begin, int64_t end) {
    std::vector<uint64_t> visible(kCells / 64);
    for (int64_t i = begin; i < end; ++i) visible[static_cast<size_t>(i / 64)] |= uint64_t{1} << (i % 64);
    return entry_.begin_step(visible, end - begin, kMaxRows);
  }

  StreamIndex entry_;
};

TEST_F(Steps, LayersThatShareACacheAreOneStep) {
  for (int64_t i = 0; i < 10; ++i) {
    EXPECT_TRUE(step(0, 500 + i, 499 + i));
    for (int layer = 0; layer < 3; ++layer) EXPECT_FALSE(show(0, 500 + i)) << "another layer's attention";
  }
  EXPECT_EQ(entry_.steps, 10u);
  EXPECT_LT(entry_.tau_factor(), 1.1f);
}

TEST_F(Steps, TheNewestRowTakenBackAndWrittenAnewBeginsAPassage) {
  step(0, 500, 499);
  step(0, 501, 500);
  EXPECT_TRUE(step(0, 501, 500));
  EXPECT_EQ(entry_.steps, 1u);
}

TEST_F(Steps, ARewindInAFullWindowBeginsAPassage) {
  step(0, 300, 299);
  for (int64_t i = 1; i < 100; ++i) step(i, 300 + i, 299 + i);
  EXPECT_EQ(entry_.steps, 100u);
  step(10, 310, 309);  // 89 tokens back; as many cells are shown as before
  EXPECT_EQ(entry_.steps, 1u);
}

TEST_F(Steps, RowsTakenBackLeaveTheIndexAndThoseOfAnotherSequenceDoNot) {
  step(0, 500, 499);
  step(0, 450, 449);  // fifty tokens were taken back
  EXPECT_EQ(entry_.index.rows_written(), kCells - 50);
  step(600, 640, 639);  // a short answer in another slot
  EXPECT_EQ(entry_.index.rows_written(), kCells - 50);
  step(0, 451, 450);
  EXPECT_EQ(entry_.index.rows_written(), kCells - 50);
}

}  // namespace
}  // namespace tactic::plugin
