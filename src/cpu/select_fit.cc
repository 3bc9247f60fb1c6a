// select_fit: rank, fit a / x + b through two windows, read up to the target mass (arXiv 2502.12216, section 4).
// Constants and edge cases as in the reference; the fitted sum in closed form, and the order sorted only where it is
// sampled.
#include <cmath>

#include "cpu/ranking.h"
#include "cpu/steps.h"

namespace tactic::cpu {

namespace {

// Where the clusters' members lie, so that single clusters can be visited.
class MemberTable {
 public:
  MemberTable(const IndexState& index, int32_t head, const RowFilter& filter, const ClusterScores& scores)
      : head_(head), filter_(filter), scores_(scores) {
    first_.reserve(static_cast<size_t>(scores.num_clusters));
    for (const Segment& segment : index.segments) {
      parts_.push_back({&segment, static_cast<int32_t>(first_.size())});
      uint32_t first = 0;
      for (const uint16_t size : segment.heads[static_cast<size_t>(head)].sizes) {
        first_.push_back(first);
        first += size;
      }
    }
  }

  template <class Fn>
  void visit(int32_t cluster, int64_t first, int64_t count, Fn fn) const {
    const auto after = std::upper_bound(parts_.begin(), parts_.end(), cluster,
                                        [](int32_t c, const Part& part) { return c < part.base; });
    const Part& part = *std::prev(after);
    const HeadClusters& clusters = part.segment->heads[static_cast<size_t>(head_)];
    const int32_t stored = clusters.sizes[static_cast<size_t>(cluster - part.base)];
    const bool all_readable = scores_.sizes[static_cast<size_t>(cluster)] == static_cast<float>(stored);
    for_members(*part.segment, clusters.members.data() + first_[static_cast<size_t>(cluster)], stored, filter_,
                all_readable, first, count, fn);
  }

 private:
  struct Part {
    const Segment* segment;
    int32_t base;
  };
  int32_t head_;
  const RowFilter& filter_;
  const ClusterScores& scores_;
  std::vector<Part> parts_;
  std::vector<uint32_t> first_;  // [num_clusters] in the segment's members
};

// 1 + 1/2 + ... + 1/x, to 1e-9 from x = 8 on.
double harmonic(int64_t x) {
  const double r = 1 / static_cast<double>(x);
  return 0.57721566490153286 - std::log(r) + r / 2 - r * r / 12 + r * r * r * r / 120;
}

// max(0, a / x + b), a >= 0, for x > begin.
struct Tail {
  int64_t begin = 0;
  double a = 0, b = 0;

  double sum_to(int64_t x) const {
    if (b < 0) x = static_cast<int64_t>(std::min(static_cast<double>(x), std::floor(-a / b)));
    return x <= begin ? 0.0 : a * (harmonic(x) - harmonic(begin)) + b * static_cast<double>(x - begin);
  }
};

struct Probe {
  std::vector<int32_t> tokens;
  std::vector<float> weights;  // scores first
};

}  // namespace

int64_t select_fit(const IndexState& index, int32_t head, const RowFilter& filter, const ClusterScores& scores,
                   const RowsView& k, const float* q, int32_t head_dim, int32_t group_size, const SoftmaxState* exact,
                   float target_mass, HeadSelection& out) {
  Ranking ranking(scores);
  std::vector<int32_t> taken(static_cast<size_t>(scores.num_clusters));
  const int64_t n = ranking.num_tokens();
  if (target_mass >= 1 || n == 0) {
    for (size_t c = 0; c < taken.size(); ++c) taken[c] = static_cast<int32_t>(scores.sizes[c]);
    take_members(index, head, filter, scores, taken, out);
    return 0;
  }
  const int64_t peak = n < 256 ? n : std::max<int64_t>(16, n / 50), width = std::max<int64_t>(8, n / 100);
  const int64_t begins[3] = {0, n / 10 - width / 2, n * 6 / 10 - width / 2};
  const int64_t counts[3] = {peak, width, width};
  const int parts = peak < n ? 3 : 1;
  const MemberTable table(index, head, filter, scores);
  RowBits probed;
  probed.resize(index.rows_end);
  Probe probes[3];  // the peak and the two windows
  for (int32_t g = 0; g < group_size; ++g) {
    ranking.rank(scores.dots.data() + static_cast<size_t>(g) * static_cast<size_t>(scores.num_clusters));
    float max = exact[g].max;
    for (int p = 0; p < parts; ++p) {
      Probe& probe = probes[p];
      probe.tokens.clear();
      ranking.visit(begins[p], begins[p] + counts[p], true, [&](int32_t c, int64_t first, int64_t count) {
        table.visit(c, first, count, [&](int32_t row) { probe.tokens.push_back(row); });
      });
      for (const int32_t row : probe.tokens) probed.set(row);
      probe.weights.resize(probe.tokens.size());
      attend_scores(k, head, probe.tokens.data(), counts[p], q + static_cast<size_t>(g) * static_cast<size_t>(head_dim),
                    head_dim, 1, probe.weights.data(), counts[p]);
      const float most = max_score(probe.weights.data(), counts[p]);
      if (!(most <= max)) max = most;  // NaN stays, as nothing is above it
      if (std::isnan(most)) break;
    }
    int64_t wanted = n;
    if (std::isfinite(max)) {
      double sums[3] = {};
      for (int p = 0; p < parts; ++p)
        sums[p] = exp_weights(probes[p].weights.data(), counts[p], max, probes[p].weights.data());
      Tail tail{peak};
      if (parts == 3) {
        const double middle = (static_cast<double>(width) + 1) / 2;
        const double x1 = static_cast<double>(begins[1]) + middle, x2 = static_cast<double>(begins[2]) + middle;
        const double y1 = sums[1] / static_cast<double>(width), y2 = sums[2] / static_cast<double>(width);
        tail.a = y2 > y1 ? 0 : (y1 - y2) / (1 / x1 - 1 / x2);
        tail.b = y2 > y1 ? (y1 + y2) / 2 : y1 - tail.a / x1;
      }
      double mass = exact[g].sum > 0 ? exact[g].sum * std::exp(static_cast<double>(exact[g].max) - max) : 0;
      const double target = target_mass * (mass + sums[0] + tail.sum_to(n));
      for (wanted = 0; wanted < peak && mass < target; ++wanted) mass += probes[0].weights[static_cast<size_t>(wanted)];
      if (wanted == peak && mass < target) {
        int64_t low = peak, high = n;  // the target lies in (low, high]
        while (high - low > 1) {
          const int64_t middle = low + (high - low) / 2;
          (mass + tail.sum_to(middle) < target ? low : high) = middle;
        }
        wanted = high;
      }
    }
    ranking.visit(0, wanted, false, [&](int32_t c, int64_t, int64_t count) {
      int32_t& most = taken[static_cast<size_t>(c)];
      most = std::max(most, static_cast<int32_t>(count));
    });
  }
  take_members(index, head, filter, scores, taken, out);
  return probed.count_range(0, index.rows_end);
}

}  // namespace tactic::cpu
