// score: dot products with the stored centroids, and how many members are readable.
#include "cpu/steps.h"
#include "reference/steps.h"
#include "support.h"

namespace tactic::test {
namespace {

ClusterScores poisoned(const ClusterScores& like) {
  ClusterScores scores = like;
  for (std::vector<float>* values : {&scores.dots, &scores.spreads, &scores.sizes})
    std::fill(values->begin(), values->end(), std::nanf(""));
  return scores;
}

void expect_same(const ClusterScores& scores, const ClusterScores& expected, int32_t group, double tolerance) {
  for (int32_t c = 0; c < expected.num_clusters; ++c) {
    ASSERT_EQ(scores.sizes[c], expected.sizes[c]) << "cluster " << c;
    ASSERT_EQ(scores.spreads[c], expected.spreads[c]) << "cluster " << c;
    if (expected.sizes[c] == 0) continue;
    for (int32_t g = 0; g < group; ++g) {
      const size_t at = static_cast<size_t>(g) * expected.num_clusters + c;
      ASSERT_NEAR(scores.dots[at], expected.dots[at], tolerance) << "query " << g << " cluster " << c;
    }
  }
}

void check(const CacheSpec& spec, int32_t group, const IndexOptions& options = {}) {
  SCOPED_TRACE(text("d", spec.head_dim, " g", group, " kv_len ", spec.kv_len));
  const Cache cache(spec);
  const auto index = build_index(cache, options);
  index->write(spec.kv_len / 3, spec.kv_len / 100);  // rewritten rows do not count
  const std::vector<float> q = make_queries(cache, group, 3);
  const std::vector<uint64_t> visible = random_bits(spec.kv_len, 0.7, 8), none(visible.size());
  const int32_t head = spec.num_kv_heads - 1;
  const float* queries = q.data() + static_cast<size_t>(head) * group * spec.head_dim;
  for (const std::vector<uint64_t>* bits : {static_cast<const std::vector<uint64_t>*>(nullptr), &visible, &none}) {
    const RowFilter filter = filter_of(*index, spec.kv_len - 40, bits);
    ClusterScores expected;
    reference::score(index->state(), head, filter, queries, group, expected);
    double largest = 0;
    for (const float dot : expected.dots) largest = std::max<double>(largest, std::fabs(dot));
    for (const int64_t target : highway_targets()) {
      SCOPED_TRACE(text(target_name(target), bits == nullptr ? ", all visible" : ", masked"));
      const OnTarget on(target);
      ClusterScores scores = poisoned(expected), parts = scores;
      cpu::score(index->state(), head, filter, queries, group, 0, expected.num_clusters, scores);
      expect_same(scores, expected, group, 3e-6 * largest);
      for (int32_t begin = 0; begin < expected.num_clusters; begin += 48) {  // any split gives the same bits
        cpu::score(index->state(), head, filter, queries, group, begin, std::min(begin + 48, expected.num_clusters),
                   parts);
      }
      EXPECT_TRUE(same_bits(parts.dots, scores.dots));
      EXPECT_EQ(parts.sizes, scores.sizes);
    }
  }
}

TEST(Score, EveryHeadDimAndGroup) {
  for (const int32_t dim : {16, 64, 80, 96, 128, 256}) {
    for (const int32_t group : {1, 2, 3, 4, 5, 8}) {
      CacheSpec spec;
      spec.head_dim = spec.v_head_dim = dim;
      spec.kv_len = 1333;
      check(spec, group, {.segment_tokens = 512, .provisional_tokens = 128});
    }
  }
}

TEST(Score, EveryLength) {
  for (const int64_t kv_len : {256, 257, 2048, 4096, 9000}) {
    CacheSpec spec;
    spec.kv_len = kv_len;
    check(spec, 3);
  }
}

TEST(Score, WithoutSinks) {
  CacheSpec spec;
  spec.kv_len = 2100;
  check(spec, 4, {.sink_tokens = 0, .outlier_fraction = 0});
}

TEST(Score, OnlyItsRangeIsWritten) {
  CacheSpec spec;
  spec.kv_len = 2048;
  const Cache cache(spec);
  const auto index = build_index(cache);
  const std::vector<float> q = make_queries(cache, 2, 3);
  const RowFilter filter = filter_of(*index, spec.kv_len);
  ClusterScores scores;
  reference::score(index->state(), 0, filter, q.data(), 2, scores);
  scores = poisoned(scores);
  cpu::score(index->state(), 0, filter, q.data(), 2, 32, 64, scores);
  for (int32_t g = 0; g < 2; ++g) {
    for (int32_t c = 0; c < scores.num_clusters; ++c)
      EXPECT_EQ(std::isnan(scores.dots[g * scores.num_clusters + c]), c < 32 || c >= 64);
  }
}

TEST(Score, AnEmptyIndexHasNoClusters) {
  const KvIndex index({}, {1, 64, 64});
  ClusterScores scores;
  const std::vector<float> q(64);
  cpu::score(index.state(), 0, filter_of(index, 0), q.data(), 1, 0, 0, scores);
  EXPECT_EQ(index.state().total_clusters(), 0);
}

}  // namespace
}  // namespace tactic::test
