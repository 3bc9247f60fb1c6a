#include "cpu/merge.h"

#include "support.h"

namespace tactic::test {
namespace {

constexpr int32_t kDim = 16;

struct Partial {
  SoftmaxState state;
  std::vector<float> values = std::vector<float>(kDim);
};

// Rows [begin, end) of a fixed set.
Partial part_of(int64_t begin, int64_t end, float shift = 0) {
  Partial part;
  std::vector<double> values(kDim);
  double sum = 0;
  for (int pass = 0; pass < 2; ++pass) {
    Random random(4);
    for (int64_t row = 0; row < end; ++row) {
      const float score = 6 * random.normal() + shift;
      std::vector<float> v(kDim);
      for (float& x : v) x = random.normal();
      if (row < begin) continue;
      if (pass == 0) {
        part.state.max = std::max(part.state.max, score);
      } else {
        const double weight = std::exp(static_cast<double>(score) - part.state.max);
        sum += weight;
        for (int32_t d = 0; d < kDim; ++d) values[d] += weight * v[d];
      }
    }
  }
  part.state.sum = static_cast<float>(sum);
  for (int32_t d = 0; d < kDim; ++d) part.values[d] = static_cast<float>(values[d]);
  return part;
}

Partial merged(Partial a, const Partial& b) {
  cpu::merge(a.state, a.values.data(), b.state, b.values.data(), kDim);
  return a;
}

struct Answer {
  std::vector<float> out = std::vector<float>(kDim);
  float lse = 0;
};

Answer finished(const Partial& part) {
  Answer answer;
  cpu::finish(part.state, part.values.data(), kDim, answer.out.data(), &answer.lse);
  return answer;
}

TEST(Merge, AnySplitGivesTheWhole) {
  const Answer whole = finished(part_of(0, 50));
  for (const int64_t cut : {0, 1, 17, 49, 50}) {
    const Answer two = finished(merged(part_of(0, cut), part_of(cut, 50)));
    EXPECT_LT(relative_error(two.out, whole.out), 1e-5) << "cut at " << cut;
    EXPECT_NEAR(two.lse, whole.lse, 1e-5);
  }
}

TEST(Merge, IsAssociative) {
  const Partial a = part_of(0, 10), b = part_of(10, 35), c = part_of(35, 50);
  const Answer left = finished(merged(merged(a, b), c)), right = finished(merged(a, merged(b, c)));
  EXPECT_LT(relative_error(left.out, right.out), 1e-5);
  EXPECT_NEAR(left.lse, right.lse, 1e-5);
}

TEST(Merge, TheEmptyPartialIsTheIdentity) {
  const Partial a = part_of(0, 10), empty;
  EXPECT_TRUE(same_bits(merged(a, empty).values, a.values));
  EXPECT_TRUE(same_bits(merged(empty, a).values, a.values));
  EXPECT_EQ(merged(empty, a).state.max, a.state.max);
  EXPECT_EQ(merged(empty, a).state.sum, a.state.sum);
  const Answer nothing = finished(merged(empty, empty));
  EXPECT_EQ(nothing.out, std::vector<float>(kDim));
  EXPECT_EQ(nothing.lse, -HUGE_VALF);
}

TEST(Merge, FarApartMaximaDoNotOverflow) {
  const Partial low = part_of(0, 10, -1e4f), high = part_of(10, 20, 1e4f);
  const Answer answer = finished(merged(low, high)), alone = finished(high);
  EXPECT_TRUE(same_bits(answer.out, alone.out));
  EXPECT_EQ(answer.lse, alone.lse);
}

TEST(Merge, NanSpreads) {
  Partial nan = part_of(0, 10);
  nan.state = {std::nanf(""), std::nanf("")};
  for (const Partial& part : {merged(nan, part_of(10, 20)), merged(part_of(10, 20), nan)}) {
    const Answer answer = finished(part);
    EXPECT_TRUE(std::isnan(answer.lse));
    for (const float x : answer.out) EXPECT_TRUE(std::isnan(x));
  }
}

}  // namespace
}  // namespace tactic::test
