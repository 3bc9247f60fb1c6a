// Baselines that read rows by rank, each against the formula of its paper.
#include <numeric>

#include "eval/baseline_case.h"
#include "reference/steps.h"
#include "tactic/error.h"

namespace tactic::eval {
namespace {

TEST(Attend, AllRowsAreDenseAttention) {
  Case c;
  std::vector<float> dense(6 * 64), out(6 * 64);
  attend_dense(*c.step, dense.data());
  attend(*c.step, c.select("oracle_topk,budget=100000"), out.data());
  EXPECT_LT(test::relative_error(out, dense), 1e-6);
  std::vector<double> exact(3 * 64), lse(3);
  DecodeQuery query{.q = c.q.data(), .q_head_stride = 64, .num_q_heads = 6, .sm_scale = 0.125f, .kv = c.cache.view()};
  for (int32_t head = 0; head < 2; ++head) {
    reference::dense(query, head, exact.data(), lse.data());
    for (size_t i = 0; i < exact.size(); ++i) EXPECT_NEAR(dense[static_cast<size_t>(head) * 192 + i], exact[i], 1e-4);
  }
}

TEST(Attend, WeightsOfAHeadAndEstimatesCount) {
  Case c;
  Choice choice;
  choice.selection.heads.resize(2);
  for (HeadSelection& head : choice.selection.heads) head = {{7, 90}, {0, 0}, {-1, -1}, 2};
  choice.head_log_weights.assign(6, {0.5f, -HUGE_VALF});
  choice.estimates.assign(6, {1.25, std::vector<float>(64, 2.0f)});
  std::vector<float> out(6 * 64);
  attend(*c.step, choice, out.data());
  for (int32_t h = 0; h < 6; ++h) {
    const double a = std::exp(c.score(h, 7) + 0.5), b = std::exp(1.25);
    for (size_t d = 0; d < 64; ++d)
      EXPECT_NEAR(out[static_cast<size_t>(h) * 64 + d], (a * c.cache.value(h / 3, 7)[d] + b * 2) / (a + b), 1e-4);
  }
}

TEST(Oracle, TopPTakesTheFewestRowsThatReachTheMass) {
  Case c;
  const Choice choice = c.select("oracle_topp,mass=0.9");
  for (int32_t head = 0; head < 2; ++head) {
    RowSet expected = exact_rows(c, c.kv_len());
    const RowSet exact = expected;
    for (int32_t h = head * 3; h < head * 3 + 3; ++h) {
      std::vector<double> w = c.weights(h);
      double mass = 0;
      for (const int32_t row : exact) mass += w[static_cast<size_t>(row)], w[static_cast<size_t>(row)] = -1;
      for (const size_t row : best(w, w.size())) {
        if (mass >= 0.9) break;
        mass += w[row];
        expected.insert(static_cast<int32_t>(row));
      }
    }
    EXPECT_EQ(read_rows(choice, head), expected);
  }
  EXPECT_EQ(choice.bytes(c.rows), choice.tokens() * 2 * kRowBytes);
}

TEST(Oracle, TopKTakesTheHeaviestOfEachHead) {
  Case c;
  const Choice choice = c.select("oracle_topk,budget=25");
  for (int32_t head = 0; head < 2; ++head) {
    RowSet expected = exact_rows(c, c.kv_len());
    const RowSet exact = expected;
    for (int32_t h = head * 3; h < head * 3 + 3; ++h) {
      std::vector<double> w = c.weights(h);
      for (const int32_t row : exact) w[static_cast<size_t>(row)] = -1;
      for (const size_t row : best(w, 25)) expected.insert(static_cast<int32_t>(row));
    }
    EXPECT_EQ(read_rows(choice, head), expected);
  }
}

TEST(RecentOnly, ReadsSinksAndTheNewest) {
  Case c;
  const Choice choice = c.select("recent_only,budget=100,recent=50,sinks=3");
  RowSet expected = {0, 1, 2};
  for (int64_t row = c.kv_len() - 150; row < c.kv_len(); ++row) expected.insert(static_cast<int32_t>(row));
  EXPECT_EQ(read_rows(choice, 0), expected);
  EXPECT_EQ(read_rows(choice, 1), expected);
}

// Ranks by q.centroid and takes rows until there are `budget`.
RowSet cluster_union(const Case& c, int32_t head, const std::vector<std::vector<int32_t>>& clusters, int64_t budget) {
  RowSet expected = exact_rows(c, c.prompt_len);
  for (int32_t h = head * 3; h < head * 3 + 3; ++h) {
    std::vector<double> dots;
    for (const std::vector<int32_t>& members : clusters) {
      double mean = 0;
      for (const int32_t row : members)
        mean += c.score(h, row) / static_cast<double>(members.size());  // the mean key's score
      dots.push_back(mean);
    }
    int64_t left = budget;
    for (const size_t i : best(dots, dots.size())) {
      for (const int32_t row : clusters[i]) {
        if (left-- > 0) expected.insert(row);
      }
    }
  }
  return expected;
}

TEST(Clusters, TopKReadsTheBestClustersOfEachHead) {
  Case c;
  const Choice choice = c.select("cluster_topk,budget=50,cluster=8");
  int64_t centroids = 0;
  for (int32_t head = 0; head < 2; ++head) {
    const Clusters clusters = cluster_keys(c.layer, head, {4, c.prompt_len - 64}, 8, 10, 65536);
    size_t members = 0;
    for (const auto& m : clusters.members) members += m.size();
    EXPECT_EQ(members, static_cast<size_t>(c.prompt_len - 68));
    centroids += clusters.size();
    EXPECT_EQ(read_rows(choice, head), cluster_union(c, head, clusters.members, 50));
  }
  EXPECT_EQ(choice.summary_bytes, centroids * kRowBytes + 2 * (choice.tokens() - 2 * (68 + 20)));
}

TEST(Clusters, ByPositionTheyAreRunsOfNeighbors) {
  Case c;
  const Choice choice = c.select("position_topk,budget=50,cluster=16");
  std::vector<std::vector<int32_t>> runs;
  for (int32_t row = 4; row < c.prompt_len - 64; ++row) {
    if ((row - 4) % 16 == 0) runs.emplace_back();
    runs.back().push_back(row);
  }
  for (int32_t head = 0; head < 2; ++head) EXPECT_EQ(read_rows(choice, head), cluster_union(c, head, runs, 50));
  EXPECT_EQ(choice.summary_bytes, 2 * static_cast<int64_t>(runs.size()) * kRowBytes);
}

TEST(Quest, ReadsThePagesOfHighestBound) {
  Case c;
  const Choice choice = c.select("quest,budget=64");
  const int64_t pages = (c.kv_len() - 64 + 15) / 16;
  for (int32_t head = 0; head < 2; ++head) {
    RowSet expected = exact_rows(c, c.kv_len());
    for (int32_t h = head * 3; h < head * 3 + 3; ++h) {
      std::vector<double> bounds;
      for (int64_t page = 0; page < pages; ++page) {
        double bound = 0, truth = -HUGE_VAL;
        for (size_t d = 0; d < 64; ++d) {
          double low = HUGE_VAL, high = -HUGE_VAL;
          for (int64_t row = page * 16; row < std::min(c.kv_len(), page * 16 + 16); ++row) {
            low = std::min<double>(low, c.cache.key(head, row)[d]);
            high = std::max<double>(high, c.cache.key(head, row)[d]);
          }
          const double x = 0.125 * c.q[static_cast<size_t>(h) * 64 + d];
          bound += std::max(x * low, x * high);
        }
        for (int64_t row = page * 16; row < std::min(c.kv_len(), page * 16 + 16); ++row)
          truth = std::max(truth, c.score(h, row));
        EXPECT_GE(bound, truth - 1e-6);
        bounds.push_back(bound);
      }
      for (const size_t page : best(bounds, 4)) {
        for (int64_t row = static_cast<int64_t>(page) * 16;
             row < std::min(c.kv_len(), static_cast<int64_t>(page) * 16 + 16); ++row)
          expected.insert(static_cast<int32_t>(row));
      }
    }
    EXPECT_EQ(read_rows(choice, head), expected);
  }
  EXPECT_EQ(choice.summary_bytes, pages * 2 * 2 * kRowBytes);
}

TEST(Quest, KeepsUpWithNewRows) {
  Case c;
  auto quest = make_baseline(parse_baseline("quest,budget=64,recent=0"), c.layer);
  Choice early, late;
  for (int64_t kv_len = c.prompt_len + 1; kv_len < c.kv_len(); ++kv_len)
    quest->select(Step(c.rows, c.q.data(), 64, 6, 0.125f, kv_len), early);
  quest->select(*c.step, late);
  const Choice fresh = c.select("quest,budget=64,recent=0");
  for (int32_t head = 0; head < 2; ++head) EXPECT_EQ(read_rows(late, head), read_rows(fresh, head));
}

// Mean over the last 32 prompt queries and the group, then over 5 neighbors (fewer at the ends, still divided by 5).
std::vector<double> observed(const Case& c, int32_t head) {
  const int64_t begin = 4, end = c.prompt_len - 64;
  std::vector<double> sums(static_cast<size_t>(end - begin)), pooled(sums.size());
  for (int64_t i = 0; i < 32; ++i) {
    for (int32_t h = head * 3; h < head * 3 + 3; ++h) {
      const std::vector<double> w = c.weights_of(c.prompt_q.data() + (i * 6 + h) * 64, h, c.prompt_len - 32 + i + 1);
      for (int64_t row = begin; row < end; ++row)
        sums[static_cast<size_t>(row - begin)] += w[static_cast<size_t>(row)] / 96;
    }
  }
  for (int64_t i = 0; i < std::ssize(sums); ++i) {
    for (int64_t j = std::max<int64_t>(0, i - 2); j <= std::min<int64_t>(std::ssize(sums) - 1, i + 2); ++j)
      pooled[static_cast<size_t>(i)] += sums[static_cast<size_t>(j)] / 5;
  }
  return pooled;
}

void expect_kept(const Case& c, const Choice& choice, int32_t head, size_t budget) {
  RowSet expected = exact_rows(c, c.prompt_len);
  for (const size_t i : best(observed(c, head), budget)) expected.insert(static_cast<int32_t>(i + 4));
  EXPECT_EQ(read_rows(choice, head), expected);
  EXPECT_EQ(choice.summary_bytes, 0);
}

TEST(SnapKV, KeepsWhatTheLastPromptQueriesLookedAt) {
  Case c;
  const Choice choice = c.select("snapkv,budget=80");
  for (int32_t head = 0; head < 2; ++head) expect_kept(c, choice, head, 80);
}

TEST(PyramidKV, BudgetsFallInEqualStepsAndKeepTheirSum) {
  Case c;
  for (const int64_t budget : {80, 400}) {  // the second: the first layer would want more rows than there are
    int64_t sum = 0;
    for (int32_t l = 0; l < 12; ++l) {
      c.layer.layer = l;
      const auto rows = static_cast<double>(c.prompt_len - 68), b = static_cast<double>(budget);
      const double first = std::min(rows, 2 * b - b / 20), last = 2 * b - first;
      const auto expected = static_cast<size_t>(std::lround(first + (last - first) * l / 11));
      expect_kept(c, c.select(test::text("pyramidkv,budget=", budget)), l % 2, expected);
      sum += static_cast<int64_t>(expected);
    }
    EXPECT_NEAR(static_cast<double>(sum), 12.0 * static_cast<double>(budget), 6);
  }
}

TEST(AdaSnapKV, HeadsShareTheLayersBudget) {
  Case c;
  const Choice choice = c.select("adasnapkv,budget=80");
  std::vector<double> all = observed(c, 0);
  const size_t n = all.size();
  const std::vector<double> second = observed(c, 1);
  all.insert(all.end(), second.begin(), second.end());
  double counts[2] = {};
  for (const size_t i : best(all, 160)) counts[i / n] += 1;
  EXPECT_EQ(counts[0] + counts[1], 160);
  EXPECT_NE(counts[0], counts[1]);
  for (int32_t head = 0; head < 2; ++head)
    expect_kept(c, choice, head, static_cast<size_t>(std::lround(0.8 * counts[head] + 0.2 * 80)));
}

TEST(Eviction, NeedsTheWindowsQueries) {
  Case c;
  c.layer.prompt_q = c.layer.prompt_q.first(31 * 6 * 64);
  try {
    c.select("snapkv");
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "snapkv: the last 32 prompt queries are needed, there are 31");
  }
}

TEST(Baselines, AShortPromptIsReadWhole) {
  Case c(60, 5);
  std::vector<float> dense(6 * 64), out(6 * 64);
  attend_dense(*c.step, dense.data());
  for (const std::string& text : baseline_help()) {
    const Choice choice = c.select(text);
    attend(*c.step, choice, out.data());
    EXPECT_LT(test::relative_error(out, dense), 1e-6) << text;
    EXPECT_EQ(choice.tokens(), 2 * c.kv_len()) << text;
    EXPECT_EQ(choice.sampled(), 0) << text;
  }
}

TEST(Baselines, WrongOptionsAreNamed) {
  const auto message = [](const std::string& text) {
    try {
      parse_baseline(text);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("none");
  };
  EXPECT_THAT(message("quests"), testing::HasSubstr("baseline 'quests' is none of oracle_topp,"));
  EXPECT_EQ(message("quest,pages=4"), "quest: option 'pages' is none of budget, page, sinks, recent");
  EXPECT_EQ(message("quest,page=0"), "quest: page='0' must be a whole number from 1 to 4096");
  EXPECT_EQ(message("quest,page=4x"), "quest: page='4x' must be a whole number from 1 to 4096");
  EXPECT_EQ(message("quest,page"), "quest: page='' must be a whole number from 1 to 4096");
  EXPECT_EQ(message("magicpig,k=1.5"), "magicpig: k='1.5' must be a whole number from 1 to 16");
  EXPECT_EQ(message("oracle_topp,mass=nan"), "oracle_topp: mass='nan' must be a number from 0 to 1");
  EXPECT_TRUE(is_baseline("quest,page=4"));
  EXPECT_FALSE(is_baseline("topk,budget=4"));
}

}  // namespace
}  // namespace tactic::eval
