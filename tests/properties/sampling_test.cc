// Sampling over many seeds: sums without bias, errors as large as they are said to be.
#include <algorithm>
#include <random>

#include "core/read_on.h"
#include "support.h"

namespace tactic::test {
namespace {

constexpr int kDraws = 600;

struct Moments {
  double sum = 0, sum2 = 0;
  int64_t count = 0;
  void add(double x) { sum += x, sum2 += x * x, ++count; }
  double mean() const { return sum / static_cast<double>(count); }
  double variance() const { return std::max(0.0, sum2 / static_cast<double>(count) - mean() * mean()); }
  double mean_error() const { return std::sqrt(variance() / static_cast<double>(count)); }
};

CacheSpec spec_of(int64_t kv_len) {
  CacheSpec spec;
  spec.num_kv_heads = 1;
  spec.kv_len = kv_len;
  return spec;
}

// Of all weights of query head g, whose logarithm is lse, on the first KV head.
double share_of(const Problem& problem, size_t g, int64_t row, double lse) {
  const std::vector<float> key = problem.cache.key(0, row);
  double score = 0;
  for (size_t d = 0; d < 64; ++d) score += double{problem.query.sm_scale} * problem.q[g * 64 + d] * key[d];
  return std::exp(score - lse);
}

// Of the rows read for certain.
double mass_of(const Problem& problem, size_t g, const HeadSelection& rows, double lse) {
  double mass = 0;
  for (int64_t r = 0; r < rows.num_certain; ++r) mass += share_of(problem, g, rows.tokens[static_cast<size_t>(r)], lse);
  return mass;
}

StepStats draw(Problem& problem, const DecodeOptions& options, int i) {
  problem.index->state().calibration.assign(1, {});
  problem.query.position = i;
  return problem.run(options);
}

// Without refinement the sum of the weights and the weighted sum of the values are unbiased, under masks too.
TEST(Sampling, NumeratorAndDenominatorAreUnbiased) {
  for (const double seen : {1.0, 0.5}) {
    for (const float tau : {20.0f, 200.0f}) {
      SCOPED_TRACE(text("visible ", seen, " tau ", tau));
      Problem problem(spec_of(2500), 2, 7, 0.3f);
      problem.build_index();
      const std::vector<uint64_t> visible = random_bits(2500, seen, 5);
      problem.query.visible = visible.data();
      problem.run({.select = Select::kDense});
      const std::vector<float> out = problem.out, lse = problem.lse;
      std::vector<Moments> denominator(2), numerator(128);
      for (int i = 0; i < kDraws; ++i) {
        const StepStats stats = draw(problem, {.tau = tau, .refine = 1, .beta = 1}, i);
        ASSERT_EQ(stats.refined_clusters, 0);
        for (size_t g = 0; g < 2; ++g) {
          const double total = std::exp(problem.lse[g] - lse[g]);  // in units of the dense sum
          denominator[g].add(total);
          for (size_t d = 0; d < 64; ++d) numerator[g * 64 + d].add(total * problem.out[g * 64 + d]);
        }
      }
      for (size_t g = 0; g < 2; ++g) {
        EXPECT_GT(denominator[g].variance(), 0) << "nothing was sampled";
        EXPECT_NEAR(denominator[g].mean(), 1, 4 * denominator[g].mean_error() + 1e-5) << "head " << g;
      }
      for (size_t i = 0; i < numerator.size(); ++i) {
        EXPECT_NEAR(numerator[i].mean(), out[i], 4.5 * numerator[i].mean_error() + 1e-5) << "element " << i;
      }
    }
  }
}

// Over many caches and draws the squared standard error is the mean squared error of the mass or more (the row that may
// always have been missed counts, and neighboring draws from different clusters may differ by more than systematic
// draws err), and the 95% interval holds the truth: both but for four standard errors over the caches. An interval that
// is sqrt(3) times as wide as it need be would say little. One cache alone says little too: a draw knows nothing of
// heavy rows that it cannot but miss.
TEST(Sampling, StandardErrorIsTheErrorOfTheMass) {
  for (const float sharpness : {0.2f, 0.5f}) {
    for (const float tau : {50.0f, 200.0f}) {
      SCOPED_TRACE(text("sharpness ", sharpness, " tau ", tau));
      Moments error, excess, covered;  // one value a cache
      for (uint64_t seed = 1; seed <= 120; ++seed) {
        Problem problem(spec_of(4000), 1, seed, sharpness);
        problem.build_index();
        problem.run({.select = Select::kDense});
        const double lse = problem.lse[0];
        Selection selection;
        problem.query.selection = &selection;
        std::vector<MassEstimate> masses(1);
        problem.query.masses = masses.data();
        Moments squares, differences, inside;
        for (int i = 0; i < 30; ++i) {
          const StepStats stats = draw(problem, {.tau = tau, .refine = 1, .beta = 1}, i);
          const double mass = mass_of(problem, 0, selection.heads[0], lse);
          const double square = std::pow(stats.estimated_mass - mass, 2);
          squares.add(square);
          differences.add(std::pow(stats.mass_std_error, 2) - square);
          inside.add(mass >= masses[0].low && mass <= masses[0].high);
        }
        error.add(squares.mean());
        excess.add(differences.mean());
        covered.add(inside.mean());
      }
      EXPECT_GT(error.mean(), 0) << "nothing was sampled";
      EXPECT_GT(excess.mean(), -4 * excess.mean_error());
      EXPECT_LT(error.mean() + excess.mean(), 3 * error.mean());
      EXPECT_GT(covered.mean(), 0.95 - 4 * covered.mean_error());
    }
  }
}

TEST(Sampling, EstimatedMassIsTheCertainRowsMass) {
  Problem problem(spec_of(4000), 1, 7, 0.2f);
  problem.build_index();
  problem.run({.select = Select::kDense});
  const double lse = problem.lse[0];
  Moments mass;
  for (int i = 0; i < kDraws; ++i) mass.add(draw(problem, {.tau = 200, .refine = 1, .beta = 1}, i).estimated_mass);
  // Which rows are certain does not depend on the draw, so their sum, here over the dense sum, is the same in each.
  const StepStats stats = draw(problem, {.tau = 200, .refine = 1, .beta = 1}, 0);
  const double certain = stats.estimated_mass * std::exp(problem.lse[0] - lse);
  for (int i = 1; i < 10; ++i) {
    const StepStats other = draw(problem, {.tau = 200, .refine = 1, .beta = 1}, i);
    EXPECT_NEAR(other.estimated_mass * std::exp(problem.lse[0] - lse), certain, 1e-5);
  }
  // The mean of C / (C + S) over draws of S exceeds C / (C + mean S) by the squared relative error, to second order.
  EXPECT_NEAR(mass.mean() - mass.variance() / mass.mean(), certain, 4 * mass.mean_error() + 1e-5);
}

// The target is that of independent draws and of rows that weigh alike; systematic draws err less, and so do heads with
// heavy rows.
TEST(Sampling, TheMassErrsByLessThanTheTargetAndMoreWithALargerOne) {
  Problem problem(spec_of(6000), 3, 7, 0.2f);
  problem.build_index();
  problem.run({.select = Select::kDense});
  const std::vector<float> lse = problem.lse;
  double before = 0;
  for (const float target_error : {0.02f, 0.06f, 0.18f}) {
    double mean_square = 0;
    for (int i = 0; i < 200; ++i) {
      draw(problem, {.target_error = target_error, .refine = 1, .beta = 1}, i);
      for (size_t g = 0; g < lse.size(); ++g) mean_square += std::pow(std::exp(problem.lse[g] - lse[g]) - 1, 2) / 600;
    }
    const double error = std::sqrt(mean_square);
    EXPECT_LT(error, target_error);
    EXPECT_GT(error, 1.5 * before) << "target_error " << target_error;
    before = error;
  }
}

// Left to itself, what the steps learn brings the error that is aimed at.
TEST(Sampling, CalibrationKeepsTheErrorNearItsTarget) {
  constexpr float kTarget = 0.05f;
  Problem problem(spec_of(6000), 3, 7, 0.5f);
  problem.build_index();
  problem.run({.select = Select::kDense});
  const std::vector<float> lse = problem.lse;
  double mean_square = 0;
  for (int i = 0; i < 600; ++i) {
    problem.query.position = i;
    const StepStats stats = problem.run({.target_error = kTarget});
    ASSERT_EQ(stats.dense, DenseReason::kNone);
    if (i < 300) continue;
    for (size_t g = 0; g < lse.size(); ++g) mean_square += std::pow(std::exp(problem.lse[g] - lse[g]) - 1, 2) / 900;
  }
  EXPECT_LT(std::sqrt(mean_square), 1.5 * kTarget);
  EXPECT_GT(std::sqrt(mean_square), 0.2 * kTarget);
  const Calibration& known = problem.index->state().calibration[0];
  EXPECT_GT(known.sum_xx, 0);
  EXPECT_TRUE(std::isfinite(known.sum_xy));
  EXPECT_GT(known.variance_ratio, 0);
  EXPECT_NE(known.variance_ratio, 1) << "nothing was learned of it";
  ASSERT_EQ(known.usual_variance.size(), 3u);
  for (const double usual : known.usual_variance) EXPECT_GT(usual, 0);
}

// Row 1000 weighs 0.3 of everything, and its cluster does not know (it changed unseen).
void make_heavy_unseen(Problem& problem) {
  problem.build_index();
  problem.run({.select = Select::kDense});
  std::vector<float> heavy = problem.cache.key(0, 1000);
  double dot = 0, norm2 = 0;
  for (size_t d = 0; d < 64; ++d) dot += problem.q[d] * heavy[d], norm2 += problem.q[d] * problem.q[d];
  const double wanted = (problem.lse[0] + std::log(0.3 / 0.7)) / problem.query.sm_scale;
  for (size_t d = 0; d < 64; ++d) heavy[d] += static_cast<float>(problem.q[d] * (wanted - dot) / norm2);
  problem.cache.set_key(0, 1000, heavy);
  problem.cache.set_value(0, 1000, std::vector<float>(64, 3.0f));
  problem.run({.select = Select::kDense});
}

// When such a row is drawn it would stand for far more than it weighs; refinement reads its cluster whole instead.
TEST(Sampling, RefinementReadsAnUnderestimatedClusterWhole) {
  Problem problem(spec_of(4000), 1, 7, 0.2f);
  make_heavy_unseen(problem);
  const std::vector<float> exact = problem.out;
  int64_t refined = 0;
  double worst_with = 0, worst_without = 0;
  for (int i = 0; i < 300; ++i) {
    const StepStats stats = draw(problem, {.tau = 400, .refine = 0.02f, .beta = 1, .check_rows = false}, i);
    if (stats.refined_clusters == 0) continue;
    ++refined;
    worst_with = std::max(worst_with, relative_error(problem.out, exact));
    draw(problem, {.tau = 400, .refine = 1, .beta = 1, .check_rows = false}, i);
    worst_without = std::max(worst_without, relative_error(problem.out, exact));
  }
  EXPECT_GT(refined, 3);
  EXPECT_LT(worst_with, 0.15);
  EXPECT_GT(worst_without, 2 * worst_with);
}

// Chance has to find it twice; from then on every step reads it.
TEST(Sampling, ARowFoundHeavyTwiceIsReadForCertain) {
  Problem problem(spec_of(4000), 1, 7, 0.2f);
  make_heavy_unseen(problem);
  const std::vector<int32_t>& heavy = problem.index->state().calibration[0].heavy;
  Selection selection;
  problem.query.selection = &selection;
  int64_t found = 0;
  for (int i = 0; i < 600; ++i) {
    const bool known = std::find(heavy.begin(), heavy.end(), 1000) != heavy.end();
    problem.query.position = i;
    const StepStats stats = problem.run({.tau = 400, .refine = 0.02f, .beta = 1, .check_rows = false});
    if (!known) {
      found += stats.refined_clusters;
      continue;
    }
    const HeadSelection& rows = selection.heads[0];
    const auto at = std::find(rows.tokens.begin(), rows.tokens.end(), 1000) - rows.tokens.begin();
    ASSERT_LT(at, rows.num_certain) << "step " << i;
    EXPECT_EQ(stats.refined_clusters, 0);
  }
  EXPECT_GE(found, 2);
  EXPECT_EQ(heavy, std::vector<int32_t>{1000});
}

// Its cluster read whole, the row is known; what its draw stood for is no reason to read on.
TEST(Sampling, AHeavyDrawReadWholeDoesNotKeepAStepReading) {
  Problem problem(spec_of(4000), 1, 7, 0.2f);
  make_heavy_unseen(problem);
  int64_t refined = 0, tokens = 0, tokens_without = 0;
  for (int i = 0; i < 300; ++i) {
    DecodeOptions options{.tau = 400, .refine = 0.02f, .beta = 1, .check_rows = false};
    const StepStats without = draw(problem, options, i);
    if (without.refined_clusters == 0) continue;
    ++refined;
    tokens_without += without.tokens_certain + without.tokens_sampled;
    options.target_mass = 0.25f;  // less than the row has
    const StepStats stats = draw(problem, options, i);
    tokens += stats.tokens_certain + stats.tokens_sampled;
  }
  EXPECT_GT(refined, 3);
  EXPECT_LT(static_cast<double>(tokens), 1.1 * static_cast<double>(tokens_without));
}

// A head that copies: step after step half of its attention lies on the row after the last one, and no cluster says so.
// Once found, the next rows are read for certain; a step that knows nothing of the step before misses most of them.
TEST(Sampling, AHeadThatCopiesIsFollowed) {
  constexpr int kSteps = 200;
  constexpr float kLength = 8, kScore = 20;
  Problem problem(spec_of(4000), 1, 7, 0.2f);
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0, 1 / 8.0f);  // vectors of 64 elements, about 1 long
  std::vector<std::vector<float>> own(kSteps, std::vector<float>(64));
  for (int i = 0; i < kSteps; ++i) {
    std::vector<float> key = problem.cache.key(0, 1000 + i);
    for (size_t d = 0; d < 64; ++d) key[d] += kLength * (own[i][d] = normal(random));
    problem.cache.set_key(0, 1000 + i, key);
  }
  problem.build_index();
  Selection selection;
  const auto reads = [&](int32_t row) {
    const std::vector<int32_t>& rows = selection.heads[0].tokens;
    return std::find(rows.begin(), rows.end(), row) != rows.end();
  };
  int missed_following = 0, missed_alone = 0;
  Moments weights;
  for (int i = 0; i < kSteps; ++i) {
    for (size_t d = 0; d < 64; ++d) problem.q[d] = own[i][d] * kScore / (kLength * problem.query.sm_scale);
    problem.query.position = i;
    const Calibration known = problem.index->state().calibration[0];
    problem.query.selection = nullptr;
    problem.run({.select = Select::kDense});
    weights.add(share_of(problem, 0, 1000 + i, problem.lse[0]));
    problem.query.selection = &selection;
    draw(problem, {.tau = 50, .beta = 1}, i);
    missed_alone += !reads(1000 + i);
    problem.index->state().calibration[0] = known;
    problem.run({.tau = 50, .beta = 1});
    missed_following += !reads(1000 + i);
  }
  EXPECT_GT(weights.mean(), 0.3);
  EXPECT_GT(missed_alone, kSteps / 3);
  EXPECT_LT(missed_following, missed_alone / 2) << "the first row of a run must be found by chance";
}

// With a target mass the step reads on until it is sure, and it is right about that.
TEST(Sampling, VerifiedMassIsReached) {
  for (const float target : {0.5f, 0.9f, 0.99f}) {
    SCOPED_TRACE(text("target ", target));
    int64_t reached = 0, heads = 0, tokens = 0, tokens_without = 0;
    for (uint64_t seed = 1; seed <= 40; ++seed) {
      Problem problem(spec_of(4000), 2, seed, 0.4f);
      problem.build_index();
      problem.run({.select = Select::kDense});
      const std::vector<float> lse = problem.lse;
      const StepStats without = draw(problem, {.target_error = 0.05f, .beta = 1}, 0);
      tokens_without += without.tokens_certain + without.tokens_sampled;
      Selection selection;
      problem.query.selection = &selection;
      const StepStats stats = draw(problem, {.target_error = 0.05f, .target_mass = target, .beta = 1}, 0);
      tokens += stats.tokens_certain + stats.tokens_sampled;
      EXPECT_GE(stats.estimated_mass, target);
      for (size_t g = 0; g < 2; ++g, ++heads) reached += mass_of(problem, g, selection.heads[0], lse[g]) >= target;
    }
    EXPECT_GE(reached, heads * 95 / 100);
    EXPECT_GE(tokens, tokens_without);
    if (target > 0.8f) {
      EXPECT_GT(tokens, tokens_without);
    }
    if (target < 0.95f) {
      EXPECT_LT(tokens, 40 * 4000 * 19 / 20);
    }
  }
}

// The step knows how much less a row stands for in such a head: the error it believes is not far from the one it makes.
TEST(Sampling, TheStandardErrorKnowsOfSinks) {
  CacheSpec spec;
  spec.kv_len = 6000;
  Problem problem(spec, 1, 7, 0.1f);
  make_sink(problem, 19);
  problem.build_index();
  std::vector<double> truth, believed;
  problem.run({.select = Select::kDense}, Backend::kReference);
  const float lse = problem.lse[0];
  for (uint64_t seed = 0; seed < 100; ++seed) {
    problem.index->state().calibration.assign(2, {});
    MassEstimate masses[2];
    problem.query.masses = masses;
    problem.run({.tau = 300, .refine = 1, .beta = 1, .seed = seed});
    believed.push_back(masses[0].std_error);
    truth.push_back(std::exp(problem.lse[0] - lse) - 1);  // of all weights, relative
  }
  double error2 = 0, believed2 = 0;
  for (size_t i = 0; i < truth.size(); ++i) error2 += truth[i] * truth[i], believed2 += believed[i] * believed[i];
  EXPECT_GT(std::sqrt(believed2 / error2), 0.8);
  EXPECT_LT(std::sqrt(believed2 / error2), 4) << "what it allows for rows missed is as for a head without a sink";
}

// Reading on does not bias the mass that is reported, also where much was refined: clusters whose spread is
// underestimated.
TEST(Sampling, ReadingOnDoesNotBiasTheMass) {
  constexpr int64_t kLen = 12000;
  Moments change;  // of the mass's error, draw by draw
  int64_t refined = 0;
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    CacheSpec spec = spec_of(kLen);
    spec.topic_scale = 1;
    spec.seed = seed;
    Problem problem(spec, 1, seed);
    problem.build_index();
    problem.run({.select = Select::kDense});
    std::vector<double> shares(kLen);
    for (int64_t r = 0; r < kLen; ++r) shares[static_cast<size_t>(r)] = share_of(problem, 0, r, problem.lse[0]);
    Selection selection;
    problem.query.selection = &selection;
    const auto error = [&](float target, int i) {
      const StepStats stats = draw(problem, {.tau = 500, .target_mass = target, .beta = 0.1f}, i);
      refined += stats.refined_clusters;
      const HeadSelection& rows = selection.heads[0];
      double mass = 0;
      for (int64_t r = 0; r < rows.num_certain; ++r)
        mass += shares[static_cast<size_t>(rows.tokens[static_cast<size_t>(r)])];
      return stats.estimated_mass - mass;
    };
    for (int i = 0; i < 100; ++i) change.add(error(0.9f, i) - error(0, i));
  }
  EXPECT_GT(refined, change.count) << "the case is too easy";
  EXPECT_NEAR(change.mean(), 0, 0.002) << "give or take " << change.mean_error();
}

}  // namespace
}  // namespace tactic::test
