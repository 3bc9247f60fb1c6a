// A function of the host that answers one-row attention in Tactic's place ("tactic_set_decoder").
#include <optional>

#include "graph_layer.h"

namespace tactic::test {
namespace {

constexpr int64_t kCells = 1024;

/// Exact attention over the rows that the plug-in hands over, in double precision.
struct ExactDecoder {
  int calls = 0, refuse_from = 1 << 30;
  tactic_query last = {};
  std::vector<bool> visible;

  static int call(void* self, const tactic_query* query, tactic_step_stats* stats) {
    return static_cast<ExactDecoder*>(self)->answer(*query, *stats);
  }

  int answer(const tactic_query& query, tactic_step_stats& stats) {
    last = query;
    visible.assign(static_cast<size_t>(query.kv.kv_len), true);
    for (size_t row = 0; row < visible.size(); ++row) {
      if (query.visible != nullptr) visible[row] = (query.visible[row / 64] >> (row % 64) & 1) != 0;
    }
    const int32_t group = query.num_q_heads / query.kv.num_kv_heads;
    for (int32_t h = 0; h < query.num_q_heads; ++h) attend(query, h, h / group);
    stats.kv_len = query.kv.kv_len;
    stats.tokens_certain = 7;
    stats.tokens_sampled = 5;
    stats.index_bytes = 11;
    stats.kv_bytes = 13;
    stats.kv_bytes_present = 17;
    return calls++ < refuse_from ? 0 : 1;
  }

  static double element(const tactic_rows& rows, size_t row, int32_t head, int32_t i) {
    const auto* at = static_cast<const char*>(rows.data) + static_cast<int64_t>(row) * rows.token_stride_bytes +
                     head * rows.head_stride_bytes;
    return double{ggml_fp16_to_fp32(reinterpret_cast<const ggml_fp16_t*>(at)[i])};
  }

  void attend(const tactic_query& query, int32_t q_head, int32_t kv_head) const {
    std::vector<double> sum(static_cast<size_t>(query.kv.v_head_dim), 0);
    double total = 0;
    for (size_t row = 0; row < visible.size(); ++row) {
      if (!visible[row]) continue;
      double score = 0;
      for (int32_t i = 0; i < query.kv.head_dim; ++i) {
        score += double{query.q[q_head * query.q_head_stride + i]} * element(query.kv.k, row, kv_head, i);
      }
      const double weight = std::exp(score * double{query.sm_scale});
      total += weight;
      for (int32_t i = 0; i < query.kv.v_head_dim; ++i) {
        sum[static_cast<size_t>(i)] += weight * element(query.kv.v, row, kv_head, i);
      }
    }
    for (int32_t i = 0; i < query.kv.v_head_dim; ++i) {
      query.out[q_head * query.out_head_stride + i] = static_cast<float>(sum[static_cast<size_t>(i)] / total);
    }
  }
};

class Decoder : public ::testing::Test {
 protected:
  void SetUp() override {
    Host::plugin_device();
    forget_indexes();
    configure(kSparse);
    layer_.emplace(kCells);
    layer_->write(0, rows_.keys(kCells), rows_.values(kCells));
    layer_->attend(rows_.query(), seen_);  // from now on the layer is known
    set_decoder(&ExactDecoder::call, &decoder_);
    take_totals();
  }
  void TearDown() override { set_decoder(nullptr, nullptr); }

  ExactDecoder decoder_;
  Rows rows_{21};
  std::optional<Layer> layer_;
  std::vector<float> seen_ = std::vector<float>(kCells, 0.0f);
};

// Rounding of f32: the sums themselves are in double precision on both sides.
constexpr double kRounding = 1e-6;

TEST_F(Decoder, AnswersFromWhatItIsHanded) {
  EXPECT_LT(layer_->error(rows_.query(), seen_), kRounding);
  EXPECT_EQ(decoder_.calls, 1);
  EXPECT_EQ(decoder_.last.index, nullptr);
  EXPECT_EQ(decoder_.last.layer, 0);
  EXPECT_EQ(decoder_.last.position, kCells);
  EXPECT_EQ(decoder_.last.kv.kv_len, kCells);
  EXPECT_EQ(decoder_.last.num_q_heads, kQueryHeads);
  EXPECT_EQ(decoder_.last.kv.num_kv_heads, kKvHeads);
  const tactic_totals totals = take_totals();
  EXPECT_EQ(totals.queries, 1);
  EXPECT_EQ(totals.dense_queries, 0);
  EXPECT_EQ(totals.tokens_certain, 7);
  EXPECT_EQ(totals.tokens_sampled, 5);
  EXPECT_EQ(totals.index_bytes, 11);
  EXPECT_EQ(totals.kv_bytes, 13);
  EXPECT_EQ(totals.kv_bytes_present, 17);
}

TEST_F(Decoder, IsToldWhatIsHidden) {
  for (size_t i = 0; i < seen_.size(); ++i) seen_[i] = i < 40 || i % 3 == 0 ? kHidden : 0.0f;
  EXPECT_LT(layer_->error(rows_.query(), seen_), kRounding);
  const auto shown = std::count(seen_.begin(), seen_.end(), 0.0f);
  EXPECT_EQ(decoder_.last.position, shown);
  for (size_t i = 0; i < seen_.size(); ++i) ASSERT_EQ(decoder_.visible[i], seen_[i] == 0) << "row " << i;
}

TEST_F(Decoder, WhatItRefusesIsExact) {
  decoder_.refuse_from = 0;
  EXPECT_LT(layer_->error(rows_.query(), seen_), 1e-3);
  EXPECT_EQ(decoder_.calls, 1);
  const tactic_totals totals = take_totals();
  EXPECT_EQ(totals.dense_queries, 1);
  EXPECT_EQ(totals.tokens_certain, kCells * kKvHeads) << "its figures do not count";
}

TEST_F(Decoder, IsNotAskedForSeveralRows) {
  const std::vector<float> mask(3 * kCells, 0.0f);
  EXPECT_LT(layer_->error(rows_.query(3), mask, 3), kBound);
  EXPECT_EQ(decoder_.calls, 0);
  EXPECT_EQ(take_totals().sparse_queries, 3);
}

TEST_F(Decoder, NullEndsIt) {
  set_decoder(nullptr, nullptr);
  EXPECT_LT(layer_->error(rows_.query(), seen_), kBound);
  EXPECT_EQ(decoder_.calls, 0);
  EXPECT_EQ(take_totals().sparse_queries, 1) << "the index was kept";
}

}  // namespace
}  // namespace tactic::test
