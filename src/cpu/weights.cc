// What is done with the scores of rows once they are there: weights, their sums, the heavy ones among them.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/steps.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/weights.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "cpu/rows-inl.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace tactic::cpu {
namespace HWY_NAMESPACE {

// Highway's Exp turns NaN, and what is beyond its range, into 0.
HWY_INLINE RowVec exp_or_nan(RowTag df, RowVec x) {
  const RowVec beyond = hn::IfThenElse(hn::IsNaN(x), x, hn::Set(df, HUGE_VALF));
  return hn::IfThenElse(hn::Le(x, hn::Set(df, 88.0f)), hn::Exp(df, x), beyond);
}

float exp_weights(const float* scores, int64_t num, float max, float* weights) {
  const RowTag df;
  const auto lanes = static_cast<int64_t>(hn::Lanes(df));
  const RowVec shift = hn::Set(df, max);
  RowVec sums = hn::Zero(df);
  int64_t i = 0;
  for (; i + lanes <= num; i += lanes) {
    const RowVec w = exp_or_nan(df, hn::Sub(hn::LoadU(df, scores + i), shift));
    sums = hn::Add(sums, w);
    hn::StoreU(w, df, weights + i);
  }
  float sum = hn::GetLane(hn::SumOfLanes(df, sums));
  if (i < num) {
    float buffer[16];
    for (int64_t j = 0; j < lanes; ++j) buffer[j] = i + j < num ? scores[i + j] : max;
    hn::StoreU(exp_or_nan(df, hn::Sub(hn::LoadU(df, buffer), shift)), df, buffer);
    for (int64_t j = 0; i + j < num; ++j) sum += weights[i + j] = buffer[j];
  }
  return sum;
}

// As many draws as are summed up while their weights and what is left of their probabilities are at hand. The draw
// before stands in front of them, behind them what adds nothing to differences: the last weight, and nothing left.
constexpr int64_t kDraws = 64;
struct DrawBlock {
  float weights[kDraws + 1 + 8], left[kDraws + 1 + 8];
};

// What the draws [1, 1 + num) of the block add, each with the one before.
void sum_draws(const DrawBlock& block, int64_t num, DrawnSums& sums) {
  const hn::CappedTag<double, 8> dd;
  const hn::Rebind<float, decltype(dd)> df;
  using Vec = hn::Vec<decltype(dd)>;
  const auto lanes = static_cast<int64_t>(hn::Lanes(dd));
  const auto load = [&](const float* from) HWY_ATTR { return hn::PromoteTo(dd, hn::LoadU(df, from)); };
  const Vec half = hn::Set(dd, 0.5);
  Vec differences = hn::Zero(dd), squares = differences, independent = differences, sum = differences;
  for (int64_t i = 0; i < num; i += lanes) {
    const Vec weight = load(block.weights + i + 1), left = load(block.left + i + 1);
    const Vec step = hn::Sub(weight, load(block.weights + i)), lefts = hn::Add(left, load(block.left + i));
    const Vec square = hn::Mul(hn::Mul(half, lefts), hn::Mul(step, step));
    differences = hn::Add(differences, square);
    squares = hn::MulAdd(square, square, squares);
    independent = hn::MulAdd(hn::Mul(weight, weight), left, independent);
    sum = hn::Add(sum, hn::IfThenElseZero(hn::FirstN(dd, static_cast<size_t>(num - i)), weight));
  }
  sums.differences += hn::GetLane(hn::SumOfLanes(dd, differences));
  sums.squares += hn::GetLane(hn::SumOfLanes(dd, squares));
  sums.independent += hn::GetLane(hn::SumOfLanes(dd, independent));
  sums.sum += hn::GetLane(hn::SumOfLanes(dd, sum));
}

float sampled_weights(const float* scores, const float* log_weights, int64_t num, float max, float* weights,
                      DrawnSums& sums) {
  if (num == 0) return 0;
  const RowTag df;
  const auto lanes = static_cast<int64_t>(hn::Lanes(df));
  const RowVec shift = hn::Set(df, max), one = hn::Set(df, 1.0f);
  RowVec largest = hn::Zero(df);
  DrawBlock block;
  DrawnSums own;
  for (int64_t at = 0; at < num; at += kDraws) {
    const int64_t count = std::min(kDraws, num - at);
    for (int64_t i = 0; i < count; i += lanes) {
      RowVec score, log_weight;
      if (i + lanes <= count) {
        score = hn::LoadU(df, scores + at + i);
        log_weight = hn::LoadU(df, log_weights + at + i);
      } else {
        float rest[2][16];
        for (int64_t j = 0; j < lanes; ++j) {
          rest[0][j] = i + j < count ? scores[at + i + j] : -HUGE_VALF;
          rest[1][j] = i + j < count ? log_weights[at + i + j] : 0.0f;
        }
        score = hn::LoadU(df, rest[0]);
        log_weight = hn::LoadU(df, rest[1]);
      }
      const RowVec w = exp_or_nan(df, hn::Sub(hn::Add(score, log_weight), shift));
      largest = hn::Max(largest, w);
      hn::StoreU(w, df, block.weights + 1 + i);
      hn::StoreU(hn::Sub(one, hn::Exp(df, hn::Neg(log_weight))), df, block.left + 1 + i);
    }
    std::copy_n(block.weights + 1, count, weights + at);
    std::fill_n(block.weights + 1 + count, 8, block.weights[count]);
    std::fill_n(block.left + 1 + count, 8, 0.0f);
    if (at == 0) {  // the first has none before it, and differs from itself by nothing
      block.weights[0] = block.weights[1];
      block.left[0] = block.left[1];
      own.first = block.weights[1];
      own.first_left = block.left[1];
    }
    sum_draws(block, count, own);
    own.last = block.weights[0] = block.weights[count];
    own.last_left = block.left[0] = block.left[count];
  }
  own.count = num;
  sums.append(own);
  return hn::GetLane(hn::MaxOfLanes(df, largest));
}

float max_score(const float* scores, int64_t num) {
  const RowTag df;
  const auto lanes = static_cast<int64_t>(hn::Lanes(df));
  RowVec best = hn::Set(df, -HUGE_VALF);
  RowVec poison = hn::Zero(df);  // stays 0 but for NaN; Max alone may lose one
  int64_t i = 0;
  for (; i + lanes <= num; i += lanes) {
    const RowVec s = hn::LoadU(df, scores + i);
    best = hn::Max(best, s);
    poison = hn::Or(poison, hn::IfThenElseZero(hn::IsNaN(s), s));
  }
  float max = hn::GetLane(hn::MaxOfLanes(df, best));
  bool nan = !hn::AllTrue(df, hn::Eq(poison, hn::Zero(df)));
  for (; i < num; ++i) {
    max = scores[i] > max ? scores[i] : max;
    nan = nan || scores[i] != scores[i];
  }
  return nan ? std::numeric_limits<float>::quiet_NaN() : max;
}

float max_used(const float* dots, const float* sizes, int64_t num, float floor) {
  const RowTag df;
  RowVec best = hn::Set(df, floor), poison = hn::Zero(df);  // 0 times what is not finite is NaN
  for (int64_t i = 0; i < num; i += static_cast<int64_t>(hn::Lanes(df))) {
    const RowVec dot = hn::LoadU(df, dots + i);
    const auto used = hn::Ne(hn::LoadU(df, sizes + i), hn::Zero(df));
    best = hn::IfThenElse(used, hn::Max(best, dot), best);
    poison = hn::MulAdd(hn::IfThenElseZero(used, dot), hn::Zero(df), poison);
  }
  const float zero = hn::GetLane(hn::SumOfLanes(df, poison));
  return zero == 0 ? hn::GetLane(hn::MaxOfLanes(df, best)) : std::numeric_limits<float>::quiet_NaN();
}

int64_t heavier(const float* weights, int64_t num, float limit, int32_t* found) {
  const RowTag df;
  const auto lanes = static_cast<int64_t>(hn::Lanes(df));
  const RowVec limits = hn::Set(df, limit);
  int64_t count = 0, i = 0;
  const auto look = [&](int64_t end) {
    for (; i < end; ++i) {
      if (weights[i] > limit) found[count++] = static_cast<int32_t>(i);
    }
  };
  while (i + lanes <= num) {
    if (hn::AllFalse(df, hn::Gt(hn::LoadU(df, weights + i), limits))) {  // nearly always
      i += lanes;
    } else {
      look(i + lanes);
    }
  }
  look(num);
  return count;
}

}  // namespace HWY_NAMESPACE
}  // namespace tactic::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tactic::cpu {

HWY_EXPORT(exp_weights);
HWY_EXPORT(sampled_weights);
HWY_EXPORT(max_score);
HWY_EXPORT(max_used);
HWY_EXPORT(heavier);

float exp_weights(const float* scores, int64_t num, float max, float* weights) {
  return HWY_DYNAMIC_DISPATCH(exp_weights)(scores, num, max, weights);
}

float sampled_weights(const float* scores, const float* log_weights, int64_t num, float max, float* weights,
                      DrawnSums& sums) {
  return HWY_DYNAMIC_DISPATCH(sampled_weights)(scores, log_weights, num, max, weights, sums);
}

float max_score(const float* scores, int64_t num) { return HWY_DYNAMIC_DISPATCH(max_score)(scores, num); }

float max_used(const float* dots, const float* sizes, int64_t num, float floor) {
  return HWY_DYNAMIC_DISPATCH(max_used)(dots, sizes, num, floor);
}

int64_t heavier(const float* weights, int64_t num, float limit, int32_t* found) {
  return HWY_DYNAMIC_DISPATCH(heavier)(weights, num, limit, found);
}

}  // namespace tactic::cpu
#endif
