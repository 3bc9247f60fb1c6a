// What tests of the index share: small segments, and what must hold of every index.
#pragma once

#include <algorithm>

#include "support.h"

namespace tactic::test {

inline constexpr IndexOptions kSmall{
    .cluster_tokens = 16, .segment_tokens = 512, .provisional_tokens = 64, .provisional_cluster_tokens = 4};

inline CacheSpec spec_of(int64_t kv_len) {
  CacheSpec spec;
  spec.kv_len = kv_len;
  return spec;
}

inline KvIndex empty_index(const CacheSpec& spec, const IndexOptions& options = kSmall) {
  KvIndex index(options, {spec.num_kv_heads, spec.head_dim, spec.v_head_dim});
  index.set_num_threads(1);
  return index;
}

inline KvView cut(KvView kv, int64_t kv_len) {
  kv.kv_len = kv_len;
  return kv;
}

inline void expect_same(const KvIndex& a, const KvIndex& b) {
  const std::vector<Segment>&sa = a.state().segments, &sb = b.state().segments;
  ASSERT_EQ(sa.size(), sb.size());
  for (size_t i = 0; i < sa.size(); ++i) {
    SCOPED_TRACE(text("segment at row ", sa[i].row_begin));
    ASSERT_EQ(sa[i].row_begin, sb[i].row_begin);
    ASSERT_EQ(sa[i].num_rows, sb[i].num_rows);
    ASSERT_EQ(sa[i].num_clusters, sb[i].num_clusters);
    EXPECT_EQ(sa[i].provisional, sb[i].provisional);
    EXPECT_EQ(sa[i].row_checks, sb[i].row_checks);
    for (size_t h = 0; h < sa[i].heads.size(); ++h) {
      EXPECT_TRUE(same_bits(sa[i].heads[h].mean, sb[i].heads[h].mean));
      EXPECT_TRUE(same_bits(sa[i].heads[h].scales, sb[i].heads[h].scales));
      EXPECT_TRUE(same_bits(sa[i].heads[h].spreads, sb[i].heads[h].spreads));
      EXPECT_EQ(sa[i].heads[h].residuals, sb[i].heads[h].residuals);
      EXPECT_EQ(sa[i].heads[h].sizes, sb[i].heads[h].sizes);
      EXPECT_EQ(sa[i].heads[h].members, sb[i].heads[h].members);
      EXPECT_EQ(sa[i].heads[h].not_finite, sb[i].heads[h].not_finite);
    }
  }
  const int64_t rows = std::max(a.state().rows_end, b.state().rows_end);
  for (int64_t row = 0; row < rows; ++row)
    ASSERT_EQ(a.state().indexed.test(row), b.state().indexed.test(row)) << "row " << row;
}

// Every written row is read exactly once by a query that selects everything: exact, or member of one cluster, or not
// finite.
inline void expect_partition(const KvIndex& index) {
  const IndexState& state = index.state();
  for (int32_t head = 0; head < state.shape.num_kv_heads; ++head) {
    std::vector<int> times(static_cast<size_t>(state.rows_end));
    for (int64_t row = 0; row < state.rows_end; ++row)
      times[row] += state.written.test(row) && !state.indexed.test(row);
    int64_t end = 0;
    for (const Segment& segment : state.segments) {
      EXPECT_GE(segment.row_begin, end) << "segments overlap or are out of order";
      end = segment.row_begin + segment.num_rows;
      const HeadClusters& clusters = segment.heads[head];
      const auto padded = static_cast<size_t>(padded_clusters(segment.num_clusters));
      ASSERT_EQ(clusters.sizes.size(), padded);
      ASSERT_EQ(clusters.residuals.size(), padded * state.shape.head_dim);
      size_t members = 0;
      for (size_t c = 0; c < padded; ++c) {
        EXPECT_TRUE(c < static_cast<size_t>(segment.num_clusters) || clusters.sizes[c] == 0) << "padding holds members";
        for (size_t m = members + 1; m < members + clusters.sizes[c]; ++m)
          EXPECT_LT(clusters.members[m - 1], clusters.members[m]);
        members += clusters.sizes[c];
      }
      ASSERT_EQ(members, clusters.members.size());
      EXPECT_TRUE(std::is_sorted(clusters.not_finite.begin(), clusters.not_finite.end()));
      for (const std::vector<uint16_t>* rows : {&clusters.members, &clusters.not_finite}) {
        for (const uint16_t r : *rows) {
          ASSERT_LT(r, segment.num_rows);
          if (segment.row_begin + r < state.rows_end)
            times[segment.row_begin + r] += state.indexed.test(segment.row_begin + r);
        }
      }
    }
    for (int64_t row = 0; row < state.rows_end; ++row)
      ASSERT_EQ(times[row], state.written.test(row)) << "row " << row << " head " << head;
  }
}

}  // namespace tactic::test
