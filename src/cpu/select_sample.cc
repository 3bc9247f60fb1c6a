// select_sample: inclusion probabilities from the scores of the clusters (docs/method.md 3), and draw: the rows.
#include <algorithm>
#include <cmath>
#include <utility>

#include "core/random.h"
#include "cpu/prefetch.h"
#include "cpu/steps.h"

#ifndef TACTIC_CPU_TAIL_SUMS_
#define TACTIC_CPU_TAIL_SUMS_
namespace tactic::cpu {
struct TailSums {
  double first = 0, second = 0;  // sum of size * w^2 / u and of size * w^2 over clusters with tau * u < 1
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

// w2[c]: mean over the heads of the squared normalized weight of a member of cluster c; u[c]: the root of that mean
// with each head's weights times its sink_factor.
bool rms_weights(const ClusterScores& scores, const SelectParams& params, float* cap2, float* means, float* rms,
                 float* u, float* w2, float* log_totals, float* sink_factors) {
  const Tag df;
  const size_t lanes = hn::Lanes(df);
  const auto n = static_cast<size_t>(scores.num_clusters);
  for (size_t c = 0; c < n; c += lanes) {
    const V size = hn::LoadU(df, scores.sizes.data() + c);
    hn::StoreU(hn::Mul(hn::Set(df, 2.0f), hn::Log(df, hn::Max(size, hn::Set(df, 2.0f)))), df, cap2 + c);
    hn::StoreU(hn::Zero(df), df, u + c);
    hn::StoreU(hn::Zero(df), df, w2 + c);
  }
  const V beta = hn::Set(df, params.beta);
  for (int32_t g = 0; g < params.group_size; ++g) {
    const float* dots = scores.dots.data() + static_cast<size_t>(g) * n;
    const V norm2 = hn::Set(df, params.q_norms2[g]);
    V best = hn::Set(df, -HUGE_VALF), poison = hn::Zero(df);
    for (size_t c = 0; c < n; c += lanes) {
      const V size = hn::LoadU(df, scores.sizes.data() + c);
      const V dot = hn::LoadU(df, dots + c);
      const V spread =
          hn::Mul(beta, growth(df, hn::Mul(norm2, hn::LoadU(df, scores.spreads.data() + c)), hn::LoadU(df, cap2 + c)));
      const auto used = hn::Gt(size, hn::Zero(df));
      const V mean = hn::IfThenElse(used, hn::Add(dot, spread), hn::Set(df, -HUGE_VALF));
      hn::StoreU(mean, df, means + c);
      hn::StoreU(spread, df, rms + c);
      best = hn::Max(best, mean);
      poison = hn::Add(poison, hn::IfThenElseZero(used, hn::Mul(mean, hn::Zero(df))));  // NaN if any is not finite
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
    float clustered = hn::GetLane(hn::SumOfLanes(df, sums));
    for (const int32_t c : params.sink_clusters) clustered -= std::exp(std::max(means[c] - max, -80.0f));
    const float total = std::max(clustered, 0.0f) + params.exact[g].sum * std::exp(params.exact[g].max - max);
    if (!(total > 0)) return false;  // nothing is left of the sinks' clusters, and exact rows are beyond the range
    log_totals[g] = max + std::log(total);
    const float share = params.sinks == nullptr ? 0.0f : params.sinks[g] * std::exp(params.exact[g].max - max) / total;
    sink_factors[g] = sink_factor(share);
    const V scale = hn::Set(df, 1.0f / total), factor = hn::Set(df, sink_factors[g]);
    for (size_t c = 0; c < n; c += lanes) {
      const V w = hn::Mul(hn::LoadU(df, rms + c), scale), r = hn::Mul(w, factor);
      hn::StoreU(hn::MulAdd(w, w, hn::LoadU(df, w2 + c)), df, w2 + c);
      hn::StoreU(hn::MulAdd(r, r, hn::LoadU(df, u + c)), df, u + c);
    }
  }
  const V scale = hn::Set(df, 1.0f / static_cast<float>(params.group_size));
  for (size_t c = 0; c < n; c += lanes) {
    const auto used = hn::Gt(hn::LoadU(df, scores.sizes.data() + c), hn::Zero(df));
    hn::StoreU(hn::IfThenElseZero(used, hn::Sqrt(hn::Mul(hn::LoadU(df, u + c), scale))), df, u + c);
    hn::StoreU(hn::Mul(hn::LoadU(df, w2 + c), scale), df, w2 + c);
  }
  return true;
}

TailSums tail_sums(const float* sizes, const float* u, const float* w2, size_t n, float tau) {
  const Tag df;
  const size_t lanes = hn::Lanes(df);
  const V limit = hn::Set(df, 1.0f / tau);
  V first = hn::Zero(df), second = hn::Zero(df);
  for (size_t c = 0; c < n; c += lanes) {
    const V x = hn::LoadU(df, u + c);
    const auto drawn = hn::And(hn::Lt(x, limit), hn::Gt(x, hn::Zero(df)));
    const V part = hn::Mul(hn::LoadU(df, w2 + c), hn::LoadU(df, sizes + c));
    first = hn::Add(first, hn::IfThenElseZero(drawn, hn::Div(part, x)));
    second = hn::Add(second, hn::IfThenElseZero(drawn, part));
  }
  return {hn::GetLane(hn::SumOfLanes(df, first)), hn::GetLane(hn::SumOfLanes(df, second))};
}

void scale_capped(const float* u, size_t n, float tau, float* probability) {
  const Tag df;
  for (size_t c = 0; c < n; c += hn::Lanes(df)) {
    hn::StoreU(hn::Min(hn::Set(df, 1.0f), hn::Mul(hn::Set(df, tau), hn::LoadU(df, u + c))), df, probability + c);
  }
}

// The cluster of each draw from [0, num) clusters of a segment whose running sum begins at `sum`, and the sum before
// each cluster. Returns the number of draws; `clusters` has room for 16 more. Written without a branch on how many
// draws a cluster has, which nothing foresees.
size_t drawn_clusters(const float* sizes, const float* probability, size_t num, double sum, double* before,
                      int32_t* clusters) {
  const hn::CappedTag<int32_t, 16> di;
  const size_t lanes = hn::Lanes(di);
  size_t n = 0;
  auto whole = static_cast<int64_t>(sum);
  for (size_t c = 0; c < num; ++c) {
    before[c] = sum;
    sum += probability[c] < 1 ? double{sizes[c]} * probability[c] : 0.0;
    const auto passed = static_cast<int64_t>(sum);
    const auto draws = static_cast<size_t>(passed - whole);
    whole = passed;
    const auto number = hn::Set(di, static_cast<int32_t>(c));
    hn::StoreU(number, di, clusters + n);
    for (size_t i = lanes; i < draws; i += lanes) hn::StoreU(number, di, clusters + n + i);
    n += draws;
  }
  return n;
}

// Of each draw the member of its cluster after which the running sum reaches the draw's whole number: `first` for the
// first of them. Two draws are more than one member apart, since a probability below 1 is so by 2^-24 or more.
void drawn_members(const float* sizes, const float* probability, const double* before, const int32_t* clusters,
                   size_t n, double first, int32_t* members) {
  const hn::CappedTag<double, 8> dd;
  const hn::Rebind<float, decltype(dd)> df;
  const hn::Rebind<int32_t, decltype(dd)> di32;
  const hn::Rebind<int64_t, decltype(dd)> di64;
  const size_t lanes = hn::Lanes(dd);
  HWY_ALIGN double steps[8];
  for (size_t j = 0; j < lanes; ++j) steps[j] = first + static_cast<double>(j);
  auto step = hn::Load(dd, steps);
  for (size_t i = 0; i < n; i += lanes, step = hn::Add(step, hn::Set(dd, static_cast<double>(lanes)))) {
    const auto c = hn::LoadU(di32, clusters + i);
    const auto size = hn::PromoteTo(dd, hn::GatherIndex(df, sizes, c));
    const auto p = hn::PromoteTo(dd, hn::GatherIndex(df, probability, c));
    const auto at = hn::Div(hn::Sub(step, hn::GatherIndex(dd, before, hn::PromoteTo(di64, c))), p);
    const auto down = hn::Trunc(hn::Min(at, size));
    const auto member = hn::Sub(down, hn::IfThenElseZero(hn::Ge(down, at), hn::Set(dd, 1.0)));
    const auto last = hn::Sub(size, hn::Set(dd, 1.0));
    hn::StoreU(hn::DemoteTo(di32, hn::Min(hn::Max(member, hn::Zero(dd)), last)), di32, members + i);
  }
}

// x = -ln(x) for x in (0, 1]; 1 gives exactly 0.
void negative_logs(float* x, size_t n) {
  const Tag df;
  const size_t lanes = hn::Lanes(df);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::StoreU(hn::Neg(hn::Log(df, hn::LoadU(df, x + i))), df, x + i);
  for (; i < n; ++i) x[i] = -std::log(x[i]);
  for (i = 0; i < n; ++i) x[i] = x[i] > 0 ? x[i] : 0.0f;
}

}  // namespace HWY_NAMESPACE
}  // namespace tactic::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tactic::cpu {

HWY_EXPORT(rms_weights);
HWY_EXPORT(tail_sums);
HWY_EXPORT(scale_capped);
HWY_EXPORT(drawn_clusters);
HWY_EXPORT(drawn_members);
HWY_EXPORT(negative_logs);

void select_sample(const ClusterScores& scores, const SelectParams& params, const DecodeOptions& options,
                   Inclusion& out) {
  const auto n = static_cast<size_t>(scores.num_clusters);
  out.scratch.resize(5 * n);
  out.probability.resize(n);
  out.log_totals.assign(static_cast<size_t>(params.group_size), HUGE_VALF);
  out.sink_factors.assign(static_cast<size_t>(params.group_size), 1.0f);
  float *u = out.scratch.data() + 3 * n, *w2 = u + n;
  out.tau = tau_of(options, params);
  out.predicted_variance = 0;
  if (n == 0) return;
  if (!HWY_DYNAMIC_DISPATCH(rms_weights)(scores, params, out.scratch.data(), out.scratch.data() + n,
                                         out.scratch.data() + 2 * n, u, w2, out.log_totals.data(),
                                         out.sink_factors.data())) {
    std::fill(out.probability.begin(), out.probability.end(), 1.0f);
    out.tau = HUGE_VALF;
    return;
  }
  const TailSums sums = HWY_DYNAMIC_DISPATCH(tail_sums)(scores.sizes.data(), u, w2, n, out.tau);
  out.predicted_variance = std::max(0.0, sums.first / out.tau - sums.second) * params.variance_ratio;
  HWY_DYNAMIC_DISPATCH(scale_capped)(u, n, out.tau, out.probability.data());
}

namespace {

// Memory for the draws of one segment, kept between steps.
struct Draws {
  std::vector<double> before;              // [num_clusters] running sum before each
  std::vector<int32_t> firsts;             // [num_clusters] place of the first readable member
  std::vector<uint16_t> readable;          // members that the query may read, where that is not all of them
  std::vector<int32_t> clusters, members;  // [draws] the cluster's number, and which of its readable members
  size_t count = 0;

  void draw(const float* sizes, const float* probability, size_t num_clusters, size_t num_rows, double sum) {
    before.resize(num_clusters);
    clusters.resize(num_rows + 17);  // one more than the rows' sum of probabilities, and a vector
    members.resize(clusters.size());
    count = HWY_DYNAMIC_DISPATCH(drawn_clusters)(sizes, probability, num_clusters, sum, before.data(), clusters.data());
    std::fill_n(clusters.begin() + static_cast<std::ptrdiff_t>(count), 8, 0);  // the last vector's rest
    HWY_DYNAMIC_DISPATCH(drawn_members)
    (sizes, probability, before.data(), clusters.data(), count, std::floor(sum) + 1, members.data());
  }
};

}  // namespace

void draw(const IndexState& index, int32_t head, const RowFilter& filter, const ClusterScores& scores,
          const Inclusion& inclusion, double offset, HeadSelection& out) {
  thread_local Draws draws;
  thread_local std::vector<int32_t> tokens, clusters;  // of the rows drawn
  thread_local std::vector<float> weights;
  out.clear();
  tokens.clear(), clusters.clear(), weights.clear();
  int32_t base = 0;
  for (const Segment& segment : index.segments) {
    const HeadClusters& stored = segment.heads[static_cast<size_t>(head)];
    const auto num_clusters = static_cast<size_t>(segment.num_clusters);
    const float* sizes = scores.sizes.data() + base;
    const float* probability = inclusion.probability.data() + base;
    const int32_t first_cluster = std::exchange(base, base + padded_clusters(segment.num_clusters));
    const auto row_begin = static_cast<int32_t>(segment.row_begin);
    fetch_to_l2(stored.members.data(), stored.members.size() * sizeof(uint16_t));
    draws.firsts.resize(num_clusters);
    bool all = true;  // the query may read every member
    int32_t readable = 0;
    for (int32_t c = 0; c < segment.num_clusters; ++c) {
      draws.firsts[static_cast<size_t>(c)] = readable;
      const auto size = static_cast<int32_t>(sizes[c]);
      all &= size == stored.sizes[static_cast<size_t>(c)];
      readable += size;
    }
    if (readable == 0) continue;
    const uint16_t* members = stored.members.data();
    if (!all) {
      draws.readable.clear();
      for (const uint16_t member : stored.members) {
        if (filter.reads_indexed(row_begin + member)) draws.readable.push_back(member);
      }
      members = draws.readable.data();
    }
    for (int32_t c = 0; c < segment.num_clusters; ++c) {
      if (probability[c] < 1) continue;
      const size_t at = out.tokens.size(), size = static_cast<size_t>(sizes[c]);
      const uint16_t* from = members + draws.firsts[static_cast<size_t>(c)];
      out.tokens.resize(at + size);
      for (size_t m = 0; m < size; ++m) out.tokens[at + m] = row_begin + from[m];
      out.clusters.resize(at + size, first_cluster + c);
    }
    draws.draw(sizes, probability, num_clusters, stored.members.size(), segment_offset(offset, segment.row_begin));
    const size_t at = tokens.size();
    tokens.resize(at + draws.count), clusters.resize(at + draws.count), weights.resize(at + draws.count);
    for (size_t i = 0; i < draws.count; ++i) {
      const int32_t c = draws.clusters[i];
      tokens[at + i] = row_begin + members[draws.firsts[static_cast<size_t>(c)] + draws.members[i]];
      clusters[at + i] = first_cluster + c;
      weights[at + i] = probability[c];
    }
  }
  HWY_DYNAMIC_DISPATCH(negative_logs)(weights.data(), weights.size());
  out.num_certain = static_cast<int64_t>(out.tokens.size());
  out.log_weights.resize(out.tokens.size(), 0.0f);
  out.tokens.insert(out.tokens.end(), tokens.begin(), tokens.end());
  out.log_weights.insert(out.log_weights.end(), weights.begin(), weights.end());
  out.clusters.insert(out.clusters.end(), clusters.begin(), clusters.end());
}

}  // namespace tactic::cpu
#endif
