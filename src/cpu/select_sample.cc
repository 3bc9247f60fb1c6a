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

// What is drawn of one segment, cluster by cluster; memory kept between steps.
struct SegmentDraw {
  double expected = 0;  // number of draws
  size_t num_readable = 0, num_drawn = 0, num_whole = 0;
  std::vector<double> before;          // [num_clusters] running sum before each
  std::vector<int32_t> firsts;         // [num_clusters] place of the first readable member
  std::vector<int32_t> drawn, places;  // [num_drawn] the cluster of each draw, and which of its readable members
  std::vector<int32_t> whole;          // [num_whole] the clusters that are read whole
  std::vector<int32_t> rows, numbers;  // of those: rows, and the clusters' numbers over all segments
  std::vector<uint16_t> readable;      // members that the query may read, where that is not all of them

  void reserve(size_t num_clusters, size_t num_members) {
    constexpr size_t kVector = 16;  // whole vectors are stored
    before.resize(num_clusters);
    firsts.resize(num_clusters);
    whole.resize(num_clusters);
    drawn.resize(num_members + 1 + kVector);  // the rows' sum of probabilities, rounded up
    places.resize(drawn.size());
    rows.resize(num_members + kVector);
    numbers.resize(rows.size());
  }
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

// Goes through [0, num) clusters of a segment whose running sum begins at `begin`. Written without a branch on how many
// draws a cluster has, or on whether it is read whole, which nothing foresees.
void walk_clusters(const float* sizes, const float* probability, size_t num, double begin, SegmentDraw& out) {
  const hn::CappedTag<int32_t, 4> di;  // more draws of one cluster are rare, and longer stores slower
  const size_t lanes = hn::Lanes(di);
  double* before = out.before.data();
  int32_t *firsts = out.firsts.data(), *drawn = out.drawn.data(), *whole = out.whole.data();
  size_t num_drawn = 0, num_whole = 0;
  int32_t readable = 0;
  double sum = begin, expected = 0;
  auto passed = static_cast<int64_t>(sum);
  for (size_t c = 0; c < num; ++c) {
    const bool is_drawn = probability[c] < 1;
    before[c] = sum;
    firsts[c] = readable;
    readable += static_cast<int32_t>(sizes[c]);
    whole[num_whole] = static_cast<int32_t>(c);
    num_whole += is_drawn ? 0 : 1;
    const double part = double{sizes[c]} * probability[c] * static_cast<double>(is_drawn);
    sum += part;
    expected += part;  // not the difference of the sums, in which the least would vanish
    const auto now = static_cast<int64_t>(sum);
    const auto draws = static_cast<size_t>(now - passed);
    passed = now;
    const auto number = hn::Set(di, static_cast<int32_t>(c));
    hn::StoreU(number, di, drawn + num_drawn);
    for (size_t i = lanes; i < draws; i += lanes) hn::StoreU(number, di, drawn + num_drawn + i);
    num_drawn += draws;
  }
  out.expected = expected;
  out.num_drawn = num_drawn, out.num_whole = num_whole, out.num_readable = static_cast<size_t>(readable);
}

// The rows of the clusters read whole. Returns how many.
size_t whole_rows(const float* sizes, const uint16_t* members, int32_t row_begin, int32_t first_cluster,
                  SegmentDraw& out) {
  const hn::CappedTag<int32_t, 16> di;
  const hn::Rebind<uint16_t, decltype(di)> du16;
  const size_t lanes = hn::Lanes(di);
  const auto begin = hn::Set(di, row_begin);
  size_t n = 0;
  for (size_t w = 0; w < out.num_whole; ++w) {
    const auto c = static_cast<size_t>(out.whole[w]);
    const auto first = static_cast<size_t>(out.firsts[c]), size = static_cast<size_t>(sizes[c]);
    const auto number = hn::Set(di, first_cluster + static_cast<int32_t>(c));
    for (size_t m = 0; m < size; m += lanes) {
      hn::StoreU(number, di, out.numbers.data() + n + m);
      if (first + m + lanes <= out.num_readable) {
        hn::StoreU(hn::Add(hn::PromoteTo(di, hn::LoadU(du16, members + first + m)), begin), di,
                   out.rows.data() + n + m);
      } else {
        for (size_t i = m; i < size; ++i) out.rows[n + i] = row_begin + members[first + i];
        break;
      }
    }
    n += size;
  }
  return n;
}

// Of each draw the member of its cluster after which the running sum reaches the draw's whole number: `first` for the
// first of them. Two draws are more than one member apart, since a probability below 1 is so by 2^-24 or more.
void drawn_members(const float* sizes, const float* probability, double first, SegmentDraw& out) {
  const hn::CappedTag<double, 8> dd;
  const hn::Rebind<float, decltype(dd)> df;
  const hn::Rebind<int32_t, decltype(dd)> di32;
  const hn::Rebind<int64_t, decltype(dd)> di64;
  const size_t lanes = hn::Lanes(dd);
  std::fill_n(out.drawn.data() + out.num_drawn, lanes, 0);  // the last vector's rest
  HWY_ALIGN double steps[8];
  for (size_t j = 0; j < lanes; ++j) steps[j] = first + static_cast<double>(j);
  auto step = hn::Load(dd, steps);
  for (size_t i = 0; i < out.num_drawn; i += lanes, step = hn::Add(step, hn::Set(dd, static_cast<double>(lanes)))) {
    const auto c = hn::LoadU(di32, out.drawn.data() + i);
    const auto size = hn::PromoteTo(dd, hn::GatherIndex(df, sizes, c));
    const auto p = hn::PromoteTo(dd, hn::GatherIndex(df, probability, c));
    const auto at = hn::Div(hn::Sub(step, hn::GatherIndex(dd, out.before.data(), hn::PromoteTo(di64, c))), p);
    const auto down = hn::Trunc(hn::Min(at, size));
    const auto member = hn::Sub(down, hn::IfThenElseZero(hn::Ge(down, at), hn::Set(dd, 1.0)));
    const auto last = hn::Sub(size, hn::Set(dd, 1.0));
    hn::StoreU(hn::DemoteTo(di32, hn::Min(hn::Max(member, hn::Zero(dd)), last)), di32, out.places.data() + i);
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
HWY_EXPORT(walk_clusters);
HWY_EXPORT(whole_rows);
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

void draw(const IndexState& index, int32_t head, const RowFilter& filter, const ClusterScores& scores,
          const Inclusion& inclusion, double offset, HeadSelection& out, Undrawn& undrawn) {
  thread_local SegmentDraw kept;
  thread_local std::vector<int32_t> kept_tokens, kept_clusters;
  thread_local std::vector<float> kept_weights;
  SegmentDraw& part = kept;                                              // looked up once, not at every use
  std::vector<int32_t>&tokens = kept_tokens, &clusters = kept_clusters;  // of the rows drawn
  std::vector<float>& weights = kept_weights;
  const auto fetch_members = [&](size_t s) {
    if (s == index.segments.size()) return;
    const std::vector<uint16_t>& members = index.segments[s].heads[static_cast<size_t>(head)].members;
    fetch_to_l2(members.data(), members.size() * sizeof(uint16_t));
  };
  fetch_members(0);
  out.clear();
  undrawn = {};
  tokens.clear(), clusters.clear(), weights.clear();
  int32_t base = 0;
  for (size_t s = 0; s < index.segments.size(); ++s) {
    const Segment& segment = index.segments[s];
    const HeadClusters& stored = segment.heads[static_cast<size_t>(head)];
    const auto num_clusters = static_cast<size_t>(segment.num_clusters);
    const float* sizes = scores.sizes.data() + base;
    const float* probability = inclusion.probability.data() + base;
    const int32_t first_cluster = std::exchange(base, base + padded_clusters(segment.num_clusters));
    const auto row_begin = static_cast<int32_t>(segment.row_begin);
    fetch_members(s + 1);
    part.reserve(num_clusters, stored.members.size());
    const double sum = segment_offset(offset, segment.row_begin);
    HWY_DYNAMIC_DISPATCH(walk_clusters)(sizes, probability, num_clusters, sum, part);
    undrawn.add(part.expected);
    if (part.num_readable == 0) continue;
    const uint16_t* members = stored.members.data();
    if (part.num_readable < stored.members.size()) {
      part.readable.clear();
      for (const uint16_t member : stored.members) {
        if (filter.reads_indexed(row_begin + member)) part.readable.push_back(member);
      }
      members = part.readable.data();
    }
    const size_t rows = HWY_DYNAMIC_DISPATCH(whole_rows)(sizes, members, row_begin, first_cluster, part);
    out.tokens.insert(out.tokens.end(), part.rows.data(), part.rows.data() + rows);
    out.clusters.insert(out.clusters.end(), part.numbers.data(), part.numbers.data() + rows);
    HWY_DYNAMIC_DISPATCH(drawn_members)(sizes, probability, std::floor(sum) + 1, part);
    const size_t at = tokens.size();
    tokens.resize(at + part.num_drawn), clusters.resize(tokens.size()), weights.resize(tokens.size());
    for (size_t i = 0; i < part.num_drawn; ++i) {
      const int32_t c = part.drawn[i];
      tokens[at + i] = row_begin + members[part.firsts[static_cast<size_t>(c)] + part.places[i]];
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
