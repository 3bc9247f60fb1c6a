// select_sample and draw: inclusion probabilities, and rows that come with them.
#include <algorithm>
#include <map>

#include "cpu/steps.h"
#include "reference/steps.h"
#include "support.h"

namespace tactic::test {
namespace {

struct Setting {
  Cache cache;
  std::unique_ptr<KvIndex> index;
  std::vector<uint64_t> visible;
  std::vector<float> q, q_norms2;
  RowFilter filter;
  ClusterScores scores;
  std::vector<SoftmaxState> exact;
  SelectParams params;

  explicit Setting(int64_t kv_len, int32_t group = 3, double seen = 1, float sharpness = 0.2f)
      : cache(spec_of(kv_len)), index(build_index(cache)), exact(static_cast<size_t>(group), {3.0f, 4.0f}) {
    visible = random_bits(kv_len, seen, 4);
    q = make_queries(cache, group, 5, sharpness / 8);
    for (int32_t g = 0; g < group; ++g) {
      q_norms2.push_back(0);
      for (int32_t d = 0; d < 64; ++d) q_norms2[g] += q[g * 64 + d] * q[g * 64 + d];
    }
    filter = filter_of(*index, kv_len, seen < 1 ? &visible : nullptr);
    reference::score(index->state(), 0, filter, q.data(), group, scores);
    params = {group, q_norms2.data(), exact.data(), 1.0f, 1.0f};
  }
  static CacheSpec spec_of(int64_t kv_len) {
    CacheSpec spec;
    spec.num_kv_heads = 1;
    spec.kv_len = kv_len;
    return spec;
  }
  Inclusion cpu(const DecodeOptions& options) const {
    Inclusion out;
    cpu::select_sample(scores, params, options, out);
    return out;
  }
  Inclusion reference(const DecodeOptions& options) const {
    Inclusion out;
    reference::select_sample(scores, params, options, out);
    return out;
  }
  HeadSelection cpu_draw(const Inclusion& inclusion, double offset) const {
    HeadSelection out;
    Undrawn undrawn;
    cpu::draw(index->state(), 0, filter, scores, inclusion, offset, out, undrawn);
    std::vector<Reading> readings(inclusion.probability.size());
    for (size_t c = 0; c < readings.size(); ++c)
      readings[c] = inclusion.probability[c] < 1 ? Reading::kDrawn : Reading::kWhole;
    const Undrawn expected = undrawn_rows(index->state(), scores.sizes, inclusion.probability, readings, false);
    EXPECT_EQ(undrawn.any, expected.any);
    EXPECT_NEAR(undrawn.count_variance, expected.count_variance, 1e-9);
    return out;
  }
  HeadSelection reference_draw(const Inclusion& inclusion, double offset) const {
    HeadSelection out;
    reference::draw(index->state(), 0, filter, scores, inclusion, offset, out);
    return out;
  }
  double num_segments() const { return static_cast<double>(index->state().segments.size()); }
  double expected_tokens(const Inclusion& inclusion) const {
    double sum = 0;
    for (int32_t c = 0; c < scores.num_clusters; ++c)
      sum += scores.sizes[c] > 0 ? scores.sizes[c] * inclusion.probability[c] : 0;
    return sum;
  }
};

TEST(SelectSample, ProbabilitiesOfTheReference) {
  for (const int64_t kv_len : {256, 1000, 9999}) {
    for (const int32_t group : {1, 3, 8}) {
      for (const double seen : {1.0, 0.3}) {
        Setting setting(kv_len, group, seen);
        const std::vector<float> sinks{0.0f, 1.0f, 3.99f, 4.0f, 2.0f, 0.5f, 3.0f, 3.5f};
        setting.params.sinks = sinks.data();
        for (const float beta : {0.0f, 0.75f, 1.5f}) {
          for (const float tau : {1.0f, 30.0f, 1000.0f, 1e9f}) {
            for (const int64_t target : highway_targets()) {
              SCOPED_TRACE(text("kv_len ", kv_len, " g", group, " visible ", seen, " beta ", beta, " tau ", tau, " ",
                                target_name(target)));
              const OnTarget on(target);
              setting.params.beta = beta;
              setting.params.variance_ratio = 1.7f;
              const Inclusion a = setting.cpu({.tau = tau}), b = setting.reference({.tau = tau});
              EXPECT_EQ(a.tau, tau);
              ASSERT_EQ(a.probability.size(), b.probability.size());
              for (int32_t c = 0; c < setting.scores.num_clusters; ++c) {
                if (setting.scores.sizes[c] == 0) continue;
                ASSERT_GE(a.probability[c], 0);
                ASSERT_LE(a.probability[c], 1);
                ASSERT_NEAR(a.probability[c], b.probability[c], 1e-4 * b.probability[c] + 1e-30) << "cluster " << c;
              }
              EXPECT_NEAR(a.predicted_variance, b.predicted_variance, 1e-3 * b.predicted_variance + 1e-6);
            }
          }
        }
      }
    }
  }
}

// A head with 99% of its weights on sinks has an output of a hundredth, and reads as if tau were ten times its value.
TEST(SelectSample, ASinkRaisesTheProbabilitiesOfItsHead) {
  Setting setting(9999, 1);
  setting.exact = {{12.0f, 4.0f}};
  const Inclusion before = setting.cpu({.tau = 1});
  const float total = std::exp(before.log_totals[0] - 12.0f);
  for (const auto& [share, factor] : {std::pair{0.0f, 1.0f}, {0.75f, 2.0f}, {0.99f, 10.0f}, {0.9999f, 16.0f}}) {
    const float sinks = share * total;
    setting.params.sinks = &sinks;
    const Inclusion after = setting.cpu({.tau = 1});
    double variance = 0;
    for (int32_t c = 0; c < setting.scores.num_clusters; ++c) {
      const double size = setting.scores.sizes[c], w = before.probability[c], p = after.probability[c];
      if (size == 0) continue;
      ASSERT_LT(p, 1);
      EXPECT_NEAR(p, factor * w, 1e-3 * p) << "cluster " << c << " share " << share;
      variance += size * w * w * (1 / p - 1);
    }
    EXPECT_EQ(after.log_totals, before.log_totals);
    EXPECT_NEAR(after.predicted_variance, variance, 1e-3 * variance);
  }
}

TEST(SelectSample, TauBoundsTheExpectedTokens) {
  Setting setting(9999, 1);
  setting.params.beta = 0;
  for (const float tau : {1.0f, 30.0f, 300.0f, 3000.0f})
    EXPECT_LE(setting.expected_tokens(setting.cpu({.tau = tau})), tau * 1.0001);
}

TEST(SelectSample, TargetErrorAndWhatWasLearnedGiveTau) {
  Setting setting(9999, 3);
  for (const float target_error : {0.002f, 0.01f, 0.02f, 0.1f, 1.0f}) {
    for (const float ratio : {0.3f, 1.0f, 4.0f}) {
      SCOPED_TRACE(text("target_error ", target_error, " ratio ", ratio));
      setting.params.variance_ratio = ratio;
      const double tau = std::max(1.0, std::sqrt(ratio) / std::pow(target_error, 2));
      EXPECT_NEAR(setting.cpu({.target_error = target_error}).tau, tau, 1e-5 * tau);
      EXPECT_NEAR(setting.reference({.target_error = target_error}).tau, tau, 1e-5 * tau);
    }
  }
}

// Where all rows weigh alike a row drawn with probability p stands for 1 / p, and the relative variance of the mass is
// (1 / p - 1) / kv_len.
TEST(SelectSample, AFlatHeadErrsByTheTarget) {
  Setting setting(9999, 3, 1, 1e-4f);
  setting.params.beta = 0;
  double rows = 0;
  for (const float size : setting.scores.sizes) rows += size;
  for (const float target_error : {0.02f, 0.05f, 0.2f}) {
    for (const int64_t target : highway_targets()) {
      SCOPED_TRACE(text("target_error ", target_error, " ", target_name(target)));
      const OnTarget on(target);
      const double share = rows / 9999;  // the other rows are exact
      EXPECT_NEAR(std::sqrt(setting.cpu({.target_error = target_error}).predicted_variance),
                  std::sqrt(share * (std::pow(target_error, 2) - 1.0 / 9999)), 0.05 * target_error);
    }
  }
}

TEST(SelectSample, SmallerTargetErrorReadsMore) {
  const Setting setting(9999);
  std::vector<float> before(static_cast<size_t>(setting.scores.num_clusters), 0.0f);
  for (const float target_error : {1.0f, 0.1f, 0.03f, 0.01f, 0.003f, 0.001f}) {
    const Inclusion inclusion = setting.cpu({.target_error = target_error});
    for (size_t c = 0; c < before.size(); ++c) EXPECT_GE(inclusion.probability[c], before[c]);
    before = inclusion.probability;
  }
}

TEST(SelectSample, VisibleWeightDecides) {
  // A cluster of which one member in two is hidden weighs half; hidden clusters change nothing.
  Setting setting(3000, 1, 0.5);
  const Inclusion before = setting.cpu({.tau = 100});
  for (int32_t c = 0; c < setting.scores.num_clusters; ++c) {
    if (setting.scores.sizes[c] == 0) setting.scores.dots[c] = 1e6f;
  }
  EXPECT_EQ(setting.cpu({.tau = 100}).probability, before.probability);
}

void expect_everything(const Setting& setting) {
  for (const float tau : {0.0f, 100.0f}) {
    for (const Inclusion& inclusion : {setting.cpu({.tau = tau}), setting.reference({.tau = tau})}) {
      for (int32_t c = 0; c < setting.scores.num_clusters; ++c) {
        ASSERT_TRUE(setting.scores.sizes[c] == 0 || inclusion.probability[c] == 1) << "cluster " << c;
      }
    }
  }
}

TEST(SelectSample, EstimatesThatAreNotFiniteReadEverything) {
  const Setting sound(3000);
  for (const int64_t target : highway_targets()) {
    const OnTarget on(target);
    for (const size_t at : {size_t{0}, size_t{5}, sound.scores.dots.size() - 20}) {
      for (const float bad : {std::nanf(""), HUGE_VALF}) {
        SCOPED_TRACE(text("dot ", at, " is ", bad, ", ", target_name(target)));
        Setting setting(3000);
        ASSERT_GT(setting.scores.sizes[at % setting.scores.num_clusters], 0);
        setting.scores.dots[at] = bad;
        expect_everything(setting);
      }
    }
    SCOPED_TRACE(target_name(target));
    Setting setting(3000);
    setting.scores.spreads[5] = HUGE_VALF;
    expect_everything(setting);
    Setting other(3000);
    other.q_norms2[1] = HUGE_VALF;
    expect_everything(other);
  }
}

TEST(SelectSample, ExtremeScoresStayNumbers) {
  for (const float shift : {-1e4f, 1e4f}) {
    Setting setting(3000);
    for (float& dot : setting.scores.dots) dot += shift;
    for (const SoftmaxState& state : {SoftmaxState{}, SoftmaxState{shift, 1.0f}, SoftmaxState{3.0f, 1.0f}}) {
      std::fill(setting.exact.begin(), setting.exact.end(), state);
      for (const float tau : {0.0f, 100.0f}) {
        const Inclusion a = setting.cpu({.tau = tau}), b = setting.reference({.tau = tau});
        for (int32_t c = 0; c < setting.scores.num_clusters; ++c) {
          if (setting.scores.sizes[c] == 0) continue;
          ASSERT_NEAR(a.probability[c], b.probability[c], 0.02 * b.probability[c] + 1e-6) << "shift " << shift;
        }
      }
    }
  }
}

// On every instruction set; returns what the reference draws.
HeadSelection expect_reference_draw(const Setting& setting, const Inclusion& inclusion, double offset) {
  HeadSelection expected = setting.reference_draw(inclusion, offset);
  for (const int64_t target : highway_targets()) {
    SCOPED_TRACE(target_name(target));
    const OnTarget on(target);
    const HeadSelection drawn = setting.cpu_draw(inclusion, offset);
    EXPECT_EQ(drawn.tokens, expected.tokens);
    EXPECT_EQ(drawn.clusters, expected.clusters);
    EXPECT_EQ(drawn.num_certain, expected.num_certain);
    EXPECT_EQ(drawn.log_weights.size(), expected.log_weights.size());
    for (size_t i = 0; i < std::min(drawn.log_weights.size(), expected.log_weights.size()); ++i)
      EXPECT_FLOAT_EQ(drawn.log_weights[i], expected.log_weights[i]);
  }
  return expected;
}

TEST(Draw, DrawsWhatTheReferenceDraws) {
  for (const int64_t kv_len : {256, 1000, 9999}) {
    for (const double seen : {1.0, 0.3, 0.0}) {
      const Setting setting(kv_len, 3, seen);
      for (const float tau : {1.0f, 30.0f, 1000.0f, 1e9f}) {
        const Inclusion inclusion = setting.reference({.tau = tau});
        for (const double offset : {0.0, 0.3, 0.5, 0.999999}) {
          SCOPED_TRACE(text("kv_len ", kv_len, " visible ", seen, " tau ", tau, " offset ", offset));
          expect_reference_draw(setting, inclusion, offset);
        }
      }
    }
  }
}

TEST(Draw, CertainFirstEachRowOnceAndAsManyAsExpected) {
  const Setting setting(9999, 3, 0.7);
  const Inclusion inclusion = setting.cpu({.tau = 500});
  for (const double offset : {0.0, 0.25, 0.9}) {
    const HeadSelection drawn = setting.cpu_draw(inclusion, offset);
    ASSERT_GT(drawn.num_certain, 0);
    ASSERT_LT(drawn.num_certain, static_cast<int64_t>(drawn.tokens.size()));
    for (size_t i = 0; i < drawn.tokens.size(); ++i) {
      EXPECT_EQ(drawn.log_weights[i] == 0, i < static_cast<size_t>(drawn.num_certain));
      EXPECT_TRUE(setting.filter.reads_indexed(drawn.tokens[i]));
      EXPECT_NEAR(drawn.log_weights[i], -std::log(inclusion.probability[drawn.clusters[i]]), 1e-5);
    }
    std::vector<int32_t> tokens = drawn.tokens;
    std::sort(tokens.begin(), tokens.end());
    EXPECT_EQ(std::adjacent_find(tokens.begin(), tokens.end()), tokens.end());
    EXPECT_NEAR(static_cast<double>(tokens.size()), setting.expected_tokens(inclusion), setting.num_segments() + 0.01);
  }
}

// Over evenly spread offsets every member comes as often as its probability says: exactly what makes the sums unbiased.
TEST(Draw, EveryMemberHasItsProbability) {
  const Setting setting(1500, 2);
  const Inclusion inclusion = setting.cpu({.tau = 100});
  std::map<int32_t, int> times;
  std::map<int32_t, int32_t> cluster;
  constexpr int kDraws = 2000;
  for (int i = 0; i < kDraws; ++i) {
    const HeadSelection drawn = setting.cpu_draw(inclusion, (i + 0.5) / kDraws);
    for (size_t t = 0; t < drawn.tokens.size(); ++t) {
      ++times[drawn.tokens[t]];
      cluster[drawn.tokens[t]] = drawn.clusters[t];
    }
  }
  double expected = 0, seen = 0;
  for (const auto& [token, count] : times) {
    EXPECT_NEAR(count, kDraws * inclusion.probability[cluster[token]], 2) << "token " << token;
    seen += count;
  }
  expected = kDraws * setting.expected_tokens(inclusion);
  EXPECT_NEAR(seen, expected, kDraws * 0.01 + 2);
}

TEST(Draw, ProbabilitiesNextToZeroAndOne) {
  const Setting setting(3000, 1);
  Inclusion inclusion = setting.cpu({.tau = 100});
  for (const float p : {0.0f, 1e-30f, 1e-8f, 0.5f, std::nextafterf(1, 0), 1.0f}) {
    std::fill(inclusion.probability.begin(), inclusion.probability.end(), p);
    for (const double offset : {0.0, 0.5}) {
      SCOPED_TRACE(text("p ", p, " offset ", offset));
      const HeadSelection drawn = expect_reference_draw(setting, inclusion, offset);
      EXPECT_NEAR(static_cast<double>(drawn.tokens.size()), setting.expected_tokens(inclusion),
                  setting.num_segments() + 0.01);
    }
  }
}

}  // namespace
}  // namespace tactic::test
