// The evaluator over traces: exact answers are exact, sparse ones are those of the library, the summary is right.
#include "trace_error.h"

#include <unistd.h>

#include <cstring>
#include <filesystem>

#include "support.h"

namespace tactic::test {
namespace {

using namespace tactic::eval;

// A trace of one layer over a random cache.
class TraceErrorTest : public ::testing::Test {
 protected:
  TraceErrorTest() : cache({.num_kv_heads = 2, .head_dim = 64, .v_head_dim = 32, .kv_len = 1500}) {
    path = (std::filesystem::temp_directory_path() / ("tactic_trace_error_test_" + std::to_string(getpid()))).string();
    TraceInfo info;
    info.kv_len = 1500;
    info.prompt_len = 1000;
    for (const int64_t p : {998, 999, 1100, 1300, 1499}) {
      info.positions.push_back(p);
      info.kinds.push_back(p < 1000 ? QueryKind::kPrompt : QueryKind::kDecode);
    }
    for (const int64_t window : {0, 600})
      info.layers.push_back({0, 6, 2, 64, 32, DType::kF16, DType::kF16, 0.125f, window});
    TraceWriter writer(path, info);
    std::vector<std::byte> k, v;
    std::vector<float> q;
    const KvView view = cache.view();
    for (int32_t head = 0; head < 2; ++head) {
      for (int64_t row = 0; row < 1500; ++row) {
        k.insert(k.end(), view.k.row(head, row), view.k.row(head, row) + 128);
        v.insert(v.end(), view.v.row(head, row), view.v.row(head, row) + 64);
      }
    }
    for (uint64_t i = 0; i < 5; ++i) {
      const std::vector<float> one = make_queries(cache, 3, i + 1);
      q.insert(q.end(), one.begin(), one.end());
    }
    for (int32_t layer : {0, 1}) writer.write_layer(layer, k, v, q);
    writer.finish();
    trace = std::make_unique<Trace>(path);
  }
  ~TraceErrorTest() override { std::filesystem::remove(path); }

  Cache cache;
  std::string path;
  std::unique_ptr<Trace> trace;
};

TEST_F(TraceErrorTest, DenseIsTheReference) {
  for (const int32_t number : {0, 1}) {
    const TraceLayer layer = trace->layer(number);
    const std::vector<DenseQuery> answers = dense_layer(layer, std::vector<int64_t>{2, 4});
    for (const DenseQuery& answer : answers) {
      std::vector<uint64_t> visible(24);
      for (int64_t row = answer.rows.begin; row < answer.rows.end; ++row)
        visible[static_cast<size_t>(row / 64)] |= uint64_t{1} << (row % 64);
      std::vector<float> out(6 * 32), lse(6);
      DecodeQuery query;
      query.q = layer.query(answer.query);
      query.q_head_stride = 64;
      query.num_q_heads = 6;
      query.sm_scale = 0.125f;
      query.kv = layer.kv;
      query.visible = visible.data();
      query.out = out.data();
      query.out_head_stride = 32;
      query.lse = lse.data();
      Attention({.select = Select::kDense}, Backend::kReference).run({&query, 1});
      EXPECT_LT(relative_error(answer.out, out), 2e-6);
      for (int32_t h = 0; h < 6; ++h) {
        EXPECT_NEAR(answer.lse[static_cast<size_t>(h)], lse[static_cast<size_t>(h)], 1e-5);
        double sum = 0;
        for (const float w : answer.head_weights(h)) sum += w;
        EXPECT_NEAR(sum, 1, 1e-5);
      }
    }
  }
  EXPECT_EQ(dense_layer(trace->layer(1), std::vector<int64_t>{4}).front().rows.begin, 900);
}

TEST_F(TraceErrorTest, SettingsAreMeasuredAsTheLibraryRunsThem) {
  const TraceLayer layer = trace->layer(0);
  const std::vector<DenseQuery> answers = dense_layer(layer, std::vector<int64_t>{2, 3, 4});
  IndexOptions coarse;
  coarse.cluster_tokens = 32;
  const std::vector<Setting> settings = {{"exact", {}, {.select = Select::kDense}},
                                         {"sample", {}, {.target_error = 0.05f}},
                                         {"fit 0.9", {}, {.select = Select::kFit, .target_mass = 0.9f}},
                                         {"fit 0.99, coarse", coarse, {.select = Select::kFit, .target_mass = 0.99f}}};
  const std::vector<SettingCases> cases = measure_layer(layer, 0, answers, settings);
  ASSERT_EQ(cases.size(), 4u);
  for (const SettingCases& one : cases) {
    EXPECT_EQ(one.heads.size(), 18u);
    EXPECT_EQ(one.steps.size(), 3u);
  }
  const ErrorSummary exact = summarize(cases[0], 0.9), sample = summarize(cases[1], 0.9),
                     fit = summarize(cases[2], 0.9), more = summarize(cases[3], 0.99);
  EXPECT_LT(exact.max, 1e-5);
  EXPECT_EQ(exact.dense_share, 1);
  EXPECT_NEAR(exact.success, 1, 1e-9);
  EXPECT_NEAR(exact.tokens, (1101 + 1301 + 1500) / 3.0, 1e-9);
  EXPECT_NEAR(exact.read_fraction, 1, 1e-12);
  EXPECT_EQ(exact.sampled_cases, 0);
  for (const ErrorSummary& s : {sample, fit, more}) {
    EXPECT_GT(s.mean, 0);
    EXPECT_LT(s.mean, 1);  // random values average to little
    EXPECT_LT(s.tokens, 0.95 * exact.tokens);
    EXPECT_GE(s.max, s.p99);
    EXPECT_GE(s.worst_mean, s.mean);
  }
  EXPECT_GT(sample.sampled_cases, 0);
  EXPECT_GT(sample.tokens, sample.tokens_certain);
  for (size_t s = 1; s < cases.size(); ++s) {
    for (size_t i = 0; i < answers.size(); ++i) {
      const StepCase& step = cases[s].steps[i];
      const auto rows = static_cast<double>(answers[i].rows.end);
      const double of_both = s == 1 ? step.tokens_certain + step.tokens_sampled : step.tokens;
      EXPECT_NEAR(step.tokens, of_both, 1e-9);
      EXPECT_GT(step.read_fraction, step.tokens / rows + 0.02) << "the index is read too";
    }
  }
  EXPECT_GT(more.tokens, fit.tokens);
  EXPECT_GT(more.achieved_mass, fit.achieved_mass);
  // Settings do not disturb one another.
  const std::vector<SettingCases> alone = measure_layer(layer, 0, answers, std::span(settings).subspan(1, 1));
  for (size_t i = 0; i < alone[0].heads.size(); ++i) EXPECT_EQ(alone[0].heads[i].error, cases[1].heads[i].error);
}

TEST_F(TraceErrorTest, WindowedLayersReadTheWindowOnly) {
  const TraceLayer layer = trace->layer(1);
  const std::vector<DenseQuery> answers = dense_layer(layer, std::vector<int64_t>{4});
  const std::vector<Setting> settings = {{"exact", {}, {.select = Select::kDense}},
                                         {"sample", {}, {.target_error = 0.05f}}};
  const std::vector<SettingCases> cases = measure_layer(layer, 1, answers, settings);
  EXPECT_EQ(cases[0].steps[0].tokens, 600);
  EXPECT_LT(summarize(cases[0], 0.9).max, 1e-5);
  EXPECT_LT(summarize(cases[1], 0.9).mean, 0.3);
}

TEST(TraceErrorSummary, Figures) {
  SettingCases cases;
  for (int i = 0; i < 101; ++i) {
    const double mass = 0.5 + 0.005 * i, believed = mass + (i < 10 ? 0.02 : 0.005);
    cases.heads.push_back({i % 2, i % 3, i, i * 0.01, mass, believed, 0.01, believed - 0.015, believed + 0.015});
  }
  cases.steps = {{100, 60, 40, 0.1, false}, {300, 200, 100, 0.3, true}};
  const ErrorSummary s = summarize(cases, 0.9);
  EXPECT_DOUBLE_EQ(s.tokens, 200);
  EXPECT_DOUBLE_EQ(s.tokens_certain, 130);
  EXPECT_DOUBLE_EQ(s.read_fraction, 0.2);
  EXPECT_DOUBLE_EQ(s.dense_share, 0.5);
  EXPECT_NEAR(s.mean, 0.5, 1e-9);
  EXPECT_NEAR(s.median, 0.5, 1e-9);
  EXPECT_NEAR(s.p99, 0.99, 1e-9);
  EXPECT_NEAR(s.max, 1.0, 1e-9);
  EXPECT_EQ(s.max_position, 100);
  EXPECT_NEAR(s.success, 21 / 101.0, 1e-9);
  EXPECT_NEAR(s.coverage, 91 / 101.0, 1e-9);
  EXPECT_NEAR(s.mass_bias, (10 * 0.02 + 91 * 0.005) / 101, 1e-9);
  EXPECT_NEAR(s.std_error_ratio, std::sqrt((10 * 4 + 91 * 0.25) / 101), 1e-9);
}

TEST(TraceErrorSummary, TokensAtEqualError) {
  const std::vector<TokensError> points = {{400, 0.01}, {100, 0.04}, {200, 0.02}};
  EXPECT_NEAR(tokens_at_error(points, 0.02), 200, 1e-9);
  EXPECT_NEAR(tokens_at_error(points, 0.02 * std::sqrt(2)), 200 / std::sqrt(2), 1e-9);
  EXPECT_TRUE(std::isnan(tokens_at_error(points, 0.05)));
  EXPECT_TRUE(std::isnan(tokens_at_error({}, 0.05)));
}

}  // namespace
}  // namespace tactic::test
