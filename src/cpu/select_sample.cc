// select_sample: inclusion probabilities from the scores of the clusters (docs/method.md 3), and draw: the rows.
#include <algorithm>
#include <cmath>

#include "core/random.h"
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

// Drawn rows: what is known of them without a look at memory.
struct Picks {
  std::vector<int32_t> members, clusters;  // place among the segment's members, cluster number
  std::vector<float> probabilities;
  size_t count = 0;

  void make_room(size_t more) {
    if (count + more <= members.size()) return;
    const size_t size = std::max(2 * members.size(), count + more);
    members.resize(size), clusters.resize(size), probabilities.resize(size);
  }
  void set(int64_t member, int32_t cluster, float probability) {
    members[count] = static_cast<int32_t>(member), clusters[count] = cluster, probabilities[count] = probability;
  }
};

// Calls take(j) for the members j of a cluster of `size` readable rows at which the running sum passes a whole number,
// and returns the new sum. The first one, or one that is not taken, goes without a branch: take(j, 0 or 1).
template <class Fn>
double systematic(double sum, int64_t size, double p, Fn take) {
  const double end = sum + static_cast<double>(size) * p;
  double step = static_cast<double>(static_cast<int64_t>(sum) + 1);
  const auto member = [&] {  // after which the sum reaches `step`
    const double j = (step - sum) / p;
    const auto truncated = static_cast<int64_t>(std::min(j, static_cast<double>(size)));
    return truncated - static_cast<int64_t>(static_cast<double>(truncated) >= j);
  };
  int64_t last = std::clamp(member(), int64_t{0}, size - 1);
  take(last, static_cast<size_t>(step <= end));
  for (step += 1; step <= end && last + 1 < size; step += 1) {
    last = std::clamp(member(), last + 1, size - 1);
    take(last, size_t{1});
  }
  return end;
}

template <class T>
void append(std::vector<T>& to, const T* from, size_t count) {
  to.insert(to.end(), from, from + count);
}

}  // namespace

void draw(const IndexState& index, int32_t head, const RowFilter& filter, const ClusterScores& scores,
          const Inclusion& inclusion, double offset, HeadSelection& out) {
  out.clear();
  Picks sampled;
  std::vector<int32_t> readable;  // places of a cluster's members that the query may read
  int32_t base = 0;
  for (const Segment& segment : index.segments) {
    double sum = segment_offset(offset, segment.row_begin);
    const HeadClusters& clusters = segment.heads[static_cast<size_t>(head)];
    const float* sizes = scores.sizes.data() + base;
    const float* probability = inclusion.probability.data() + base;
    const auto row_begin = static_cast<int32_t>(segment.row_begin);
    const size_t first_pick = sampled.count;
    for (size_t m = 0; m < clusters.members.size(); m += 32) __builtin_prefetch(clusters.members.data() + m);
    int32_t member = 0;
    for (int32_t c = 0; c < segment.num_clusters; ++c) {
      const int32_t first = member, stored = clusters.sizes[static_cast<size_t>(c)];
      member += stored;
      const float p = probability[c];
      if (sizes[c] == 0 || p == 0) continue;
      const auto size = static_cast<int64_t>(sizes[c]);
      const bool all = size == stored;
      if (!all) {
        readable.clear();
        for (int32_t m = first; m < member; ++m) {
          if (filter.reads_indexed(row_begin + clusters.members[static_cast<size_t>(m)])) readable.push_back(m);
        }
      }
      if (p >= 1) {
        const size_t at = out.tokens.size(), count = static_cast<size_t>(size);
        out.tokens.resize(at + count);
        for (size_t m = 0; m < count; ++m) {
          const auto place = all ? static_cast<size_t>(first) + m : static_cast<size_t>(readable[m]);
          out.tokens[at + m] = row_begin + clusters.members[place];
        }
        out.clusters.resize(at + count, base + c);
      } else {
        sampled.make_room(static_cast<size_t>(size) + 1);
        sum = systematic(sum, size, p, [&](int64_t m, size_t taken) {
          sampled.set(all ? first + m : readable[static_cast<size_t>(m)], base + c, p);
          sampled.count += taken;
        });
      }
    }
    for (size_t i = first_pick; i < sampled.count; ++i)
      sampled.members[i] = row_begin + clusters.members[static_cast<size_t>(sampled.members[i])];
    base += padded_clusters(segment.num_clusters);
  }
  out.num_certain = static_cast<int64_t>(out.tokens.size());
  out.log_weights.resize(out.tokens.size(), 0.0f);
  HWY_DYNAMIC_DISPATCH(negative_logs)(sampled.probabilities.data(), sampled.count);
  append(out.tokens, sampled.members.data(), sampled.count);
  append(out.log_weights, sampled.probabilities.data(), sampled.count);
  append(out.clusters, sampled.clusters.data(), sampled.count);
}

}  // namespace tactic::cpu
#endif
