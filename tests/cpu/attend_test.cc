// attend_scores and attend_values against doubles, on every instruction set of the machine.
#include "cpu/steps.h"
#include "cpu/task.h"
#include "reference/steps.h"
#include "support.h"

namespace tactic::test {
namespace {

struct Case {
  DType dtype;
  int32_t dim, group;
  Layout layout;
};

std::string case_name(const testing::TestParamInfo<Case>& info) {
  const Case& c = info.param;
  return text(dtype_name(c.dtype), "_d", c.dim, "_g", c.group, "_", layout_name(c.layout));
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  size_t turn = 0;
  constexpr Layout kLayouts[] = {Layout::kPadded, Layout::kPaged, Layout::kHeadMajor, Layout::kTokenMajor};
  for (const DType dtype : kAllTypes) {
    for (const int32_t dim : {64, 80, 96, 128, 256}) {
      if (!fits(dtype, dim)) continue;
      for (const int32_t group : {1, 3, 4, 8}) cases.push_back({dtype, dim, group, kLayouts[turn++ % 4]});
    }
  }
  for (const int32_t group : {2, 5, 6, 7, 9, 16}) cases.push_back({DType::kF16, 64, group, Layout::kPadded});
  for (const int32_t dim : {16, 32, 48, 112, 576, 1024}) {
    for (const DType dtype : kAllTypes) {
      if (fits(dtype, dim)) cases.push_back({dtype, dim, 3, Layout::kPadded});
    }
  }
  return cases;
}

class AttendRows : public testing::TestWithParam<Case> {
 protected:
  static constexpr int64_t kRows = 260;

  CacheSpec spec() const {
    CacheSpec spec;
    spec.k_dtype = spec.v_dtype = GetParam().dtype;
    spec.head_dim = spec.v_head_dim = GetParam().dim;
    spec.layout = GetParam().layout;
    spec.kv_len = kRows;
    return spec;
  }

  // `count` different rows in random order; all the others are poisoned.
  static std::vector<int32_t> choose(Cache& cache, int64_t count) {
    std::vector<int32_t> rows(kRows);
    for (int32_t i = 0; i < kRows; ++i) rows[i] = i;
    Random random(static_cast<uint64_t>(count) + 17);
    for (int64_t i = 0; i < count; ++i) std::swap(rows[i], rows[i + random.below(kRows - i)]);
    for (int64_t i = count; i < kRows; ++i) cache.poison(rows[i]);
    rows.resize(static_cast<size_t>(count));
    return rows;
  }
};

constexpr int64_t kCounts[] = {127, 33, 31, 16, 5, 4, 3, 2, 1, 0};  // falling: more and more rows become poison

TEST_P(AttendRows, ScoresAreDotProducts) {
  Cache cache(spec());
  const int32_t group = GetParam().group, dim = GetParam().dim;
  const std::vector<float> q = make_queries(cache, group, 5);
  const int32_t head = 1;
  const float* queries = q.data() + static_cast<size_t>(head) * group * dim;
  for (const int64_t count : kCounts) {
    Cache left = cache;
    const std::vector<int32_t> rows = choose(left, count);
    const KvView kv = left.view();
    for (const int64_t target : highway_targets()) {
      SCOPED_TRACE(text(target_name(target), ", rows ", count));
      const OnTarget on(target);
      const int64_t stride = count + 3;
      std::vector<float> scores(static_cast<size_t>(group * stride), -77.0f);
      cpu::attend_scores(kv.k, head, rows.data(), count, queries, dim, group, scores.data(), stride,
                         count % 2 == 0 ? &kv.v : nullptr, dim);  // V rows are fetched with them or not
      for (int32_t g = 0; g < group; ++g) {
        for (int64_t i = 0; i < stride; ++i) {
          const float score = scores[g * stride + i];
          if (i >= count) {
            ASSERT_EQ(score, -77.0f) << "wrote past the end";
            continue;
          }
          double size = 0;
          const std::vector<float> k = left.key(head, rows[i]);
          for (int32_t d = 0; d < dim; ++d) size += std::fabs(queries[g * dim + d] * k[d]);
          ASSERT_NEAR(score, reference::dot_row(kv.k, head, rows[i], queries + g * dim, dim), 1e-6 * size)
              << "query " << g << " row " << rows[i];
        }
      }
    }
  }
}

TEST_P(AttendRows, ValuesAreWeightedSums) {
  Cache cache(spec());
  const int32_t group = GetParam().group, dim = GetParam().dim, head = 1;
  for (const int64_t count : kCounts) {
    Cache left = cache;
    const std::vector<int32_t> rows = choose(left, count);
    const KvView kv = left.view();
    const int64_t stride = count + 2;
    Random random(9);
    std::vector<float> weights(static_cast<size_t>(group * stride), std::nanf(""));
    for (int32_t g = 0; g < group; ++g) {
      for (int64_t i = 0; i < count; ++i) weights[g * stride + i] = static_cast<float>(random.uniform());
    }
    std::vector<double> expected(static_cast<size_t>(group) * dim), size = expected;
    for (int64_t i = 0; i < count; ++i) {
      const std::vector<float> v = left.value(head, rows[i]);
      for (int32_t g = 0; g < group; ++g) {
        for (int32_t d = 0; d < dim; ++d) {
          const double part = static_cast<double>(weights[g * stride + i]) * v[d];
          expected[g * dim + d] += part;
          size[g * dim + d] += std::fabs(part);
        }
      }
    }
    for (const int64_t target : highway_targets()) {
      SCOPED_TRACE(text(target_name(target), ", rows ", count));
      const OnTarget on(target);
      std::vector<float> out(static_cast<size_t>(group) * dim, 0.5f);
      cpu::attend_values(kv.v, head, rows.data(), count, weights.data(), stride, dim, group, out.data());
      for (size_t i = 0; i < out.size(); ++i)
        ASSERT_NEAR(out[i], 0.5 + expected[i], 1e-6 * (1 + size[i])) << "element " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, AttendRows, testing::ValuesIn(all_cases()), case_name);

}  // namespace
}  // namespace tactic::test
