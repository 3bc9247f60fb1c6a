#include "tactic/kv_index.h"

#include <algorithm>
#include <numeric>

#include "core/expected_rows.h"
#include "core/index_checks.h"
#include "tactic/error.h"

namespace tactic::test {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

TEST(KvIndex, AppendOneByOneEqualsAppendAtOnce) {
  const CacheSpec spec = spec_of(1700);
  const Cache cache(spec);
  KvIndex by_one = empty_index(spec), at_once = empty_index(spec);
  for (int64_t row = 0; row < spec.kv_len; ++row) {
    by_one.write(row, 1);
    by_one.maintain(cut(cache.view(), row + 1));
  }
  at_once.write(0, spec.kv_len);
  EXPECT_FALSE(at_once.maintain(cache.view()));
  expect_same(by_one, at_once);
  EXPECT_EQ(by_one.state().segments.size(),
            3u + 2u);  // 1536 rows in full segments, then 128 in provisional ones, 36 recent
  EXPECT_EQ(by_one.rows_written(), 1700);
  EXPECT_EQ(by_one.rows_indexed(), 1664 - 4);
}

TEST(KvIndex, EveryRowInExactlyOnePlace) {
  for (const int64_t kv_len : {0, 1, 31, 33, 63, 64, 127, 511, 512, 513, 1000, 2049}) {
    SCOPED_TRACE(text("kv_len ", kv_len));
    const Cache cache(spec_of(kv_len));
    expect_partition(*build_index(cache, kSmall));
  }
}

TEST(KvIndex, SinksAreNeverIndexed) {
  const Cache cache(spec_of(512));
  for (const int32_t sinks : {0, 1, 4, 100}) {
    IndexOptions options = kSmall;
    options.sink_tokens = sinks;
    const auto index = build_index(cache, options);
    EXPECT_EQ(index->rows_indexed(), 512 - sinks);
    for (int64_t row = 0; row < sinks; ++row) EXPECT_FALSE(index->state().indexed.test(row));
    expect_partition(*index);
  }
}

TEST(KvIndex, MoreSinksThanASegmentHas) {
  const Cache cache(spec_of(700));
  IndexOptions options = kSmall;
  options.sink_tokens = 600;
  const auto index = build_index(cache, options);
  EXPECT_EQ(index->rows_indexed(), 640 - 600);
  expect_partition(*index);
}

TEST(KvIndex, RewrittenRowsAreReadExactlyUntilTheirSegmentIsBuiltAnew) {
  const CacheSpec spec = spec_of(1024);
  Cache cache(spec);
  KvIndex index = empty_index(spec);
  index.write(0, 1024);
  index.maintain(cache.view());
  ASSERT_EQ(index.rows_indexed(), 1020);
  index.write(600, 10);
  EXPECT_EQ(index.rows_indexed(), 1010);
  index.maintain(cache.view());
  EXPECT_EQ(index.rows_indexed(), 1010) << "ten rows are not worth a new segment";
  expect_partition(index);
  Random random(3);
  std::vector<float> x(spec.head_dim);
  for (int64_t row = 600; row < 680; ++row) {
    for (float& value : x) value = random.normal();
    for (int32_t head = 0; head < spec.num_kv_heads; ++head) cache.set_key(head, row, x);
  }
  index.write(600, 80);
  EXPECT_EQ(index.rows_indexed(), 1020 - 80);
  index.maintain(cache.view());
  EXPECT_EQ(index.rows_indexed(), 1020);
  expect_partition(index);
  EXPECT_EQ(index.verify(cache.view()), 0);
  expect_same(index, *build_index(cache, kSmall));
}

TEST(KvIndex, TruncateForgetsAndAppendingAgainRestores) {
  const CacheSpec spec = spec_of(1400);
  const Cache cache(spec);
  for (const int64_t kv_len : {0, 1, 100, 512, 700, 1023, 1300, 1399}) {
    SCOPED_TRACE(text("truncate to ", kv_len));
    KvIndex index = empty_index(spec);
    index.write(0, spec.kv_len);
    index.maintain(cache.view());
    index.truncate(kv_len);
    EXPECT_EQ(index.rows_written(), kv_len);
    EXPECT_LE(index.rows_indexed(), kv_len);
    expect_partition(index);
    index.maintain(cut(cache.view(), kv_len));
    expect_partition(index);
    index.write(kv_len, spec.kv_len - kv_len);
    index.maintain(cache.view());
    EXPECT_EQ(index.rows_written(), spec.kv_len);
    EXPECT_GE(index.rows_indexed(), 1400 - 4 - 2 * 64) << "about as much as without the detour";
    expect_partition(index);
    EXPECT_EQ(index.verify(cache.view()), 0);
  }
}

// What is settled is not looked at again, whatever happened in whatever order.
TEST(KvIndex, NothingIsLeftBehind) {
  const CacheSpec spec = spec_of(3000);
  const Cache cache(spec);
  Random random(7);
  KvIndex index = empty_index(spec);
  for (int step = 0; step < 300; ++step) {
    const int64_t end = index.state().rows_end, row = random.below(std::max<int64_t>(end, 1));
    switch (random.below(6)) {
      case 0: index.write(row, std::min<int64_t>(1 + random.below(200), 3000 - row)); break;
      case 1: index.remove(row, random.below(90)); break;
      case 2: index.truncate(std::max<int64_t>(row, end - random.below(300))); break;
      default: index.write(end, std::min<int64_t>(random.below(400), 3000 - end)); break;
    }
    const double budget = random.below(3) == 0 ? 0.5 : -1;
    if (index.maintain(cache.view(), budget) || budget >= 0) continue;
    const size_t segments = index.state().segments.size();
    const int64_t indexed = index.rows_indexed();
    index.state().settled = 0;
    EXPECT_FALSE(index.maintain(cache.view()));
    EXPECT_EQ(index.state().segments.size(), segments);
    EXPECT_EQ(index.rows_indexed(), indexed);
  }
  expect_partition(index);
}

TEST(KvIndex, RowsThatAreGoneAreNotExpected) {
  const Cache cache(spec_of(1400));
  for (const bool truncate : {true, false}) {
    const auto index = build_index(cache, kSmall);
    Calibration& known = index->state().calibration[1];
    known.heavy = known.expected = {600, 900, 1000};
    known.suspects = {1000, 700, 900};
    truncate ? index->truncate(900) : index->remove(900, 500);
    EXPECT_EQ(known.heavy, std::vector<int32_t>{600});
    EXPECT_EQ(known.expected, std::vector<int32_t>{600});
    EXPECT_EQ(known.suspects, std::vector<int32_t>{700});
  }
}

TEST(KvIndex, NumbersBelowZero) {
  const Cache cache(spec_of(600));
  const auto index = build_index(cache, kSmall);
  EXPECT_THROW(index->truncate(-1), Error);
  EXPECT_THROW(index->mean_spread(-1), Error);
  EXPECT_THROW(index->mean_spread(99), Error);
  EXPECT_EQ(index->written_word(-1), 0u);
  EXPECT_EQ(index->indexed_word(-1), 0u);
  EXPECT_EQ(index->rows_written(), 600);
}

TEST(KvIndex, TruncateBeyondTheEndChangesNothing) {
  const Cache cache(spec_of(600));
  const auto index = build_index(cache, kSmall);
  index->truncate(5000);
  EXPECT_EQ(index->rows_written(), 600);
  expect_same(*index, *build_index(cache, kSmall));
}

TEST(KvIndex, ClearForgetsEverything) {
  const Cache cache(spec_of(600));
  const auto index = build_index(cache, kSmall);
  index->clear();
  EXPECT_EQ(index->rows_written(), 0);
  EXPECT_EQ(index->rows_indexed(), 0);
  EXPECT_EQ(index->num_clusters(), 0);
  index->write(0, 600);
  index->maintain(cache.view());
  expect_same(*index, *build_index(cache, kSmall));
}

TEST(KvIndex, BudgetedMaintenanceComesToTheSame) {
  const CacheSpec spec = spec_of(1700);
  const Cache cache(spec);
  for (const double budget : {0.1, 0.5, 1.0, 1.5}) {
    SCOPED_TRACE(budget);
    KvIndex index = empty_index(spec);
    index.write(0, spec.kv_len);
    int calls = 1;
    for (; index.maintain(cache.view(), budget); ++calls) {
      ASSERT_LT(calls, 1000);
      expect_partition(index);
    }
    EXPECT_GE(calls, 2);
    if (budget >= 1) {  // a whole segment fits no smaller one
      expect_same(index, *build_index(cache, kSmall));
    }
    EXPECT_EQ(index.rows_indexed(), 1660) << "provisional segments at least";
  }
}

TEST(KvIndex, WorkIsLeftWhileFullSegmentsWaitForTheirBudget) {
  const CacheSpec spec = spec_of(1700);
  const Cache cache(spec);
  KvIndex index = empty_index(spec);
  for (int64_t rows = 100; rows <= spec.kv_len; rows += 100) {
    index.write(rows - 100, 100);
    EXPECT_FALSE(index.maintain(cut(cache.view(), rows), 0.5)) << rows << " rows";
  }
  const auto full = [&] {
    return std::count_if(index.state().segments.begin(), index.state().segments.end(),
                         [](const Segment& segment) { return !segment.provisional; });
  };
  EXPECT_EQ(full(), 0);
  for (int i = 1; i <= 3; ++i) {
    EXPECT_EQ(index.maintain(cache.view(), 1), i < 3);
    EXPECT_EQ(full(), i);
  }
  expect_same(index, *build_index(cache, kSmall));
  index.write(600, 100);  // as many as are worth a new segment
  EXPECT_FALSE(index.maintain(cache.view(), 0.5)) << "it waits for a larger budget";
  EXPECT_EQ(index.rows_indexed(), 1560);
  EXPECT_FALSE(index.maintain(cache.view(), 1));
  EXPECT_EQ(index.rows_indexed(), 1660);
}

TEST(KvIndex, BudgetZeroDoesNothing) {
  const CacheSpec spec = spec_of(600);
  const Cache cache(spec);
  KvIndex index = empty_index(spec);
  index.write(0, 600);
  for (const double nothing : {0.0, 0.01}) {
    EXPECT_FALSE(index.maintain(cache.view(), nothing)) << "another call would do nothing either";
    EXPECT_EQ(index.rows_indexed(), 0);
  }
}

TEST(KvIndex, HolesAreLeftOut) {
  const CacheSpec spec = spec_of(1024);
  const Cache cache(spec);
  KvIndex index = empty_index(spec);
  index.write(0, 300);
  index.write(400, 624);
  index.maintain(cache.view());
  EXPECT_EQ(index.rows_written(), 924);
  EXPECT_EQ(index.state().indexed.count_range(256, 448), 0) << "parts with rows that were never written";
  EXPECT_TRUE(index.state().indexed.test(255));
  EXPECT_TRUE(index.state().indexed.test(448));
  expect_partition(index);
  index.write(300, 100);
  index.maintain(cache.view());
  expect_same(index, *build_index(cache, kSmall));
}

// Of the first 2000 rows, clustered at once.
KvIndex whole_index(const CacheSpec& spec, const Cache& cache) {
  IndexOptions options = kSmall;
  options.clustering = Clustering::kWhole;
  KvIndex index = empty_index(spec, options);
  index.write(0, 2000);
  index.maintain(cut(cache.view(), 2000));
  return index;
}

TEST(KvIndex, WholeClusteringAsInThePaper) {
  const CacheSpec spec = spec_of(3000);
  const Cache cache(spec);
  KvIndex index = whole_index(spec, cache);
  EXPECT_EQ(index.state().segments.size(), 1u);
  EXPECT_EQ(index.rows_indexed(), 1996);
  index.write(2000, 511);
  index.maintain(cut(cache.view(), 2511));
  EXPECT_EQ(index.rows_indexed(), 1996) << "one row short of segment_tokens";
  index.write(2511, 1);
  index.maintain(cut(cache.view(), 2512));
  EXPECT_EQ(index.rows_indexed(), 2508);
  EXPECT_EQ(index.state().segments.size(), 1u);
  expect_partition(index);
}

TEST(KvIndex, WholeClusteringAroundRemovedRows) {
  const CacheSpec spec = spec_of(3000);
  const Cache cache(spec);
  KvIndex index = whole_index(spec, cache);
  index.remove(1000, 1);
  index.remove(1040, 60);
  EXPECT_EQ(index.rows_indexed(), 0);
  index.write(2000, 100);
  EXPECT_FALSE(index.maintain(cut(cache.view(), 2100)));
  ASSERT_EQ(index.state().segments.size(), 2u);
  EXPECT_EQ(index.rows_indexed(), 1000 - 4 + 1000) << "39 rows between the holes are too few";
  expect_partition(index);
  index.write(2100, 511);
  const Segment* first = index.state().segments.data();
  index.maintain(cut(cache.view(), 2611));
  EXPECT_EQ(index.rows_indexed(), 1996) << "one row short of segment_tokens";
  EXPECT_EQ(index.state().segments.data(), first);
  index.write(2611, 1);
  index.maintain(cut(cache.view(), 2612));
  EXPECT_EQ(index.rows_indexed(), 1996 + 512);
  index.write(1000, 1);
  index.write(1040, 60);
  index.write(2612, 388);
  index.maintain(cache.view());
  EXPECT_EQ(index.rows_indexed(), 1996 + 512) << "488 rows have come";
  expect_partition(index);
}

TEST(KvIndex, VerifyFindsChangedRows) {
  const CacheSpec spec = spec_of(1024);
  Cache cache(spec);
  const auto index = build_index(cache, kSmall);
  Random random(5);
  const auto rewrite = [&](int64_t begin, int64_t end) {
    std::vector<float> x(spec.head_dim);
    for (int64_t row = begin; row < end; ++row) {
      for (float& value : x) value = random.normal();
      for (int32_t head = 0; head < spec.num_kv_heads; ++head)
        row % 2 == 0 ? cache.set_key(head, row, x) : cache.set_value(head, row, x);
    }
  };
  rewrite(100, 106);
  EXPECT_EQ(index->verify(cache.view(), 0, 100) + index->verify(cache.view(), 106, 918), 0) << "others";
  const int64_t few = index->verify(cache.view());
  EXPECT_GE(few, 4) << "a row slips through in one of 256 cases";
  EXPECT_EQ(index->rows_indexed(), 1020 - few);
  rewrite(200, 300);
  EXPECT_GE(index->verify(cache.view()), 95);
  EXPECT_LT(index->rows_indexed(), 1020 - few - 100) << "segments of which many rows have changed go whole";
  index->maintain(cache.view());
  EXPECT_EQ(index->rows_indexed(), 1020);
  expect_partition(*index);
}

TEST(KvIndex, MeanSpreadIsTheDistanceToTheCentroids) {
  const Cache cache(spec_of(1024));
  EXPECT_EQ(empty_index(spec_of(0)).mean_spread(0), 0);
  const auto index = build_index(cache, kSmall);
  for (const int32_t head :
       {0, 1}) {  // keys have noise of variance 1 around their topics, and clusters take some of it away
    EXPECT_GT(index->mean_spread(head), 0.5);
    EXPECT_LT(index->mean_spread(head), 1.2);
  }
}

TEST(KvIndex, WrittenWords) {
  KvIndex index = empty_index(spec_of(0));
  EXPECT_EQ(index.written_word(0), 0u);
  index.write(60, 10);
  EXPECT_EQ(index.written_word(0), uint64_t{15} << 60);
  EXPECT_EQ(index.written_word(1), uint64_t{63});
  EXPECT_EQ(index.written_word(1000), 0u);
}

TEST(KvIndex, MemoryIsASmallShareOfTheCache) {
  CacheSpec spec = spec_of(8192);
  const Cache cache(spec);
  const auto index = build_index(cache);
  const double cache_bytes = 8192.0 * spec.num_kv_heads * 2 * 64 * 2;
  EXPECT_LE(static_cast<double>(index->memory_bytes()), 0.04 * cache_bytes);
  EXPECT_GE(static_cast<double>(index->memory_bytes()), 0.01 * cache_bytes);
}

TEST(KvIndex, ResultDoesNotDependOnThreads) {
  const CacheSpec spec = spec_of(2500);
  const Cache cache(spec);
  const auto one = build_index(cache, {});
  for (const int32_t threads : {2, 3}) {
    KvIndex index({}, {spec.num_kv_heads, spec.head_dim, spec.v_head_dim});
    index.set_num_threads(threads);
    index.write(0, spec.kv_len);
    index.maintain(cache.view());
    expect_same(index, *one);
  }
}

TEST(KvIndex, BadInputsNameValueAndLimit) {
  EXPECT_THAT([] { KvIndex({}, {0, 64, 64}); }, ThrowsMessage<Error>(HasSubstr("num_kv_heads (0)")));
  EXPECT_THAT([] { KvIndex({}, {1, 60, 64}); }, ThrowsMessage<Error>(HasSubstr("head_dim (60)")));
  EXPECT_THAT([] { KvIndex({}, {1, 64, 2048}); }, ThrowsMessage<Error>(HasSubstr("head_dim (2048)")));
  EXPECT_THAT([] { KvIndex({.iterations = 0}, {1, 64, 64}); }, ThrowsMessage<Error>(HasSubstr("iterations (0)")));
  const Cache cache(spec_of(600));
  const auto index = build_index(cache, kSmall);
  EXPECT_THAT([&] { index->write(-1, 5); }, ThrowsMessage<Error>(HasSubstr("-1")));
  EXPECT_THAT([&] { index->write(5, -2); }, ThrowsMessage<Error>(HasSubstr("-2")));
  EXPECT_THAT([&] { index->write(int64_t{1} << 40, 1); }, ThrowsMessage<Error>(HasSubstr("1099511627776")));
  EXPECT_THAT([&] { index->maintain(cut(cache.view(), 599)); }, ThrowsMessage<Error>(HasSubstr("kv_len (599)")));
  KvView other = cache.view();
  other.num_kv_heads = 1;
  EXPECT_THAT([&] { index->maintain(other); }, ThrowsMessage<Error>(HasSubstr("num_kv_heads (1)")));
  other = cache.view();
  other.head_dim = 80;
  EXPECT_THAT([&] { index->verify(other); }, ThrowsMessage<Error>(HasSubstr("head_dim (80)")));
}

TEST(KvIndex, RemovedRowsTakeTheirSegmentsAlong) {
  const Cache cache(spec_of(1100));
  const auto index = build_index(cache, kSmall);
  const auto row_begin = index->state().segments[1].row_begin, num_rows = int64_t{index->state().segments[1].num_rows};
  const size_t segments = index->state().segments.size();
  const int64_t written = index->rows_written(), indexed = index->rows_indexed();
  index->remove(row_begin + 5, 3);
  EXPECT_EQ(index->state().segments.size(), segments - 1);
  EXPECT_EQ(index->rows_written(), written - 3);
  EXPECT_EQ(index->rows_indexed(), indexed - num_rows);
  EXPECT_EQ(index->written_word((row_begin + 5) / 64) >> ((row_begin + 5) % 64) & 7, 0u);
  index->write(row_begin + 5, 3);
  EXPECT_FALSE(index->maintain(cache.view()));
  EXPECT_EQ(index->state().segments.size(), segments);
  EXPECT_EQ(index->rows_indexed(), indexed);
  index->remove(1000, 5000);
  EXPECT_EQ(index->state().rows_end, 1000);
  index->remove(2000, 10);
  index->remove(10, 0);
  EXPECT_EQ(index->rows_written(), 1000);
  EXPECT_THAT([&] { index->remove(-1, 2); }, ThrowsMessage<Error>(HasSubstr("rows -1")));
}

TEST(KvIndex, RowsEndWithTheLastWrittenOne) {
  const CacheSpec spec = spec_of(1000);
  const Cache cache(spec);
  KvIndex index = empty_index(spec);
  index.write(0, 1000);
  index.remove(0, 500);
  index.remove(500, 500);
  EXPECT_FALSE(index.maintain(cut(cache.view(), 0)));
  index.write(0, 300);
  index.write(800, 200);
  index.truncate(700);
  EXPECT_FALSE(index.maintain(cut(cache.view(), 300)));
  EXPECT_EQ(index.rows_written(), 300);
  expect_partition(index);
  index.write(900, 10);
  index.remove(905, 5);
  EXPECT_THAT([&] { index.maintain(cut(cache.view(), 904)); }, ThrowsMessage<Error>(HasSubstr("the 905 rows written")));
}

TEST(FoundHeavy, TwiceIsReadForCertain) {
  const CacheSpec spec = spec_of(1100);
  const Cache cache(spec);
  for (const float fraction : {0.01f, 0.0f}) {
    SCOPED_TRACE(text("outlier_fraction ", fraction));
    IndexOptions options = kSmall;
    options.outlier_fraction = fraction;
    const auto index = build_index(cache, options);
    IndexState& state = index->state();
    const Segment& segment = state.segments[1];
    const std::vector<uint16_t> rows = segment.heads[1].members;
    const auto row = static_cast<int32_t>(segment.row_begin + rows[40]);
    const RowFilter filter = filter_of(*index, 1100);
    std::vector<int32_t> read;
    found_heavy(state, 1, row);
    expected_rows(state, 1, filter, {}, read);
    EXPECT_TRUE(read.empty()) << "once may be chance";
    found_heavy(state, 1, row);
    expected_rows(state, 1, filter, {}, read);
    if (fraction == 0) {
      EXPECT_TRUE(read.empty()) << "no outliers were wanted";
      continue;
    }
    EXPECT_EQ(read, std::vector<int32_t>{row});
    EXPECT_TRUE(state.calibration[0].heavy.empty()) << "the other head is left alone";
    // Every row is read once.
    Problem problem(spec, 2);
    problem.query.index = index.get();
    Selection selection;
    problem.query.selection = &selection;
    problem.run({.tau = 1e9f, .check_rows = false});
    std::vector<int32_t> tokens = selection.heads[1].tokens;
    std::sort(tokens.begin(), tokens.end());
    ASSERT_EQ(tokens.size(), 1100u);
    for (int32_t i = 0; i < 1100; ++i) ASSERT_EQ(tokens[static_cast<size_t>(i)], i);
    // There is an end to it, the list stays in order, and rows outside the index do no harm.
    for (const uint16_t other : rows) {
      for (int times = 0; times < 3; ++times) found_heavy(state, 1, static_cast<int32_t>(segment.row_begin + other));
    }
    EXPECT_EQ(state.calibration[1].heavy.size(), 22u);  // 2 * 0.01 * 1100
    EXPECT_TRUE(std::is_sorted(state.calibration[1].heavy.begin(), state.calibration[1].heavy.end()));
    for (int twice = 0; twice < 2; ++twice) found_heavy(state, 1, 1099);
    for (int twice = 0; twice < 2; ++twice) found_heavy(state, 1, 5000);
    index->forget_learned();
    expected_rows(state, 1, filter, {}, read);
    EXPECT_TRUE(read.empty());
  }
}

}  // namespace
}  // namespace tactic::test
