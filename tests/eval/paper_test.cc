// The paper's tables on a small synthetic trace, and baselines measured on it.
#include <unistd.h>

#include <filesystem>
#include <numeric>

#include "baselines/measure.h"
#include "paper/paper.h"
#include "support.h"
#include "tactic/error.h"

namespace tactic::eval {
namespace {

using test::Cache;
using ::testing::AllOf;
using ::testing::HasSubstr;

// Layers of 2 KV heads and 6 query heads, 600 rows of prompt and 10 after it; the one in the middle has a window.
class PaperTest : public ::testing::Test {
 protected:
  static constexpr int64_t kRows = 610, kPrompt = 600;

  void SetUp() override { make({0, 100, 0}); }

  // windows: one of each layer.
  void make(const std::vector<int64_t>& windows) {
    caches_.clear();
    queries_.clear();
    path_ = (std::filesystem::temp_directory_path() / ("tactic_paper_test_" + std::to_string(getpid()))).string();
    TraceInfo info;
    info.model = "synthetic";
    info.text = "topics";
    info.kv_len = kRows;
    info.prompt_len = kPrompt;
    for (int64_t p = kPrompt - 32; p < kRows; ++p) {
      info.positions.push_back(p);
      info.kinds.push_back(p < kPrompt ? QueryKind::kPrompt : QueryKind::kDecode);
    }
    const auto layers = static_cast<int32_t>(windows.size());
    for (int32_t l = 0; l < layers; ++l)
      info.layers.push_back({l, 6, 2, 64, 64, DType::kF16, DType::kF16, 0.125f, windows[static_cast<size_t>(l)]});
    TraceWriter writer(path_, info);
    for (int32_t l = 0; l < layers; ++l) {
      caches_.push_back(std::make_unique<Cache>(
          test::CacheSpec{.layout = test::Layout::kHeadMajor, .kv_len = kRows, .seed = static_cast<uint64_t>(l) + 3}));
      const KvView kv = caches_.back()->view();
      std::vector<std::byte> k, v;
      for (int32_t head = 0; head < 2; ++head) {
        for (int64_t row = 0; row < kRows; ++row) {
          k.insert(k.end(), kv.k.row(head, row), kv.k.row(head, row) + 128);
          v.insert(v.end(), kv.v.row(head, row), kv.v.row(head, row) + 128);
        }
      }
      std::vector<float>& q = queries_.emplace_back();
      for (int64_t i = 0; i < info.num_queries(); ++i) {
        const std::vector<float> more = test::make_queries(*caches_.back(), 3, static_cast<uint64_t>(l * 1000 + i));
        q.insert(q.end(), more.begin(), more.end());
      }
      writer.write_layer(l, k, v, q);
    }
    writer.finish();
    trace_ = std::make_unique<Trace>(path_);
  }
  void TearDown() override { std::filesystem::remove(path_); }

  // How many rows the oracle needs besides 4 sinks and those from 64 before the prompt's end.
  int64_t oracle(int32_t l, int64_t i, int32_t h, double target) const {
    std::vector<double> open;
    double sum = 0, certain = 0;
    for (int64_t row = 0; row < kPrompt + i + 1; ++row) {
      const std::vector<float> key = caches_[static_cast<size_t>(l)]->key(h / 3, row);
      double score = 0;
      for (size_t d = 0; d < 64; ++d)
        score += 0.125 * queries_[static_cast<size_t>(l)][static_cast<size_t>(((32 + i) * 6 + h) * 64) + d] * key[d];
      sum += std::exp(score);
      if (row < 4 || row >= kPrompt - 64) {
        certain += std::exp(score);
      } else {
        open.push_back(std::exp(score));
      }
    }
    std::sort(open.begin(), open.end(), std::greater<>());
    int64_t count = 0;
    while (count < std::ssize(open) && certain < target * sum) certain += open[static_cast<size_t>(count++)];
    return count;
  }

  std::string path_;
  std::vector<std::unique_ptr<Cache>> caches_;
  std::vector<std::vector<float>> queries_;
  std::unique_ptr<Trace> trace_;
};

std::vector<Json> of_table(const std::vector<Json>& rows, const std::string& name) {
  std::vector<Json> found;
  for (const Json& row : rows) {
    if (row["table"] == name) found.push_back(row);
  }
  return found;
}

TEST_F(PaperTest, Table1HoldsTheOracleOfEveryCase) {
  const std::vector<Json> rows = of_table(paper_cases(*trace_, {.queries = 4}), "table1");
  ASSERT_EQ(rows.size(), 6u);
  for (const Json& row : rows) {
    double sum = 0, cases = 0;
    for (const int32_t l : {0, 2}) {
      for (const int64_t i : {0, 2, 5, 7}) {
        for (int32_t h = 0; h < 6; ++h) {
          sum += static_cast<double>(oracle(l, i, h, row["target_mass"]));
          cases += 1;
        }
      }
    }
    EXPECT_NEAR(row["oracle"].get<double>(), sum / cases, 0.05) << row;
    EXPECT_GE(row["clusters"].get<double>(), row["oracle"].get<double>());
  }
  EXPECT_EQ(rows[4]["paper"]["fit"], 1975);
  EXPECT_FALSE(rows[5].contains("paper"));
}

TEST_F(PaperTest, TheUnionLosesNothing) {
  const Json row = of_table(paper_cases(*trace_, {.queries = 4}), "union")[0];
  EXPECT_LE(row["error_union"].get<double>(), row["error_own"].get<double>());
  EXPECT_GE(row["rows_union"].get<double>(), row["rows_own"].get<double>());
  EXPECT_GE(row["loads_per_row"].get<double>(), 1);
  EXPECT_LE(row["loads_per_row"].get<double>(), 3);
}

TEST_F(PaperTest, DistanceFallsWithMassAndSparsityIsPerHead) {
  const std::vector<Json> rows = paper_cases(*trace_, {.queries = 4});
  for (const char* order : {"oracle", "quest", "clusters"}) {
    double first = -1, last = -1;
    for (const Json& row : of_table(rows, "distance")) {
      if (row["order"] != order) continue;
      if (first < 0) first = row["error"];
      last = row["error"];
    }
    EXPECT_GT(first, last) << order;
  }
  const std::vector<Json> heads = of_table(rows, "sparsity_head");
  ASSERT_EQ(heads.size(), 12u);
  for (size_t i = 0; i < heads.size(); ++i) EXPECT_EQ(heads[i]["layer"], i < 6 ? 0 : 2);
  EXPECT_EQ(of_table(rows, "sparsity_query").size(), 4u);
  EXPECT_EQ(of_table(rows, "curves").size(), 5u);
  EXPECT_THROW(paper_cases(*trace_, {.within = -1}), Error);
}

TEST_F(PaperTest, SmallerClustersLeaveLessVariance) {
  const std::vector<Json> rows = paper_clusters(*trace_, {.queries = 2});
  ASSERT_EQ(rows.size(), 10u);
  for (size_t i = 1; i < 6; ++i)
    EXPECT_GT(rows[i]["wcss_share"].get<double>(), rows[i - 1]["wcss_share"].get<double>());
  EXPECT_GE(rows[6]["wcss_share"].get<double>(), rows[9]["wcss_share"].get<double>());  // 1 and 20 iterations
  for (const Json& row : rows) EXPECT_TRUE(row["wcss_share"] > 0 && row["wcss_share"] <= 1.0) << row;
}

TEST_F(PaperTest, ValueNormsAreRelativeToTheMedian) {
  const std::vector<Json> rows = paper_value_norms(*trace_);
  ASSERT_EQ(rows.size(), 3u);
  EXPECT_NEAR(rows[0]["quantiles"][4][1].get<double>(), 1.0, 0.02);
  EXPECT_LT(rows[0]["quantiles"][0][1], rows[0]["quantiles"][8][1]);
}

TEST_F(PaperTest, BaselinesAreMeasuredInTheSameCases) {
  const std::vector<int64_t> queries = {32, 41};
  const std::vector<BaselineSpec> specs = {
      parse_baseline("oracle_topk,budget=1e9"), parse_baseline("recent_only,budget=100"),
      parse_baseline("snapkv,budget=100"), parse_baseline("vattention,epsilon=0.5")};
  const TraceLayer layer = trace_->layer(0);
  const std::vector<DenseQuery> answers = dense_layer(layer, queries);
  const std::vector<SettingCases> cases = measure_baselines(layer, 0, answers, specs, 1);
  for (const SettingCases& c : cases) {
    EXPECT_EQ(c.heads.size(), 12u);
    EXPECT_EQ(c.steps.size(), 2u);
    for (const HeadCase& head : c.heads)
      EXPECT_TRUE(head.error >= 0 && head.achieved_mass > 0 && head.achieved_mass < 1 + 1e-4)
          << head.error << " " << head.achieved_mass;
  }
  for (const HeadCase& head : cases[0].heads) EXPECT_LT(head.error, 1e-4);
  EXPECT_NEAR(cases[0].steps[0].read_fraction, 1, 1e-9);
  EXPECT_EQ(cases[0].steps[0].tokens, 601);
  EXPECT_EQ(cases[0].heads[7].position, 609);
  EXPECT_NEAR(cases[1].steps[0].read_fraction, 168.0 / 601, 1e-9);
  EXPECT_EQ(cases[2].steps[1].tokens, 4 + 100 + 64 + 10);
  EXPECT_GT(cases[3].steps[0].tokens_sampled, 0);
  EXPECT_TRUE(
      measure_baselines(trace_->layer(1), 1, dense_layer(trace_->layer(1), queries), specs, 1)[0].heads.empty());
}

// pyramidkv shares the budget among the layers that it answers.
TEST_F(PaperTest, WindowsAreNoLayersOfAPyramid) {
  make({100, 0, 100, 0, 0});
  const std::vector<int64_t> queries = {32};
  const std::vector<BaselineSpec> specs = {parse_baseline("pyramidkv,budget=100,beta=4")};
  std::vector<double> tokens;
  for (const int32_t l : {1, 3, 4}) {
    const TraceLayer layer = trace_->layer(l);
    tokens.push_back(measure_baselines(layer, l, dense_layer(layer, queries), specs, 1)[0].steps[0].tokens);
  }
  EXPECT_EQ(tokens, (std::vector<double>{4 + 175 + 64 + 1, 4 + 100 + 64 + 1, 4 + 25 + 64 + 1}));
}

TEST_F(PaperTest, ATraceOfWindowsIsRefused) {
  make({100, 100});
  try {
    paper_rows(*trace_, {.queries = 2});
    ADD_FAILURE() << "rows of no layer";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr(path_), HasSubstr("none of its 2 layers is without a sliding window")));
  }
}

}  // namespace
}  // namespace tactic::eval
