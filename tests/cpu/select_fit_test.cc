// select_fit: the reference's selection, up to what f32 probes change.
#include <algorithm>

#include "cpu/steps.h"
#include "reference/steps.h"
#include "support.h"

namespace tactic::test {
namespace {

struct Setting {
  Cache cache;
  std::unique_ptr<KvIndex> index;
  std::vector<uint64_t> visible;
  std::vector<float> q;
  RowFilter filter;
  ClusterScores scores;
  std::vector<SoftmaxState> exact;
  int32_t group;

  Setting(const CacheSpec& spec, int32_t group_size, double seen = 1, float sharpness = 0.3f)
      : cache(spec),
        index(build_index(cache)),
        exact(static_cast<size_t>(group_size), {2.0f, 3.0f}),
        group(group_size) {
    visible = random_bits(spec.kv_len, seen, 4);
    q = make_queries(cache, group, 5, sharpness / std::sqrt(static_cast<float>(spec.head_dim)));
    filter = filter_of(*index, spec.kv_len, seen < 1 ? &visible : nullptr);
    reference::score(index->state(), 0, filter, q.data(), group, scores);
  }
  int64_t cpu(float target_mass, HeadSelection& out) const {
    const int32_t dim = cache.spec().head_dim;
    return cpu::select_fit(index->state(), 0, filter, scores, cache.view().k, q.data(), dim, group, exact.data(),
                           target_mass, out);
  }
  int64_t reference(float target_mass, HeadSelection& out) const {
    const int32_t dim = cache.spec().head_dim;
    return reference::select_fit(index->state(), 0, filter, scores, cache.view().k, q.data(), dim, group, exact.data(),
                                 target_mass, out);
  }
};

CacheSpec spec_of(int64_t kv_len, DType dtype = DType::kF16, int32_t dim = 64) {
  CacheSpec spec;
  spec.num_kv_heads = 1;
  spec.kv_len = kv_len;
  spec.k_dtype = dtype;
  spec.head_dim = dim;
  return spec;
}

void expect_alike(const Setting& setting, float target_mass) {
  HeadSelection a, b;
  const int64_t probed = setting.cpu(target_mass, a);
  EXPECT_EQ(probed, setting.reference(target_mass, b));
  // Prefixes of the same orders: one selection contains the other but for the rounding of each head's length.
  std::vector<int32_t> x = a.tokens, y = b.tokens, different;
  std::sort(x.begin(), x.end());
  std::sort(y.begin(), y.end());
  std::set_symmetric_difference(x.begin(), x.end(), y.begin(), y.end(), std::back_inserter(different));
  EXPECT_LE(different.size(), static_cast<size_t>(setting.group) * (1 + y.size() / 1000));
  EXPECT_EQ(a.num_certain, static_cast<int64_t>(a.tokens.size()));
  EXPECT_EQ(a.log_weights, std::vector<float>(a.tokens.size()));
  EXPECT_EQ(a.clusters.size(), a.tokens.size());
  EXPECT_TRUE(std::is_sorted(a.clusters.begin(), a.clusters.end()));
  EXPECT_EQ(std::adjacent_find(x.begin(), x.end()), x.end()) << "a token twice";
}

TEST(SelectFit, SelectsWhatTheReferenceSelects) {
  for (const int64_t kv_len : {256, 270, 513, 1000, 4096, 9999}) {
    for (const int32_t group : {1, 3, 8}) {
      for (const double seen : {1.0, 0.5, 0.04}) {
        const Setting setting(spec_of(kv_len), group, seen);
        for (const float target_mass : {0.01f, 0.5f, 0.9f, 0.98f, 0.9999f}) {
          SCOPED_TRACE(text("kv_len ", kv_len, " g", group, " visible ", seen, " target_mass ", target_mass));
          expect_alike(setting, target_mass);
        }
      }
    }
  }
}

TEST(SelectFit, EveryTypeAndInstructionSet) {
  for (const DType dtype : kAllTypes) {
    for (const int32_t dim : {64, 96, 256}) {
      const Setting setting(spec_of(3000, dtype, dim), 4);
      for (const int64_t target : highway_targets()) {
        SCOPED_TRACE(text(dtype_name(dtype), " d", dim, " ", target_name(target)));
        const OnTarget on(target);
        expect_alike(setting, 0.9f);
      }
    }
  }
}

TEST(SelectFit, SharpFlatAndEqualScores) {
  for (const float sharpness : {0.0f, 0.01f, 1.0f, 10.0f}) {
    const Setting setting(spec_of(3000), 3, 1, sharpness);
    for (const float target_mass : {0.3f, 0.9f}) {
      SCOPED_TRACE(text("sharpness ", sharpness, " target_mass ", target_mass));
      expect_alike(setting, target_mass);
    }
  }
}

TEST(SelectFit, EqualScoresNeedTheirShare) {
  Setting setting(spec_of(3000), 1, 1, 0.0f);  // 2800 or so tokens of score 0, and 3 e^2 of exact rows
  HeadSelection out;
  setting.cpu(0.5f, out);
  const double n = static_cast<double>(reference::readable(setting.index->state(), 0, setting.filter).tokens.size());
  const double certain = 3 * std::exp(2.0);
  EXPECT_NEAR(static_cast<double>(out.tokens.size()), 0.5 * (n + certain) - certain, 3);
}

TEST(SelectFit, TargetOneTakesEverything) {
  const Setting setting(spec_of(3000), 3, 0.8);
  HeadSelection a, b;
  EXPECT_EQ(setting.cpu(1, a), 0);
  setting.reference(1, b);
  EXPECT_EQ(a.tokens, b.tokens);
  EXPECT_EQ(a.tokens, reference::readable(setting.index->state(), 0, setting.filter).tokens);
}

TEST(SelectFit, LargerTargetsNest) {
  const Setting setting(spec_of(6000), 3);
  std::vector<int32_t> before;
  for (const float target_mass : {0.1f, 0.5f, 0.7f, 0.9f, 0.95f, 0.99f, 1.0f}) {
    HeadSelection out;
    setting.cpu(target_mass, out);
    std::vector<int32_t> tokens = out.tokens;
    std::sort(tokens.begin(), tokens.end());
    EXPECT_TRUE(std::includes(tokens.begin(), tokens.end(), before.begin(), before.end()))
        << "target_mass " << target_mass;
    before = tokens;
  }
}

TEST(SelectFit, NothingIsNeededWhenTheExactRowsHoldEverything) {
  Setting setting(spec_of(3000), 2);
  setting.exact.assign(2, {1000.0f, 1.0f});
  HeadSelection out;
  EXPECT_GT(setting.cpu(0.9f, out), 0);
  EXPECT_TRUE(out.tokens.empty());
  setting.exact.assign(2, {});  // and without exact rows it still works
  expect_alike(setting, 0.9f);
}

TEST(SelectFit, AScoreThatIsNotFiniteTakesEverything) {
  Setting setting(spec_of(3000), 1);
  for (const float bad : {std::nanf(""), HUGE_VALF}) {
    std::vector<float> q = setting.q;
    setting.q[3] = bad;
    HeadSelection a, b;
    setting.cpu(0.5f, a);
    setting.reference(0.5f, b);
    EXPECT_EQ(a.tokens, b.tokens);
    EXPECT_EQ(a.tokens.size(), reference::readable(setting.index->state(), 0, setting.filter).tokens.size());
    setting.q = q;
  }
}

TEST(SelectFit, NothingVisibleSelectsNothing) {
  const Setting setting(spec_of(1000), 2, 0);
  HeadSelection out;
  EXPECT_EQ(setting.cpu(0.9f, out), 0);
  EXPECT_TRUE(out.tokens.empty());
}

}  // namespace
}  // namespace tactic::test
