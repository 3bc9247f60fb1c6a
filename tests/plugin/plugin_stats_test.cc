// The line of a step in TACTIC_STATS: means over its layers, queries and heads.
#include "plugin_stats.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <string>
#include <vector>

namespace tactic::plugin {
namespace {

std::vector<StepStats> one_sparse_one_changed() {
  std::vector<StepStats> stats(2);
  for (StepStats& s : stats) {
    s.num_kv_heads = 3;
    s.kv_bytes_present = 4000;
  }
  stats[0].tokens_certain = 30;
  stats[0].tokens_sampled = 60;
  stats[0].refined_clusters = 6;
  stats[0].index_bytes = 100;
  stats[0].kv_bytes = 900;
  stats[0].estimated_mass = 0.8;
  stats[0].mass_std_error = 0.1;
  stats[1].tokens_certain = 90;
  stats[1].kv_bytes = 4000;
  stats[1].estimated_mass = 1;
  stats[1].dense = DenseReason::kRowChanged;
  return stats;
}

class StatsFile : public testing::Test {
 protected:
  void SetUp() override {
    std::remove(path_.c_str());
    sums_.open(path_);
  }
  void TearDown() override { std::remove(path_.c_str()); }
  void add_node(int32_t layer) { sums_.add_node(stats_.data(), 2, layer, 7000); }
  std::vector<std::string> lines() const {
    std::ifstream file(path_);
    std::vector<std::string> found;
    for (std::string line; std::getline(file, line);) found.push_back(line);
    return found;
  }

  const std::vector<StepStats> stats_ = one_sparse_one_changed();
  const std::string path_ =
      testing::TempDir() + testing::UnitTest::GetInstance()->current_test_info()->name() + ".jsonl";
  PluginStats sums_;
};

TEST_F(StatsFile, ALineIsTheMeanOverLayersQueriesAndHeads) {
  for (const int32_t layer : {0, 1, 0}) add_node(layer);
  sums_.open("");
  const std::vector<std::string> lines = this->lines();
  ASSERT_EQ(lines.size(), 2U) << "the second step begins with the first layer";
  EXPECT_THAT(lines[0],
              testing::HasSubstr("\"step\":0,\"layers\":2,\"queries\":4,\"dense_queries\":2,\"changed_queries\":2,"
                                 "\"tokens_certain\":20.0,\"tokens_sampled\":10.0,\"refined_clusters\":1.00,"
                                 "\"kv_bytes\":9800,\"index_bytes\":200,\"read_fraction\":0.62500,"
                                 "\"estimated_mass\":0.80000,\"mass_variance\":1.000e-02,\"attend_us\":14.0,"));
  EXPECT_THAT(lines[1], testing::HasSubstr("\"step\":1,\"layers\":1,\"queries\":2,"));
}

TEST_F(StatsFile, ALineIsThereWhenItsStepHasEnded) {
  std::vector<size_t> counts;
  for (const int32_t layer : {0, 2, 0, 2, 0, 2, 5, 0, 2, 5, 2, 5}) {
    add_node(layer);
    counts.push_back(lines().size());
  }
  // How many layers there are is known after the first step; a layer that comes later is a line of its own once.
  EXPECT_THAT(counts, testing::ElementsAre(0, 0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6));
}

TEST(PluginStats, TotalsAreSinceTheyWereLastTaken) {
  const std::vector<StepStats> stats = one_sparse_one_changed();
  PluginStats sums;
  sums.add_node(stats.data(), 2, 0, 5);
  sums.add_write(6);
  sums.add_clustering(7);
  const tactic_totals totals = sums.take();
  EXPECT_EQ(totals.queries, 2);
  EXPECT_EQ(totals.sparse_queries, 1);
  EXPECT_EQ(totals.changed_queries, 1);
  EXPECT_EQ(totals.tokens_certain, 120);
  EXPECT_EQ(totals.write_ns, 6);
  EXPECT_EQ(totals.cluster_ns, 7);
  EXPECT_EQ(sums.take().queries, 0);
}

}  // namespace
}  // namespace tactic::plugin
