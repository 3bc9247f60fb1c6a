// Baselines that draw or estimate, each against the formula of its paper.
#include <numbers>

#include "eval/baseline_case.h"

namespace tactic::eval {
namespace {

// u = 1 - (1 - p^k)^l - l p^k (1 - p^k)^(l - 1), p = 1 - angle / pi between the query and the key minus the mean key.
double collision(const Case& c, int32_t h, int64_t row, int k, int l, double* expected_matches = nullptr) {
  const int64_t end = c.prompt_len - 64;
  double dot = 0, qq = 0, kk = 0;
  const std::vector<float> key = c.cache.key(h / 3, row);
  for (size_t d = 0; d < 64; ++d) {
    double mean = 0;
    for (int64_t r = 4; r < end; ++r) mean += c.rows.k(h / 3, r)[d] / static_cast<double>(end - 4);
    const double x = c.q[static_cast<size_t>(h) * 64 + d], y = key[d] - mean;
    dot += x * y, qq += x * x, kk += y * y;
  }
  const double p = 1 - std::acos(dot / std::sqrt(qq * kk)) / std::numbers::pi, hit = std::pow(p, k);
  if (expected_matches != nullptr) *expected_matches = l * hit;
  return 1 - std::pow(1 - hit, l) - l * hit * std::pow(1 - hit, l - 1);
}

TEST(MagicPig, RowsAreReadWithTheProbabilityTheyAreDividedBy) {
  Case c(400, 4);
  constexpr int kSeeds = 150;
  std::vector<double> counts(static_cast<size_t>(c.kv_len()));
  double summary = 0, union_rows = 0;
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    c.layer.seed = seed;
    const Choice choice = c.select("magicpig,k=4,l=12");
    const HeadSelection& head = choice.selection.heads[0];
    EXPECT_EQ(head.num_certain, 68 + 4);
    EXPECT_EQ(choice.sampled(), choice.tokens() - 2 * (68 + 4));
    summary += static_cast<double>(choice.summary_bytes) / kSeeds;
    union_rows += static_cast<double>(choice.tokens() - 2 * (68 + 4)) / kSeeds;
    for (size_t i = 0; i < head.tokens.size(); ++i) {
      const float weight = choice.head_log_weights[1][i];
      if (std::isfinite(weight)) counts[static_cast<size_t>(head.tokens[i])] += 1;
      if (seed == 0 && std::isfinite(weight) && i % 7 == 0) {
        const bool open = head.tokens[i] >= 4 && head.tokens[i] < c.prompt_len - 64;
        EXPECT_NEAR(weight, open ? -std::log(collision(c, 1, head.tokens[i], 4, 12)) : 0.0, 1e-4);
      }
    }
  }
  double deviation = 0, terms = 0, listed = 0;
  for (int64_t row = 4; row < c.prompt_len - 64; row += 3) {
    const double u = collision(c, 1, row, 4, 12), seen = counts[static_cast<size_t>(row)] / kSeeds;
    deviation += std::pow(seen - u, 2) / (u * (1 - u) / kSeeds);
    terms += 1;
  }
  // Planes are drawn anew with each seed, so a row's indicator is a coin of probability u: chi squared.
  EXPECT_NEAR(deviation / terms, 1.0, 5 * std::sqrt(2 / terms));
  for (int32_t h = 0; h < 6; ++h) {
    for (int64_t row = 4; row < c.prompt_len - 64; row += 5) {
      double matches = 0;
      collision(c, h, row, 4, 12, &matches);
      listed += 5 * matches;
    }
  }
  EXPECT_NEAR(summary, 8.0 * 12 * 6 + 4 * listed + 4 * union_rows, 0.1 * summary);  // bounds, lists, norms
  const Choice nothing_open = c.select("magicpig,k=4,l=12,recent=400"), choice = c.select("magicpig,k=4,l=12");
  EXPECT_EQ(nothing_open.summary_bytes, 8 * 12 * 6);
  EXPECT_GT(choice.sampled(), 0);
  EXPECT_EQ(choice.bytes(c.rows), choice.tokens() * 2 * kRowBytes + choice.summary_bytes);
}

TEST(RetroInfer, UnreadClustersEnterWithSizeAndValueSum) {
  Case c;
  const Choice choice = c.select("retroinfer,budget=60,cluster=8,estimate=0.25");
  int64_t centroids = 0, estimated = 0;
  for (int32_t head = 0; head < 2; ++head) {
    const Clusters clusters = cluster_keys(c.layer, head, {4, c.prompt_len - 64}, 8, 10, 8192);
    const auto n = static_cast<size_t>(clusters.size());
    centroids += clusters.size();
    RowSet expected = exact_rows(c, c.prompt_len);
    std::vector<std::vector<double>> dots;
    std::set<size_t> read, zone_union;
    for (int32_t h = head * 3; h < head * 3 + 3; ++h) {
      dots.emplace_back();
      for (const auto& members : clusters.members) {
        double mean = 0;
        for (const int32_t row : members) mean += c.score(h, row) / static_cast<double>(members.size());
        dots.back().push_back(mean);
      }
      size_t rows = 0;
      for (const size_t i : best(dots.back(), n)) {
        if ((rows += clusters.members[i].size()) > 60) break;
        read.insert(i);
        expected.insert(clusters.members[i].begin(), clusters.members[i].end());
      }
    }
    EXPECT_EQ(read_rows(choice, head), expected);
    for (int32_t h = head * 3; h < head * 3 + 3; ++h) {
      double sum = 0;
      std::vector<double> value(64);
      size_t zone = 0;
      for (const size_t i : best(dots[static_cast<size_t>(h % 3)], n)) {
        if (read.count(i) != 0 || zone == static_cast<size_t>(std::lround(0.25 * static_cast<double>(n)))) continue;
        ++zone;
        zone_union.insert(i);
        const double weight = std::exp(dots[static_cast<size_t>(h % 3)][i]);
        sum += weight * static_cast<double>(clusters.members[i].size());
        for (const int32_t row : clusters.members[i]) {
          for (size_t d = 0; d < 64; ++d) value[d] += weight * c.cache.value(head, row)[d];
        }
      }
      const Estimate& estimate = choice.estimates[static_cast<size_t>(h)];
      EXPECT_NEAR(estimate.log_sum, std::log(sum), 1e-4);
      for (size_t d = 0; d < 64; ++d) EXPECT_NEAR(estimate.value[d], value[d] / sum, 1e-4);
    }
    estimated += static_cast<int64_t>(zone_union.size());
  }
  EXPECT_EQ(choice.summary_bytes,
            centroids * kRowBytes + estimated * (kRowBytes + 2) + 2 * (choice.tokens() - 2 * (68 + 20)));
}

TEST(RetroInfer, ClustersOfOneRowAreExact) {
  Case c(300, 4);
  std::vector<float> dense(6 * 64), out(6 * 64);
  attend_dense(*c.step, dense.data());
  attend(*c.step, c.select("retroinfer,budget=0,cluster=1"), out.data());
  EXPECT_LT(test::relative_error(out, dense), 1e-5);
}

TEST(VAttention, TheSampleIsAsLargeAsTheCentralLimitTheoremAsks) {
  Case c(2000, 10, 0.05f);
  const Choice choice = c.select("vattention,epsilon=0.05,delta=0.1,base=0.05,heavy=40");
  constexpr double z = 1.6448536269514722;  // normal quantile at 0.95
  for (int32_t head = 0; head < 2; ++head) {
    const HeadSelection& s = choice.selection.heads[static_cast<size_t>(head)];
    read_rows(choice, head);
    const double n = static_cast<double>(c.kv_len() - s.num_certain);
    const auto base = static_cast<int64_t>(std::llround(0.05 * n));
    double size = static_cast<double>(base);
    for (int32_t h = head * 3; h < head * 3 + 3; ++h) {
      double known = 0, mean = 0, squares = 0;
      for (int64_t i = 0; i < s.num_certain; ++i) known += std::exp(c.score(h, s.tokens[static_cast<size_t>(i)]));
      for (int64_t i = 0; i < base; ++i)
        mean += std::exp(c.score(h, s.tokens[static_cast<size_t>(s.num_certain + i)])) / static_cast<double>(base);
      for (int64_t i = 0; i < base; ++i)
        squares += std::pow(std::exp(c.score(h, s.tokens[static_cast<size_t>(s.num_certain + i)])) - mean, 2);
      const double sigma = std::sqrt(squares / static_cast<double>(base - 1));
      size = std::max(size, std::ceil(std::pow(z * n * sigma / (0.05 * (known + n * mean)), 2)));
    }
    ASSERT_GT(size, static_cast<double>(base));
    ASSERT_LT(size, n);
    EXPECT_NEAR(static_cast<double>(s.tokens.size()) - static_cast<double>(s.num_certain), size, 1);
    EXPECT_NEAR(s.log_weights.back(), std::log(n / size), 0.01);
    EXPECT_EQ(s.log_weights.front(), 0);
  }
}

TEST(VAttention, TheDenominatorIsUnbiasedAndWithinEpsilonAsOftenAsPromised) {
  Case c(2000, 10, 0.05f);
  std::vector<double> truth(6);
  for (int32_t h = 0; h < 6; ++h) {
    for (int64_t row = 0; row < c.kv_len(); ++row)
      truth[static_cast<size_t>(h)] += std::exp(static_cast<double>(c.step->scores(h)[row]));
  }
  constexpr int kSeeds = 200;
  double outside = 0, bias = 0;
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    c.layer.seed = seed;
    const Choice choice = c.select("vattention,epsilon=0.1,delta=0.1,base=0.05,heavy=0");
    for (int32_t h = 0; h < 6; ++h) {
      const HeadSelection& s = choice.selection.heads[static_cast<size_t>(h / 3)];
      double sum = 0;
      ASSERT_LT(s.tokens.size(), static_cast<size_t>(c.kv_len()));
      for (size_t i = 0; i < s.tokens.size(); ++i) sum += std::exp(c.step->scores(h)[s.tokens[i]] + s.log_weights[i]);
      const double error = sum / truth[static_cast<size_t>(h)] - 1;
      bias += error / (6 * kSeeds);
      outside += std::fabs(error) > 0.1 ? 1.0 / (6 * kSeeds) : 0;
    }
  }
  EXPECT_LT(outside, 0.1 + 0.05);  // sigma comes from 100 rows, so that the promise holds only about
  EXPECT_LT(std::fabs(bias), 0.02);
}

}  // namespace
}  // namespace tactic::eval
