// cluster: the same clusters as the reference where they are unmistakable, as good ones elsewhere.
#include <algorithm>

#include "cpu/steps.h"
#include "reference/steps.h"
#include "support.h"

namespace tactic::test {
namespace {

ClusterTask task_of(const Cache& cache, int32_t num_clusters, int32_t iterations = 4) {
  ClusterTask task;
  task.kv = cache.view();
  task.head = cache.spec().num_kv_heads - 1;
  task.num_rows = static_cast<int32_t>(cache.spec().kv_len);
  task.first_row = std::min(4, task.num_rows);
  task.num_clusters = num_clusters;
  task.iterations = iterations;
  task.num_outliers = num_clusters < 8 ? 0 : 2;
  task.seed = 12;
  return task;
}

double stored(const HeadClusters& clusters, int32_t dim, int32_t c, int32_t d) {
  const int8_t residual =
      clusters.residuals[static_cast<size_t>(c / kCentroidBlock * dim + d) * kCentroidBlock + c % kCentroidBlock];
  return clusters.mean[d] + static_cast<double>(clusters.scales[c]) * residual;
}

// Sum over the members of the squared distance to the stored centroid, [num_clusters].
std::vector<double> distances(const Cache& cache, const ClusterTask& task, const HeadClusters& clusters) {
  const int32_t dim = cache.spec().head_dim;
  std::vector<double> sums(clusters.sizes.size());
  size_t member = 0;
  for (size_t c = 0; c < sums.size(); ++c) {
    for (int32_t i = 0; i < clusters.sizes[c]; ++i) {
      const std::vector<float> k = cache.key(task.head, task.row_begin + clusters.members[member++]);
      for (int32_t d = 0; d < dim; ++d)
        sums[c] += std::pow(k[d] - stored(clusters, dim, static_cast<int32_t>(c), d), 2);
    }
  }
  return sums;
}

double total(const std::vector<double>& sums) {
  double sum = 0;
  for (const double value : sums) sum += value;
  return sum;
}

// What must hold whatever the keys.
void expect_sound(const Cache& cache, const ClusterTask& task, const HeadClusters& clusters) {
  const int32_t dim = cache.spec().head_dim;
  std::vector<int> times(static_cast<size_t>(task.num_rows));
  for (const uint16_t row : clusters.members) ++times[row];
  for (const uint16_t row : clusters.not_finite) ++times[row];
  for (int32_t row = 0; row < task.num_rows; ++row) ASSERT_EQ(times[row], row >= task.first_row) << "row " << row;
  const auto padded = static_cast<size_t>(padded_clusters(task.num_clusters));
  ASSERT_EQ(clusters.sizes.size(), padded);
  ASSERT_EQ(clusters.scales.size(), padded);
  ASSERT_EQ(clusters.spreads.size(), padded);
  ASSERT_EQ(clusters.residuals.size(), padded * dim);
  ASSERT_EQ(clusters.mean.size(), static_cast<size_t>(dim));
  const std::vector<double> sums = distances(cache, task, clusters);
  for (size_t c = 0; c < padded; ++c) {
    ASSERT_TRUE(std::isfinite(clusters.scales[c]) && clusters.scales[c] >= 0);
    const double spread = clusters.sizes[c] == 0 ? 0 : sums[c] / clusters.sizes[c] / dim;
    ASSERT_NEAR(clusters.spreads[c], spread, 1e-3 * spread + 1e-9) << "cluster " << c;
  }
}

TEST(Cluster, WellSeparatedKeysGiveTheSameClustersAsTheReference) {
  for (const DType dtype : kAllTypes) {
    for (const int32_t dim : {64, 96, 128}) {
      CacheSpec spec;
      spec.k_dtype = spec.v_dtype = dtype;
      spec.head_dim = spec.v_head_dim = dim;
      spec.kv_len = 300;
      spec.topic_scale = 12;
      spec.layout = dim == 96 ? Layout::kPaged : Layout::kPadded;
      Cache cache(spec);
      Random random(6);
      for (int64_t row = 0; row < 300; ++row) {  // one initial key falls into each run of 15 rows around one topic
        std::vector<float> k = cache.topic(1, static_cast<int32_t>(row / 15));
        for (float& value : k) value += random.normal();
        cache.set_key(1, row, k);
      }
      ClusterTask task = task_of(cache, 20);
      task.first_row = task.num_outliers = 0;
      HeadClusters expected;
      reference::cluster(task, expected);
      for (const int64_t target : highway_targets()) {
        SCOPED_TRACE(text(dtype_name(dtype), " d", dim, " ", target_name(target)));
        const OnTarget on(target);
        HeadClusters clusters;
        cpu::cluster(task, 1, clusters);
        expect_sound(cache, task, clusters);
        EXPECT_EQ(clusters.not_finite, expected.not_finite);
        EXPECT_EQ(clusters.members, expected.members);
        EXPECT_EQ(clusters.sizes, expected.sizes);
        EXPECT_LT(relative_error(clusters.mean, expected.mean), 1e-6);
        EXPECT_LT(relative_error(clusters.scales, expected.scales), 1e-5);
        EXPECT_LT(relative_error(clusters.spreads, expected.spreads), 1e-4);
        size_t differ = 0;
        for (size_t i = 0; i < clusters.residuals.size(); ++i) {
          EXPECT_LE(std::abs(clusters.residuals[i] - expected.residuals[i]), 1);
          differ += clusters.residuals[i] != expected.residuals[i];
        }
        EXPECT_LT(differ, clusters.residuals.size() / 500) << "residuals that rounded the other way";
      }
    }
  }
}

TEST(Cluster, AsGoodAsTheReferenceOnAnyKeys) {
  for (const int32_t dim : {64, 80, 256}) {
    for (const int32_t rows : {127, 1000}) {
      CacheSpec spec;
      spec.k_dtype = spec.v_dtype = dim == 64 ? DType::kQ8_0 : DType::kF16;
      spec.head_dim = spec.v_head_dim = dim;
      spec.kv_len = rows;
      spec.topics = 5;
      spec.topic_scale = 1;
      const Cache cache(spec);
      const ClusterTask task = task_of(cache, rows / 16, 4);
      HeadClusters expected;
      reference::cluster(task, expected);
      expect_sound(cache, task, expected);
      const double inertia = total(distances(cache, task, expected));
      for (const int64_t target : highway_targets()) {
        SCOPED_TRACE(text("d", dim, " rows ", rows, " ", target_name(target)));
        const OnTarget on(target);
        HeadClusters clusters;
        cpu::cluster(task, 1, clusters);
        expect_sound(cache, task, clusters);
        EXPECT_NEAR(total(distances(cache, task, clusters)), inertia, 0.02 * inertia);
      }
    }
  }
}

TEST(Cluster, MoreRoundsAreNotWorse) {
  CacheSpec spec;
  spec.kv_len = 1000;
  const Cache cache(spec);
  double before = HUGE_VAL;
  for (const int32_t iterations : {1, 2, 4, 10}) {
    HeadClusters clusters;
    const ClusterTask task = task_of(cache, 60, iterations);
    cpu::cluster(task, 1, clusters);
    const double inertia = total(distances(cache, task, clusters));
    EXPECT_LE(inertia, before * 1.001) << iterations << " rounds";
    before = inertia;
  }
}

// k-means with empty clusters started anew finds topics that the initial keys missed.
TEST(Cluster, EmptyClustersStartAnew) {
  CacheSpec spec;
  spec.kv_len = 200;
  spec.head_dim = spec.v_head_dim = 64;
  Cache cache(spec);
  Random random(1);
  std::vector<float> x(64);
  for (int64_t row = 0; row < 200; ++row) {  // 180 equal keys, then 20 keys far from them and from each other
    for (float& value : x) value = row < 180 ? 1.0f : 50 * random.normal();
    cache.set_key(1, row, x);
  }
  ClusterTask task = task_of(cache, 16, 6);
  task.num_outliers = 0;
  HeadClusters clusters, expected;
  cpu::cluster(task, 1, clusters);
  reference::cluster(task, expected);
  expect_sound(cache, task, clusters);
  EXPECT_EQ(clusters.sizes, expected.sizes);
  EXPECT_EQ(clusters.members, expected.members);
  EXPECT_GE(std::count_if(clusters.sizes.begin(), clusters.sizes.end(), [](uint16_t size) { return size > 0; }), 14);
}

TEST(Cluster, FewRows) {
  for (const int32_t rows : {0, 1, 4, 5, 6, 9, 17, 31}) {
    for (const int32_t clusters_wanted : {1, 3, 20}) {
      SCOPED_TRACE(text(rows, " rows, clusters ", clusters_wanted));
      CacheSpec spec;
      spec.kv_len = rows;
      const Cache cache(spec);
      const ClusterTask task = task_of(cache, clusters_wanted);
      HeadClusters clusters, expected;
      cpu::cluster(task, 2, clusters);
      reference::cluster(task, expected);
      expect_sound(cache, task, clusters);
      expect_sound(cache, task, expected);
      EXPECT_EQ(clusters.not_finite, expected.not_finite);
    }
  }
}

TEST(Cluster, EqualKeysGiveOneClusterWithoutSpread) {
  CacheSpec spec;
  spec.kv_len = 100;
  Cache cache(spec);
  for (int64_t row = 0; row < 100; ++row) cache.set_key(1, row, std::vector<float>(64, 0.37f));
  HeadClusters clusters;
  const ClusterTask task = task_of(cache, 6);
  cpu::cluster(task, 1, clusters);
  expect_sound(cache, task, clusters);
  EXPECT_EQ(clusters.sizes[0], clusters.members.size());
  EXPECT_EQ(clusters.spreads, std::vector<float>(16));
}

TEST(Cluster, TheShortestKeysAndValuesAreClustersOfTheirOwnAndWhatIsNotFiniteIsInNone) {
  for (const DType dtype : kAllTypes) {
    SCOPED_TRACE(dtype_name(dtype));
    CacheSpec spec;
    spec.k_dtype = spec.v_dtype = dtype;
    spec.kv_len = 200;
    Cache cache(spec);
    const auto scaled = [](std::vector<float> x, float factor) {
      for (float& value : x) value *= factor;
      return x;
    };
    for (const int64_t row : {50, 70}) cache.set_key(1, row, scaled(cache.key(1, row), 0.1f));
    for (const int64_t row : {70, 199}) cache.set_value(1, row, scaled(cache.value(1, row), 0.1f));
    std::vector<float> x = cache.key(1, 120);
    x[63] = std::nanf("");
    cache.set_key(1, 120, x);
    x = cache.value(1, 121);
    x[0] = -HUGE_VALF;
    cache.set_value(1, 121, x);
    const ClusterTask task = task_of(cache, 12);
    HeadClusters clusters, expected;
    cpu::cluster(task, 1, clusters);
    reference::cluster(task, expected);
    for (const HeadClusters* found : {&clusters, &expected}) {
      EXPECT_EQ(found->not_finite, (std::vector<uint16_t>{120, 121}));
      expect_sound(cache, task, *found);
      EXPECT_EQ(std::vector<uint16_t>(found->sizes.begin() + 9, found->sizes.begin() + 12),
                (std::vector<uint16_t>{1, 1, 1}));
      EXPECT_EQ(std::vector<uint16_t>(found->members.end() - 3, found->members.end()),
                (std::vector<uint16_t>{50, 70, 199}));
      for (size_t c = 9; c < 12; ++c) EXPECT_LT(found->spreads[c], found->scales[c] * found->scales[c] / 4 + 1e-12f);
    }
  }
}

TEST(Cluster, AllRowsNotFinite) {
  CacheSpec spec;
  spec.kv_len = 80;
  Cache cache(spec);
  for (int64_t row = 0; row < 80; ++row) cache.poison(row);
  HeadClusters clusters;
  const ClusterTask task = task_of(cache, 5);
  cpu::cluster(task, 1, clusters);
  EXPECT_EQ(clusters.not_finite.size(), 76u);
  expect_sound(cache, task, clusters);
}

TEST(Cluster, SameBitsForAnyThreadsAndLayout) {
  CacheSpec spec;
  spec.kv_len = 1500;
  const Cache cache(spec);
  ClusterTask task = task_of(cache, 90);
  HeadClusters expected;
  cpu::cluster(task, 1, expected);
  for (const Layout layout : {Layout::kTokenMajor, Layout::kHeadMajor, Layout::kPadded, Layout::kPaged}) {
    for (const int32_t threads : {1, 2, 3, 5}) {
      SCOPED_TRACE(text(layout_name(layout), ", threads ", threads));
      spec.layout = layout;
      const Cache other(spec);
      task.kv = other.view();
      HeadClusters clusters;
      cpu::cluster(task, threads, clusters);
      EXPECT_EQ(clusters.members, expected.members);
      EXPECT_EQ(clusters.residuals, expected.residuals);
      EXPECT_EQ(clusters.not_finite, expected.not_finite);
      EXPECT_TRUE(same_bits(clusters.mean, expected.mean));
      EXPECT_TRUE(same_bits(clusters.spreads, expected.spreads));
      EXPECT_TRUE(same_bits(clusters.scales, expected.scales));
    }
  }
}

TEST(Cluster, RowsOutsideTheTaskAreNotRead) {
  CacheSpec spec;
  spec.kv_len = 400;
  Cache cache(spec);
  ClusterTask task = task_of(cache, 10);
  task.row_begin = 100;
  task.num_rows = 200;
  HeadClusters before, after;
  cpu::cluster(task, 1, before);
  for (int64_t row = 0; row < 400; ++row) {
    if (row < 104 || row >= 300) cache.poison(row);
  }
  task.kv = cache.view();
  cpu::cluster(task, 1, after);
  EXPECT_EQ(after.members, before.members);
  EXPECT_TRUE(same_bits(after.spreads, before.spreads));
  EXPECT_TRUE(same_bits(after.mean, before.mean));
}

TEST(Cluster, LargestSegment) {
  CacheSpec spec;
  spec.num_kv_heads = 1;
  spec.head_dim = spec.v_head_dim = 16;
  spec.kv_len = kMaxSegmentRows;
  const Cache cache(spec);
  ClusterTask task = task_of(cache, 64, 1);
  HeadClusters clusters;
  cpu::cluster(task, 2, clusters);
  expect_sound(cache, task, clusters);
}

}  // namespace
}  // namespace tactic::test
