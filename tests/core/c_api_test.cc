// The C interface: structures of other sizes, and what a query may ask for beyond the least.
#include "tactic/c_api.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "support.h"
#include "tactic/attention.h"

namespace tactic::test {
namespace {

constexpr int32_t kHeads = 2, kGroup = 2, kDim = 32, kRows = 1200;

struct Step {
  std::vector<float> k = normal(kRows * kHeads * kDim, 1), v = normal(kRows * kHeads * kDim, 2),
                     q = normal(kHeads * kGroup * kDim, 3), out = std::vector<float>(kHeads * kGroup * kDim);
  tactic_index* index = nullptr;
  tactic_attention* attention = nullptr;
  tactic_query query{};
  tactic_step_stats stats{};

  Step() {
    tactic_index_options index_options;
    tactic_index_options_init(&index_options);
    index = tactic_index_create(&index_options, kHeads, kDim, kDim);
    tactic_decode_options options;
    tactic_decode_options_init(&options);
    options.select = TACTIC_SAMPLE;
    options.tau = 100;
    attention = tactic_attention_create(&options, 1);
    query.struct_size = sizeof query;
    query.q = q.data();
    query.num_q_heads = kHeads * kGroup;
    query.sm_scale = 0.3f;
    query.kv.num_kv_heads = kHeads;
    query.kv.head_dim = query.kv.v_head_dim = kDim;
    query.kv.kv_len = kRows;
    for (tactic_rows* rows : {&query.kv.k, &query.kv.v}) {
      rows->data = rows == &query.kv.k ? k.data() : v.data();
      rows->head_stride_bytes = kDim * 4;
      rows->token_stride_bytes = kHeads * kDim * 4;
    }
    query.index = index;
    query.out = out.data();
    query.q_head_stride = query.out_head_stride = kDim;
    EXPECT_EQ(tactic_index_write(index, 0, kRows), 0);
    EXPECT_EQ(tactic_index_maintain(index, &query.kv, -1), 0);
  }
  ~Step() {
    tactic_attention_free(attention);
    tactic_index_free(index);
  }
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;

  int64_t run(const tactic_query& asked) {
    EXPECT_EQ(tactic_index_forget_learned(index), 0);
    EXPECT_EQ(tactic_attention_run(attention, &asked, 1, &stats), 0) << tactic_last_error();
    return stats.tokens_certain + stats.tokens_sampled;
  }

 private:
  static std::vector<float> normal(size_t count, uint64_t seed) {
    Random random(seed);
    std::vector<float> values(count);
    for (float& x : values) x = random.normal();
    return values;
  }
};

TEST(CInterface, AStructureThatEndsEarlierIsAsIfItsRestWereZero) {
  Step step;
  const int64_t rows = step.run(step.query);
  const std::vector<float> out = step.out;
  tactic_query before = step.query;
  before.struct_size = offsetof(tactic_query, likely_rows);
  std::memset(reinterpret_cast<char*>(&before) + before.struct_size, 0x5A, sizeof before - before.struct_size);
  EXPECT_EQ(step.run(before), rows);
  EXPECT_EQ(step.out, out);
}

TEST(CInterface, QueriesOfAnOlderCallerStandCloser) {
  Step step;
  step.run(step.query);
  const std::vector<float> first = step.out;
  const size_t size = offsetof(tactic_query, likely_rows);
  std::vector<char> bytes(2 * size);
  std::vector<float> second(step.out.size());
  for (int i = 0; i < 2; ++i) {
    tactic_query query = step.query;
    query.struct_size = size;
    query.index = nullptr;
    query.out = i == 0 ? step.out.data() : second.data();
    std::memcpy(bytes.data() + static_cast<size_t>(i) * size, &query, size);
  }
  const auto* queries = reinterpret_cast<const tactic_query*>(bytes.data());
  ASSERT_EQ(tactic_attention_run(step.attention, queries, 2, nullptr), 0) << tactic_last_error();
  EXPECT_EQ(step.out, second);
  EXPECT_NE(step.out, first) << "exact and sampled";
}

TEST(CInterface, OtherSizesAreNamed) {
  Step step;
  constexpr size_t kLeast = offsetof(tactic_query, likely_rows);
  for (const size_t size : {size_t{0}, kLeast - 8, kLeast + 1, sizeof(tactic_query) + 8}) {
    tactic_query query = step.query;
    query.struct_size = size;
    EXPECT_EQ(tactic_attention_run(step.attention, &query, 1, nullptr), -1);
    EXPECT_NE(std::strstr(tactic_last_error(), ("struct_size (" + std::to_string(size) + ")").c_str()), nullptr)
        << tactic_last_error();
    EXPECT_NE(std::strstr(tactic_last_error(), "a multiple of 8"), nullptr);
  }
  tactic_index_options_init(nullptr);
  tactic_decode_options_init(nullptr);
  std::vector<tactic_query> two(2, step.query);
  two[1].struct_size = offsetof(tactic_query, likely_rows);
  EXPECT_EQ(tactic_attention_run(step.attention, two.data(), 2, nullptr), -1);
  EXPECT_NE(std::strstr(tactic_last_error(), "must be that of the first"), nullptr) << tactic_last_error();
}

TEST(CInterface, AFactorOfTauReadsMoreAndAWrongOneIsNamed) {
  Step step;
  const int64_t rows = step.run(step.query);
  tactic_query query = step.query;
  query.tau_factor = 1;
  EXPECT_EQ(step.run(query), rows) << "0 means 1";
  query.tau_factor = 4;
  EXPECT_GT(step.run(query), rows);
  query.tau_factor = -1;
  EXPECT_EQ(tactic_attention_run(step.attention, &query, 1, nullptr), -1);
  EXPECT_NE(std::strstr(tactic_last_error(), "tau_factor (-1"), nullptr) << tactic_last_error();
}

TEST(CInterface, WholeClusteringIsAFlag) {
  tactic_index_options options;
  tactic_index_options_init(&options);
  options.whole_clustering = 7;
  EXPECT_EQ(tactic_index_create(&options, kHeads, kDim, kDim), nullptr);
  EXPECT_STREQ(tactic_last_error(), "whole_clustering (7) must be 0 or 1");
}

TEST(CInterface, NoNumberOfQueriesAndNoScaleIsTaken) {
  Step step;
  tactic_query query = step.query;
  query.sm_scale = std::nanf("");
  EXPECT_EQ(tactic_attention_run(step.attention, &query, 1, nullptr), -1);
  EXPECT_NE(std::strstr(tactic_last_error(), "sm_scale (nan) must be finite"), nullptr) << tactic_last_error();
  EXPECT_EQ(tactic_attention_run(step.attention, &query, SIZE_MAX, nullptr), -1);
  EXPECT_NE(std::strstr(tactic_last_error(), "num_queries (18446744073709551615)"), nullptr) << tactic_last_error();
}

TEST(CInterface, LikelyRowsAreReadForCertain) {
  Step step;
  step.run(step.query);
  const int64_t certain = step.stats.tokens_certain;
  std::vector<int32_t> likely;
  for (int32_t row = 100; row < 500; row += 4) likely.push_back(row);
  tactic_query query = step.query;
  query.likely_rows = likely.data();
  query.num_likely_rows = static_cast<int32_t>(likely.size());
  step.run(query);
  EXPECT_GT(step.stats.tokens_certain, certain + kHeads * 80) << "a few stand in clusters that are read anyway";
}

TEST(CInterface, MassesAreOfTheHeads) {
  Step step;
  std::vector<tactic_mass> masses(kHeads * kGroup, {-1, -1, -1, -1});
  tactic_query query = step.query;
  query.masses = masses.data();
  step.run(query);
  double mean = 0;
  for (const tactic_mass& mass : masses) {
    EXPECT_GT(mass.mass, 0);
    EXPECT_GT(mass.std_error, 0);
    EXPECT_LE(mass.low, mass.mass);
    EXPECT_GE(mass.high, mass.mass);
    mean += mass.mass / static_cast<double>(masses.size());
  }
  EXPECT_NEAR(mean, step.stats.estimated_mass, 1e-9);
}

// The same through C++: what a caller sets must arrive, or the answers part.
struct Settings {
  IndexOptions index;
  DecodeOptions decode;
  bool masked = false, biased = false;
  float change = 0;  // added to every value once the rows are clustered
};

struct Answer {
  std::vector<float> out, lse;
  StepStats stats;
  bool operator==(const Answer& other) const {
    const auto figures = [](const StepStats& s) {
      return std::tuple(s.kv_len, s.tokens_certain, s.tokens_sampled, s.refined_clusters, s.index_bytes, s.kv_bytes,
                        s.kv_bytes_present, s.estimated_mass, s.mass_std_error, s.dense);
    };
    return out == other.out && lse == other.lse && figures(stats) == figures(other.stats);
  }
};

// Rows in pages of 16 in falling order; half of the rows masked, if any are.
struct Inputs {
  Step step;
  std::vector<int32_t> pages;
  std::vector<uint64_t> visible = std::vector<uint64_t>((kRows + 63) / 64, 0xFFFFFFFF0000FFFFu);
  std::vector<float> bias = std::vector<float>(kRows);

  Inputs() {
    for (int32_t page = kRows / 16; page-- > 0;) pages.push_back(page);
    for (size_t i = 0; i < bias.size(); i += 3) bias[i] = -2;
  }
};

Answer through_c(const Settings& set) {
  Inputs in;
  tactic_index_options index_options;
  tactic_index_options_init(&index_options);
  index_options.whole_clustering = set.index.clustering == Clustering::kWhole;
  index_options.cluster_tokens = set.index.cluster_tokens;
  index_options.segment_tokens = set.index.segment_tokens;
  index_options.provisional_tokens = set.index.provisional_tokens;
  index_options.provisional_cluster_tokens = set.index.provisional_cluster_tokens;
  index_options.iterations = set.index.iterations;
  index_options.sink_tokens = set.index.sink_tokens;
  index_options.outlier_fraction = set.index.outlier_fraction;
  index_options.seed = set.index.seed;
  tactic_index* index = tactic_index_create(&index_options, kHeads, kDim, kDim);
  tactic_decode_options options;
  tactic_decode_options_init(&options);
  options.select = static_cast<tactic_select>(set.decode.select);
  options.target_error = set.decode.target_error;
  options.tau = set.decode.tau;
  options.refine = set.decode.refine;
  options.target_mass = set.decode.target_mass;
  options.budget = set.decode.budget;
  options.beta = set.decode.beta;
  options.check_rows = set.decode.check_rows;
  options.seed = set.decode.seed;
  tactic_attention* attention = tactic_attention_create(&options, 1);
  Answer answer{in.step.out, std::vector<float>(kHeads * kGroup), {}};
  tactic_query query = in.step.query;
  for (tactic_rows* rows : {&query.kv.k, &query.kv.v}) {
    rows->page_table = in.pages.data();
    rows->page_tokens = 16;
    rows->page_stride_bytes = 16 * rows->token_stride_bytes;
    rows->num_pages = kRows / 16;
  }
  query.index = index;
  query.visible = set.masked ? in.visible.data() : nullptr;
  query.bias = set.biased ? in.bias.data() : nullptr;
  query.stream_id = 5;
  query.layer = 3;
  query.position = 77;
  query.out = answer.out.data();
  query.lse = answer.lse.data();
  tactic_step_stats stats;
  EXPECT_EQ(tactic_index_write(index, 0, kRows), 0);
  EXPECT_EQ(tactic_index_maintain(index, &query.kv, -1), 0);
  for (float& x : in.step.v) x += set.change;
  EXPECT_EQ(tactic_attention_run(attention, &query, 1, &stats), 0) << tactic_last_error();
  answer.stats.kv_len = stats.kv_len;
  answer.stats.tokens_certain = stats.tokens_certain;
  answer.stats.tokens_sampled = stats.tokens_sampled;
  answer.stats.refined_clusters = stats.refined_clusters;
  answer.stats.index_bytes = stats.index_bytes;
  answer.stats.kv_bytes = stats.kv_bytes;
  answer.stats.kv_bytes_present = stats.kv_bytes_present;
  answer.stats.estimated_mass = stats.estimated_mass;
  answer.stats.mass_std_error = stats.mass_std_error;
  answer.stats.dense = static_cast<DenseReason>(stats.dense);
  tactic_attention_free(attention);
  tactic_index_free(index);
  return answer;
}

Answer through_cpp(const Settings& set) {
  Inputs in;
  const auto rows = [&](const std::vector<float>& data) {
    return RowsView{data.data(),     DType::kF32, kHeads * kDim * 4,      kDim * 4,
                    in.pages.data(), 16,          16 * kHeads * kDim * 4, kRows / 16};
  };
  Answer answer{in.step.out, std::vector<float>(kHeads * kGroup), {}};
  KvIndex index(set.index, {kHeads, kDim, kDim});
  DecodeQuery query;
  query.q = in.step.q.data();
  query.q_head_stride = query.out_head_stride = kDim;
  query.num_q_heads = kHeads * kGroup;
  query.sm_scale = 0.3f;
  query.kv = {rows(in.step.k), rows(in.step.v), kHeads, kDim, kDim, kRows};
  query.index = &index;
  query.visible = set.masked ? in.visible.data() : nullptr;
  query.bias = set.biased ? in.bias.data() : nullptr;
  query.stream_id = 5;
  query.layer = 3;
  query.position = 77;
  query.out = answer.out.data();
  query.lse = answer.lse.data();
  index.write(0, kRows);
  index.maintain(query.kv);
  for (float& x : in.step.v) x += set.change;
  Attention(set.decode, Backend::kCpu, 1).run({&query, 1}, &answer.stats);
  return answer;
}

TEST(CInterface, WhatIsSetArrivesAsThroughCpp) {
  Settings sample;
  sample.index = {Clustering::kIncremental, 8, 512, 128, 2, 2, 9, 0.02f, 11};
  sample.decode.target_error = 0.09f;
  sample.decode.refine = 0.3f;
  sample.decode.beta = 0.4f;
  sample.decode.seed = 12;
  std::vector<Settings> cases(7, sample);
  cases[1].masked = true;
  cases[2].biased = true;
  cases[3].decode.target_mass = 0.8f;
  cases[4].change = 1;  // found by row checks
  cases[5].change = 1;
  cases[5].decode.check_rows = false;
  cases[6].decode.tau = 60;
  for (const Select select : {Select::kTopK, Select::kFit, Select::kDense}) {
    Settings other = sample;
    other.index.clustering = Clustering::kWhole;
    other.decode.select = select;
    other.decode.budget = 200;
    other.decode.target_mass = 0.6f;
    cases.push_back(other);
  }
  std::vector<Answer> answers;
  for (size_t i = 0; i < cases.size(); ++i) {
    const Answer answer = through_c(cases[i]);
    EXPECT_TRUE(answer == through_cpp(cases[i])) << "case " << i;
    for (size_t j = 0; j < answers.size(); ++j) EXPECT_FALSE(answer == answers[j]) << "cases " << i << " and " << j;
    answers.push_back(answer);
  }
  EXPECT_EQ(answers[4].stats.dense, DenseReason::kRowChanged);
  EXPECT_EQ(answers[5].stats.dense, DenseReason::kNone);
}

TEST(CInterface, PagesBeyondTheTableAreNamed) {
  Inputs in;
  tactic_query query = in.step.query;
  query.kv.k.page_table = in.pages.data();
  query.kv.k.page_tokens = 16;
  query.kv.k.page_stride_bytes = 16 * query.kv.k.token_stride_bytes;
  query.kv.k.num_pages = kRows / 16 - 1;
  EXPECT_EQ(tactic_attention_run(in.step.attention, &query, 1, nullptr), -1);
  EXPECT_NE(std::strstr(tactic_last_error(), "page_table"), nullptr) << tactic_last_error();
}

TEST(CInterface, RemovedRowsLeaveTheIndex) {
  Step step;
  EXPECT_EQ(tactic_index_remove(step.index, 0, kRows), 0);
  step.run(step.query);
  EXPECT_NE(step.stats.dense, 0) << "nothing is clustered any more";
  EXPECT_EQ(tactic_index_remove(step.index, -1, 5), -1);
  EXPECT_NE(tactic_last_error()[0], '\0');
}

TEST(CInterface, AnIndexCountsItsRowsAndForgetsThem) {
  Step step;
  EXPECT_EQ(tactic_index_rows_written(step.index), kRows);
  const int64_t indexed = tactic_index_rows_indexed(step.index);
  EXPECT_GT(indexed, kRows * 3 / 4);
  EXPECT_EQ(tactic_index_write(step.index, 100, 20), 0);
  EXPECT_EQ(tactic_index_rows_indexed(step.index), indexed - 20);
  EXPECT_EQ(tactic_index_clear(step.index), 0);
  EXPECT_EQ(tactic_index_rows_written(step.index), 0);
  EXPECT_EQ(tactic_index_rows_indexed(step.index), 0);
  EXPECT_EQ(tactic_index_rows_written(nullptr), 0);
  EXPECT_EQ(tactic_index_clear(nullptr), -1);
}

TEST(CInterface, ThreadsOfAnIndex) {
  Step step;
  EXPECT_EQ(tactic_index_set_num_threads(step.index, 1), 0);
  EXPECT_EQ(tactic_index_clear(step.index), 0);
  EXPECT_EQ(tactic_index_write(step.index, 0, kRows), 0);
  EXPECT_EQ(tactic_index_maintain(step.index, &step.query.kv, -1), 0);
  EXPECT_EQ(tactic_index_set_num_threads(step.index, 1025), -1);
  EXPECT_NE(std::strstr(tactic_last_error(), "num_threads (1025)"), nullptr) << tactic_last_error();
}

TEST(CInterface, EarlierPlacesAreThoseOfCpp) {
  constexpr int32_t kTokens = 300, kMost = 2;
  const Cache cache({.v_dtype = DType::kF32, .num_kv_heads = 1, .v_head_dim = 64, .kv_len = kTokens});
  std::vector<float> values;
  for (int32_t i = 0; i < kTokens; ++i) {  // tokens 0..99, three times, each like no other
    const std::vector<float> value = cache.value(0, i % 100);
    values.insert(values.end(), value.begin(), value.end());
  }
  tactic_kv kv{};
  kv.v = {values.data(), TACTIC_F32, 256, 0, nullptr, 0, 0, 0};
  kv.num_kv_heads = 1;
  kv.v_head_dim = 64;
  kv.kv_len = kTokens;
  tactic_places* places = tactic_places_create();
  std::vector<int32_t> rows(4 * kMost);
  EXPECT_EQ(tactic_places_find(places, &kv, nullptr, nullptr, 0, kMost, rows.data()), 8);
  EXPECT_THAT(rows, testing::ElementsAre(98, 99, 100, 101, 198, 199, 200, 201));
  std::vector<uint64_t> visible(5, ~uint64_t{0});
  visible[1] = 0;  // rows 64 to 127
  const int32_t written = 250;
  EXPECT_EQ(tactic_places_find(places, &kv, visible.data(), &written, 1, kMost, rows.data()), 8);
  EXPECT_THAT(rows, testing::ElementsAre(49, 50, 51, 52, 149, 150, 151, 152));
  std::copy_n(values.begin() + 64 * 7, 64, values.begin() + 64 * 50);
  EXPECT_EQ(tactic_places_find(places, &kv, visible.data(), &written, 1, kMost, rows.data()), 8) << "nobody said so";
  EXPECT_EQ(tactic_places_forget(places, 50, 1), 0);
  EXPECT_EQ(tactic_places_find(places, &kv, visible.data(), &written, 1, kMost, rows.data()), 4);

  EXPECT_EQ(tactic_places_find(places, &kv, nullptr, nullptr, 0, 0, nullptr), 0);
  const auto fails = [](int result, const char* message) {
    EXPECT_EQ(result, -1);
    EXPECT_NE(std::strstr(tactic_last_error(), message), nullptr) << tactic_last_error();
  };
  const int32_t hidden[] = {-1, 5000};
  EXPECT_EQ(tactic_places_find(places, &kv, visible.data(), hidden, 2, kMost, rows.data()), 4) << "passed over";
  fails(tactic_places_find(places, &kv, nullptr, nullptr, 1, kMost, rows.data()), "written must not be null");
  fails(tactic_places_find(places, &kv, nullptr, nullptr, 0, kMost, nullptr), "rows must not be null");
  fails(tactic_places_find(places, nullptr, nullptr, nullptr, 0, kMost, rows.data()), "first_layer must not be null");
  fails(tactic_places_find(nullptr, &kv, nullptr, nullptr, 0, kMost, rows.data()), "places must not be null");
  fails(tactic_places_find(places, &kv, nullptr, nullptr, 0, -3, rows.data()), "most (-3)");
  fails(tactic_places_forget(places, -1, 1), "rows -1 + 1");
  fails(tactic_places_forget(nullptr, 0, 1), "places must not be null");
  tactic_places_free(places);
  tactic_places_free(nullptr);
}

}  // namespace
}  // namespace tactic::test
