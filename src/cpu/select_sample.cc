// select_sample: inclusion probabilities from the scores of the clusters (docs/method.md 3), and draw: the rows.
#include <algorithm>
#include <cmath>

#include "cpu/steps.h"

#ifndef TACTIC_CPU_TAIL_SUMS_
#define TACTIC_CPU_TAIL_SUMS_
namespace tactic::cpu {
struct TailSums {
  double first = 0, second = 0;   // sum of size * u and of size * u^2 over clusters with tau * u < 1
};
}  // namespace tactic::cpu
#endif

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/select_sample.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace tactic::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Tag = hn::CappedTag<float, kCentroidBlock>;
using V = hn::Vec<Tag>;

// Half the variance of a cluster's scores, s^2 = spread * |q|^2; beyond s = sqrt(2 ln n) it grows linearly in s, as n
// members cannot average more than their maximum.
HWY_INLINE V growth(Tag df, V s2, V cap2) {
  const V s = hn::Sqrt(s2);
  const V linear = hn::MulSub(hn::Sqrt(cap2), s, hn::Mul(hn::Set(df, 0.5f), cap2));
  return hn::IfThenElse(hn::Le(s2, cap2), hn::Mul(hn::Set(df, 0.5f), s2), linear);
}

// u[c]: root mean square over the heads of the normalized weight of a member of cluster c.
bool rms_weights(const ClusterScores& scores, const SelectParams& params, float* cap2, float* means, float* rms, float* u) {
  const Tag df;
  const size_t lanes = hn::Lanes(df);
  const auto n = static_cast<size_t>(scores.num_clusters);
  for (size_t c = 0; c < n; c += lanes) {
    const V size = hn::LoadU(df, scores.sizes.data() + c);
    hn::StoreU(hn::Mul(hn::Set(df, 2.0f), hn::Log(df, hn::Max(size, hn::Set(df, 2.0f)))), df, cap2 + c);
    hn::StoreU(hn::Zero(df), df, u + c);
  }
  const V beta = hn::Set(df, params.beta);
  for (int32_t g = 0; g < params.group_size; ++g) {
    const float* dots = scores.dots.data() + static_cast<size_t>(g) * n;
    const V norm2 = hn::Set(df, params.q_norms2[g]);
    V best = hn::Set(df, -HUGE_VALF), poison = hn::Zero(df);
    for (size_t c = 0; c < n; c += lanes) {
      const V size = hn::LoadU(df, scores.sizes.data() + c);
      const V dot = hn::LoadU(df, dots + c);
      const V spread = hn::Mul(beta, growth(df, hn::Mul(norm2, hn::LoadU(df, scores.spreads.data() + c)), hn::LoadU(df, cap2 + c)));
      const auto used = hn::Gt(size, hn::Zero(df));
      const V mean = hn::IfThenElse(used, hn::Add(dot, spread), hn::Set(df, -HUGE_VALF));
      hn::StoreU(mean, df, means + c);
      hn::StoreU(spread, df, rms + c);
      best = hn::Max(best, mean);
      poison = hn::Add(poison, hn::IfThenElseZero(used, hn::Mul(dot, hn::Zero(df))));   // NaN if any is not finite
    }
    if (!(hn::GetLane(hn::SumOfLanes(df, poison)) == 0)) return false;
    const float max = std::max(hn::GetLane(hn::MaxOfLanes(df, best)), params.exact[g].max);
    if (!std::isfinite(max)) return false;
    const V shift = hn::Set(df, max);
    V sums = hn::Zero(df);
    for (size_t c = 0; c < n; c += lanes) {
      const V e = hn::Exp(df, hn::Max(hn::Sub(hn::LoadU(df, means + c), shift), hn::Set(df, -80.0f)));
      sums = hn::MulAdd(e, hn::LoadU(df, scores.sizes.data() + c), sums);
      const V r = hn::Mul(e, hn::Exp(df, hn::Min(hn::LoadU(df, rms + c), hn::Set(df, 40.0f))));
      hn::StoreU(r, df, rms + c);
    }
    const float total = hn::GetLane(hn::SumOfLanes(df, sums)) + params.exact[g].sum * std::exp(params.exact[g].max - max);
    const V scale = hn::Set(df, 1.0f / total);
    for (size_t c = 0; c < n; c += lanes) {
      const V r = hn::Mul(hn::LoadU(df, rms + c), scale);
      hn::StoreU(hn::MulAdd(r, r, hn::LoadU(df, u + c)), df, u + c);
    }
  }
  const V scale = hn::Set(df, 1.0f / static_cast<float>(params.group_size));
  for (size_t c = 0; c < n; c += lanes) {
    const auto used = hn::Gt(hn::LoadU(df, scores.sizes.data() + c), hn::Zero(df));
    hn::StoreU(hn::IfThenElseZero(used, hn::Sqrt(hn::Mul(hn::LoadU(df, u + c), scale))), df, u + c);
  }
  return true;
}

TailSums tail_sums(const float* sizes, const float* u, size_t n, float tau) {
  const Tag df;
  const size_t lanes = hn::Lanes(df);
  const V limit = hn::Set(df, 1.0f / tau);
  V first = hn::Zero(df), second = hn::Zero(df);
  for (size_t c = 0; c < n; c += lanes) {
    const V w = hn::LoadU(df, u + c);
    const V part = hn::IfThenElseZero(hn::Lt(w, limit), hn::Mul(w, hn::LoadU(df, sizes + c)));
    first = hn::Add(first, part);
    second = hn::MulAdd(part, w, second);
  }
  return {hn::GetLane(hn::SumOfLanes(df, first)), hn::GetLane(hn::SumOfLanes(df, second))};
}

void scale_capped(const float* u, size_t n, float tau, float* probability) {
  const Tag df;
  for (size_t c = 0; c < n; c += hn::Lanes(df)) {
    hn::StoreU(hn::Min(hn::Set(df, 1.0f), hn::Mul(hn::Set(df, tau), hn::LoadU(df, u + c))), df, probability + c);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace tactic::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tactic::cpu {

HWY_EXPORT(rms_weights);
HWY_EXPORT(tail_sums);
HWY_EXPORT(scale_capped);

void select_sample(const ClusterScores& scores, const SelectParams& params, const DecodeOptions& options, Inclusion& out) {
  const auto n = static_cast<size_t>(scores.num_clusters);
  out.scratch.resize(4 * n);
  out.probability.resize(n);
  float* u = out.scratch.data() + 3 * n;
  out.tau = options.tau;
  out.predicted_variance = 0;
  if (n == 0) return;
  if (!HWY_DYNAMIC_DISPATCH(rms_weights)(scores, params, out.scratch.data(), out.scratch.data() + n, out.scratch.data() + 2 * n, u)) {
    std::fill(out.probability.begin(), out.probability.end(), 1.0f);
    out.tau = HUGE_VALF;
    return;
  }
  const auto sums_at = [&](double tau) { return HWY_DYNAMIC_DISPATCH(tail_sums)(scores.sizes.data(), u, n, static_cast<float>(tau)); };
  double tau = options.tau;
  if (tau <= 0) {
    // V(tau) = first / tau - second over the clusters not read whole. Solving for tau with too many clusters in the sums
    // gives too small a tau, so the iteration rises to the solution from below.
    const double target = static_cast<double>(options.target_error) * options.target_error / std::max(params.variance_ratio, 1e-3f);
    tau = 1e-3;
    for (int i = 0; i < 50; ++i) {
      const TailSums sums = sums_at(tau);
      const double next = sums.first / (target + sums.second);
      if (!(next > tau * 1.005)) break;
      tau = next;
    }
  }
  const TailSums sums = sums_at(tau);
  out.tau = static_cast<float>(tau);
  out.predicted_variance = std::max(0.0, sums.first / tau - sums.second) * params.variance_ratio;
  HWY_DYNAMIC_DISPATCH(scale_capped)(u, n, out.tau, out.probability.data());
}

namespace {

struct Drawer {
  const RowFilter& filter;
  HeadSelection& out;
  double sum;

  // The members j of a cluster of `size` readable rows at which the running sum passes a whole number.
  template <class Fn>
  void sample(int64_t size, double p, Fn take) {
    const double begin = sum, end = sum + static_cast<double>(size) * p;
    sum = end;
    int64_t last = -1;
    for (double step = std::floor(begin) + 1; step <= std::floor(end); ++step) {
      const int64_t j = std::clamp(static_cast<int64_t>(std::ceil((step - begin) / p)) - 1, last + 1, size - 1);
      if (j <= last) break;
      take(last = j);
    }
  }

  void push(int32_t row, float log_weight, int32_t cluster) {
    out.tokens.push_back(row);
    out.log_weights.push_back(log_weight);
    out.clusters.push_back(cluster);
  }

  void draw_cluster(const Segment& segment, const uint16_t* members, int32_t stored, int32_t size, float p, int32_t cluster) {
    const auto row = [&](int64_t m) { return static_cast<int32_t>(segment.row_begin + members[m]); };
    if (size == stored) {
      if (p >= 1) {
        for (int32_t m = 0; m < size; ++m) push(row(m), 0, cluster);
      } else {
        const float log_weight = -std::log(p);
        sample(size, p, [&](int64_t m) { push(row(m), log_weight, cluster); });
      }
      return;
    }
    scratch.clear();
    for (int32_t m = 0; m < stored; ++m) {
      if (filter.reads_indexed(row(m))) scratch.push_back(row(m));
    }
    if (p >= 1) {
      for (const int32_t r : scratch) push(r, 0, cluster);
    } else {
      const float log_weight = -std::log(p);
      sample(static_cast<int64_t>(scratch.size()), p, [&](int64_t m) { push(scratch[static_cast<size_t>(m)], log_weight, cluster); });
    }
  }

  std::vector<int32_t> scratch;
};

}  // namespace

void draw(const IndexState& index, int32_t head, const RowFilter& filter, const ClusterScores& scores,
          const Inclusion& inclusion, double offset, HeadSelection& out) {
  out.clear();
  Drawer drawer{filter, out, offset, {}};
  for (const bool certain : {true, false}) {
    int32_t base = 0;
    for (const Segment& segment : index.segments) {
      const HeadClusters& clusters = segment.heads[static_cast<size_t>(head)];
      const uint16_t* members = clusters.members.data();
      for (int32_t c = 0; c < segment.num_clusters; ++c) {
        const int32_t stored = clusters.sizes[static_cast<size_t>(c)];
        const float size = scores.sizes[static_cast<size_t>(base + c)];
        const float p = inclusion.probability[static_cast<size_t>(base + c)];
        if (size > 0 && p > 0 && (p >= 1) == certain) {
          drawer.draw_cluster(segment, members, stored, static_cast<int32_t>(size), p, base + c);
        }
        members += stored;
      }
      base += padded_clusters(segment.num_clusters);
    }
    if (certain) out.num_certain = static_cast<int64_t>(out.tokens.size());
  }
}

}  // namespace tactic::cpu
#endif
