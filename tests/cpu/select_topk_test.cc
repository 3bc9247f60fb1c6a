// select_topk: exactly what the reference selects.
#include "cpu/steps.h"
#include "reference/steps.h"
#include "support.h"

namespace tactic::test {
namespace {

void expect_same(const HeadSelection& a, const HeadSelection& b) {
  EXPECT_EQ(a.tokens, b.tokens);
  EXPECT_EQ(a.clusters, b.clusters);
  EXPECT_EQ(a.log_weights, b.log_weights);
  EXPECT_EQ(a.num_certain, b.num_certain);
}

struct Setting {
  Cache cache;
  std::unique_ptr<KvIndex> index;
  std::vector<uint64_t> visible;
  std::vector<float> q;
  RowFilter filter;
  ClusterScores scores;
  int32_t group;

  Setting(int64_t kv_len, int32_t group_size, double seen)
      : cache(spec_of(kv_len)), index(build_index(cache)), group(group_size) {
    visible = random_bits(kv_len, seen, 4);
    q = make_queries(cache, group, 5);
    filter = filter_of(*index, kv_len, seen < 1 ? &visible : nullptr);
    reference::score(index->state(), 0, filter, q.data(), group, scores);
  }
  static CacheSpec spec_of(int64_t kv_len) {
    CacheSpec spec;
    spec.num_kv_heads = 1;
    spec.kv_len = kv_len;
    return spec;
  }
  HeadSelection cpu(int32_t budget) const {
    HeadSelection out;
    cpu::select_topk(index->state(), 0, filter, scores, group, budget, out);
    return out;
  }
  HeadSelection reference(int32_t budget) const {
    HeadSelection out;
    reference::select_topk(index->state(), 0, filter, scores, group, budget, out);
    return out;
  }
};

TEST(SelectTopK, SelectsWhatTheReferenceSelects) {
  for (const int64_t kv_len : {256, 1000, 4096, 9999}) {
    for (const int32_t group : {1, 3, 4, 8}) {
      for (const double seen : {1.0, 0.6, 0.05}) {
        const Setting setting(kv_len, group, seen);
        for (const int32_t budget : {1, 2, 31, 127, 1024, 5000, 100000}) {
          SCOPED_TRACE(text("kv_len ", kv_len, " g", group, " visible ", seen, " budget ", budget));
          expect_same(setting.cpu(budget), setting.reference(budget));
        }
      }
    }
  }
}

TEST(SelectTopK, EachHeadHasItsBudgetAndUnionsNest) {
  const Setting setting(5000, 1, 1);
  std::vector<int32_t> before;
  for (const int32_t budget : {1, 10, 100, 1000, 4000}) {
    std::vector<int32_t> tokens = setting.cpu(budget).tokens;
    EXPECT_EQ(tokens.size(), static_cast<size_t>(budget));
    std::sort(tokens.begin(), tokens.end());
    EXPECT_TRUE(std::includes(tokens.begin(), tokens.end(), before.begin(), before.end())) << "budget " << budget;
    before = tokens;
  }
}

TEST(SelectTopK, EqualScoresGoByClusterNumber) {
  Setting setting(3000, 2, 1);
  std::fill(setting.scores.dots.begin(), setting.scores.dots.end(), 0.0f);
  for (size_t i = 0; i < setting.scores.dots.size(); i += 3) setting.scores.dots[i] = -0.0f;  // the same number
  for (const int32_t budget : {1, 77, 1500}) expect_same(setting.cpu(budget), setting.reference(budget));
}

TEST(SelectTopK, NothingVisibleSelectsNothing) {
  const Setting setting(1000, 2, 0);
  EXPECT_TRUE(setting.cpu(100).tokens.empty());
}

}  // namespace
}  // namespace tactic::test
