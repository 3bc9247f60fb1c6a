// What fails inside the plug-in: the host gets an error or the exact answer, never a crash. This program's operator new
// is the plug-in's too, and runs out on demand.
#include <gmock/gmock.h>

#include "failing_new.h"
#include "graph_layer.h"

namespace tactic::test {
namespace {

using testing::HasSubstr;

class Failure : public testing::Test {
 protected:
  void SetUp() override {
    Host::plugin_device();
    forget_indexes();
    configure(kSparse);
    take_log();
  }
};

TEST_F(Failure, CellsOutOfRangeAreRefusedBeforeAnythingIsStored) {
  Layer layer(512);
  Rows rows(1);
  layer.write(0, rows.keys(512), rows.values(512));
  const auto* const data = static_cast<const char*>(layer.k()->data);
  const std::vector<char> before(data, data + ggml_nbytes(layer.k()));
  for (const int64_t cell : {int64_t{512}, int64_t{-1}, INT64_MAX, INT64_MIN}) {
    EXPECT_EQ(layer.write_cells({3, cell, 4}, rows.keys(3), rows.values(3)), GGML_STATUS_FAILED);
    EXPECT_THAT(take_log(), HasSubstr("cell " + std::to_string(cell) + " of "));
    EXPECT_TRUE(std::equal(before.begin(), before.end(), data)) << "cell " << cell;
  }
  EXPECT_LT(layer.error(rows.query(), std::vector<float>(512, 0.0f)), kBound) << "and the cache goes on";
}

// Whatever allocation of a sparse step fails, the node is computed: densely, and the log says why.
TEST_F(Failure, AStepThatRunsOutOfMemoryIsReadDensely) {
  for (const std::string& mode :
       {kSparse, kIndexOptions + ",select=fit,mass=0.9", kIndexOptions + ",select=topk,budget=300"}) {
    configure(mode);
    Layer layer(1024);
    Rows rows(2);
    const std::vector<float> visible(1024, 0.0f);
    layer.write(0, rows.keys(1024), rows.values(1024));
    layer.error(rows.query(), visible);
    int64_t allowed = 0, dense = 0;
    layer.before_compute = [&] { allocations_left = allowed; };
    layer.after_compute = [&] { allocations_left = INT64_MAX; };
    do {
      allocations_failed = 0;
      take_log();
      take_totals();
      const double error = layer.error(rows.query(), visible);
      const std::string log = take_log();
      if (allocations_failed == 0) break;
      ASSERT_LT(error, 1e-3) << mode << ", allocation " << allowed;
      ASSERT_THAT(log, HasSubstr("read densely: std::bad_alloc")) << mode << ", allocation " << allowed;
      dense += take_totals().dense_queries;
    } while (++allowed < 1000);
    EXPECT_EQ(dense, allowed);
    EXPECT_GT(allowed, 3) << mode << ": memory hardly ever ran out";
    EXPECT_EQ(take_totals().dense_queries, 0) << mode << ": sparse again";
  }
}

}  // namespace
}  // namespace tactic::test
