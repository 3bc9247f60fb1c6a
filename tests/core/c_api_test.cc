// The C interface: structures of other sizes, and what a query may ask for beyond the least.
#include "tactic/c_api.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "support.h"

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

}  // namespace
}  // namespace tactic::test
