// When a step goes on from an earlier one, and what is taken out of the index when it does not.
#include "cache_watch.h"

#include <gtest/gtest.h>

#include <random>

namespace tactic::plugin {
namespace {

constexpr int64_t kCells = 1024, kMaxRows = 8;

class Steps : public ::testing::Test {
 protected:
  Steps() : entry_({}, {1, 64, 64}) { entry_.index.write(0, kCells); }

  // A token is written to `cell` and a step shows the cells [begin, end). Returns whether a step began.
  bool step(int64_t begin, int64_t end, int64_t cell) {
    entry_.written = {static_cast<int32_t>(cell)};
    entry_.written_since_step += 1;
    return show(begin, end);
  }
  bool show(int64_t begin, int64_t end) {
    std::vector<uint64_t> visible(kCells / 64);
    for (int64_t i = begin; i < end; ++i) visible[static_cast<size_t>(i / 64)] |= uint64_t{1} << (i % 64);
    return entry_.begin_step(visible, end - begin, kMaxRows);
  }

  uint64_t steps() const { return entry_.passages.current().steps; }

  StreamIndex entry_;
};

TEST_F(Steps, LayersThatShareACacheAreOneStep) {
  for (int64_t i = 0; i < 10; ++i) {
    EXPECT_TRUE(step(0, 500 + i, 499 + i));
    for (int layer = 0; layer < 3; ++layer) EXPECT_FALSE(show(0, 500 + i)) << "another layer's attention";
  }
  EXPECT_EQ(steps(), 10u);
  EXPECT_LT(entry_.tau_factor(), 1.1f);
}

TEST_F(Steps, TheNewestRowTakenBackAndWrittenAnewBeginsAPassage) {
  step(0, 500, 499);
  step(0, 501, 500);
  EXPECT_TRUE(step(0, 501, 500));
  EXPECT_EQ(steps(), 1u);
}

TEST_F(Steps, ARewindInAFullWindowBeginsAPassage) {
  step(0, 300, 299);
  for (int64_t i = 1; i < 100; ++i) step(i, 300 + i, 299 + i);
  EXPECT_EQ(steps(), 100u);
  step(10, 310, 309);  // 89 tokens back; as many cells are shown as before
  EXPECT_EQ(steps(), 1u);
}

TEST_F(Steps, APositionGrowsWithEveryTokenInAFullWindowToo) {
  const auto position = [&] { return entry_.passages.current().position; };
  step(0, 280, 279);
  EXPECT_EQ(position(), 280);
  step(0, 281, 280);
  EXPECT_EQ(position(), 281);
  step(0, 300, 299);  // a few rows at once
  EXPECT_EQ(position(), 300);
  for (int64_t i = 1; i < 100; ++i) {
    step(i, 300 + i, 299 + i);
    EXPECT_EQ(position(), 300 + i);
  }
  const auto position_of = [&](int64_t begin, int64_t end, int64_t row) {
    std::vector<uint64_t> visible(kCells / 64);
    for (int64_t i = begin; i < end; ++i) visible[static_cast<size_t>(i / 64)] |= uint64_t{1} << (i % 64);
    return entry_.passages.position_of(visible, end - begin, row);
  };
  EXPECT_EQ(position_of(99, 399, 0), 399);
  EXPECT_EQ(position_of(100, 400, 1), 400) << "the next row of the step";
  EXPECT_EQ(position_of(102, 402, 3), 402);
  EXPECT_EQ(position_of(500, 620, 1), 120) << "a row of another sequence";
  step(99, 399, 398);  // the newest row anew: another passage
  EXPECT_EQ(position(), 300);
}

TEST_F(Steps, RowsTakenBackLeaveTheIndexAndThoseOfAnotherSequenceDoNot) {
  step(0, 500, 499);
  step(0, 450, 449);  // fifty tokens were taken back
  EXPECT_EQ(entry_.index.rows_written(), kCells - 50);
  step(600, 640, 639);  // a short answer in another slot
  EXPECT_EQ(entry_.index.rows_written(), kCells - 50);
  step(0, 451, 450);
  EXPECT_EQ(entry_.index.rows_written(), kCells - 50);
}

TEST_F(Steps, FewerCellsThanBeforeBeginAPassage) {
  for (int64_t i = 0; i < 10; ++i) step(0, 500 + i, 499 + i);
  step(0, 505, 504);  // a draft of which four tokens were rejected
  EXPECT_EQ(steps(), 1u);
}

// Sequences that are decoded in turns.
class Turns : public Steps {
 protected:
  using Cells = std::vector<std::pair<int64_t, int64_t>>;  // [begin, end)

  // A step that shows these and has written the last of them, unless another cell is named.
  bool step(const Cells& shown) { return step(shown, shown.back().second - 1); }
  bool step(const Cells& shown, int64_t cell) {
    entry_.written = {static_cast<int32_t>(cell)};
    entry_.written_since_step += 1;
    std::vector<uint64_t> visible(kCells / 64);
    int64_t count = 0;
    for (const auto& [begin, end] : shown) {
      for (int64_t i = begin; i < end; ++i, ++count) visible[static_cast<size_t>(i / 64)] |= uint64_t{1} << (i % 64);
    }
    return entry_.begin_step(visible, count, kMaxRows);
  }
};

TEST_F(Turns, EachGoesOnFromItsOwn) {
  for (int64_t i = 1; i <= 20; ++i) {
    EXPECT_TRUE(step({{0, 400}, {500, 510 + i}}));
    EXPECT_EQ(steps(), static_cast<uint64_t>(i)) << "the longer one";
    EXPECT_TRUE(step({{0, 400}, {600, 600 + i}}));
    EXPECT_EQ(steps(), static_cast<uint64_t>(i)) << "fewer cells are shown, and nothing was taken back";
  }
  EXPECT_LT(entry_.tau_factor(), 1.1f);
  for (int64_t i = 21; i <= 23; ++i) {
    step({{0, 400}, {500, 510 + i}});
    EXPECT_EQ(steps(), static_cast<uint64_t>(i)) << "the other one shows fewer cells, too, but other ones";
  }
  EXPECT_EQ(entry_.index.rows_written(), kCells);
}

TEST_F(Turns, ARewindGoesOnFromNoEarlierPassage) {
  step({{0, 400}});
  step({{0, 900}});
  step({{0, 401}});
  EXPECT_EQ(steps(), 1u) << "a request that is asked again begins as it did";
  EXPECT_EQ(entry_.index.rows_written(), kCells - 499);
}

TEST_F(Turns, RowsTakenBackLeaveButForThoseThatAnotherShows) {
  step({{0, 400}, {500, 550}});
  step({{300, 400}, {600, 640}});
  step({{0, 380}, {500, 501}}, 500);  // of the first: 20 shared ones and 49 of its own
  EXPECT_EQ(steps(), 1u);
  EXPECT_EQ(entry_.index.rows_written(), kCells - 49);
}

TEST_F(Turns, WhatWasOverwrittenIsNoLongerGoneOnFrom) {
  const auto overwrite = [&](int64_t cell) { entry_.passages.note_write(cell, cell + 1); };
  step({{0, 400}});
  step({{500, 800}});
  step({{500, 801}});
  overwrite(100);
  step({{0, 401}});
  EXPECT_EQ(steps(), 1u) << "another text in the cells of the first";
  overwrite(400);
  step({{0, 402}});
  EXPECT_EQ(steps(), 2u) << "in a window, a cell that was just left";
  entry_.written_since_step = 65;
  step({{0, 440}});
  EXPECT_EQ(steps(), 3u) << "more of the same text";
  overwrite(300);
  entry_.written_since_step = 65;
  step({{0, 460}});
  EXPECT_EQ(steps(), 1u) << "a prompt in its cells";
  step({{500, 802}});
  EXPECT_EQ(steps(), 3u);
}

TEST_F(Turns, TheOldestOfFiveIsForgotten) {
  for (int64_t round = 1; round <= 3; ++round) {
    for (int64_t sequence = 0; sequence < 4; ++sequence) {
      step({{200 * sequence, 200 * sequence + 100 + round}});
      EXPECT_EQ(steps(), static_cast<uint64_t>(round));
    }
  }
  step({{900, 1000}});
  for (int64_t sequence = 3; sequence >= 0; --sequence) {
    step({{200 * sequence, 200 * sequence + 104}});
    EXPECT_EQ(steps(), sequence > 0 ? 4u : 1u);
  }
}

// Two layers of which the first 960 cells are in the index and known.
class Nets : public ::testing::Test {
 protected:
  static constexpr int64_t kDim = 64, kShown = 960;

  struct Cache {
    std::vector<float> k = std::vector<float>(kCells * kDim), v = k;
    CacheLayer layer;
  };

  Nets() {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (Cache& cache : caches_) {
      for (std::vector<float>* rows : {&cache.k, &cache.v}) {
        for (float& x : *rows) x = normal(random);
      }
      KvView& kv = cache.layer.view;
      kv.num_kv_heads = 1;
      kv.head_dim = kv.v_head_dim = kDim;
      kv.kv_len = cache.layer.cells = kCells;
      for (RowsView* rows : {&kv.k, &kv.v}) {
        *rows = {.data = rows == &kv.k ? cache.k.data() : cache.v.data(), .dtype = DType::kF32};
        rows->token_stride_bytes = rows->head_stride_bytes = kDim * 4;
      }
      cache.layer.streams.push_back(std::make_unique<StreamIndex>(
          IndexOptions{.segment_tokens = 512, .provisional_tokens = 64}, KvShape{1, kDim, kDim}));
      KvIndex& index = cache.layer.streams[0]->index;
      index.write(0, kShown);
      index.maintain(kv);
      show(cache, kShown);
      EXPECT_EQ(index.rows_indexed(), kShown - index.options().sink_tokens);
    }
  }

  // A step that shows `cells` cells but [hidden, hidden_end).
  void show(Cache& cache, int64_t cells, int64_t hidden = 0, int64_t hidden_end = 0) {
    std::vector<uint64_t> visible(kCells / 64);
    for (int64_t i = 0; i < cells; ++i) {
      if (i < hidden || i >= hidden_end) visible[static_cast<size_t>(i / 64)] |= uint64_t{1} << (i % 64);
    }
    StreamIndex& entry = *cache.layer.streams[0];
    ++entry.passages.current().steps;
    watch_.before_step(cache.layer, 0, visible, true, {});
  }
  static void change(Cache& cache, int64_t begin, int64_t count) {
    for (std::vector<float>* rows : {&cache.k, &cache.v}) {
      for (int64_t i = begin * kDim; i < (begin + count) * kDim; ++i) (*rows)[static_cast<size_t>(i)] += 1;
    }
  }
  static int64_t indexed(const Cache& cache, int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i)
      count += (cache.layer.streams[0]->index.indexed_word(i / 64) >> (i % 64) & 1) != 0;
    return count;
  }

  CacheWatch watch_;
  Cache caches_[2];
};

TEST_F(Nets, ACellNeverSeenWrittenHasAllRowsCompared) {
  for (Cache& cache : caches_) change(cache, 600, 4);
  show(caches_[0], kShown);
  EXPECT_EQ(indexed(caches_[0], 600, 604), 4) << "nothing has told";
  show(caches_[0], kShown + 1);
  EXPECT_EQ(indexed(caches_[0], 600, 604), 0);
  EXPECT_EQ(indexed(caches_[0], 576, 640), 60) << "and no others go";
  show(caches_[1], kShown);
  EXPECT_EQ(indexed(caches_[1], 600, 604), 0) << "in any other layer too";
}

TEST_F(Nets, ARowThatAStepFoundChangedHasAllRowsCompared) {
  for (Cache& cache : caches_) change(cache, 600, 4);
  watch_.compare_again();
  for (Cache& cache : caches_) {
    show(cache, kShown);
    EXPECT_EQ(indexed(cache, 600, 604), 0);
  }
}

TEST_F(Nets, WhatCameBackIsRewrittenIfAnyOfItChanged) {
  show(caches_[0], kShown, 300, 364);
  show(caches_[0], kShown, 300, 364);
  change(caches_[0], 310, 2);
  change(caches_[1], 700, 4);
  show(caches_[0], kShown);
  EXPECT_EQ(indexed(caches_[0], 300, 364), 0) << "one row in 256 slips through a check";
  EXPECT_EQ(indexed(caches_[0], 364, kShown), kShown - 364);
  show(caches_[1], kShown);
  EXPECT_EQ(indexed(caches_[1], 700, 704), 0) << "in any other layer too";
}

TEST_F(Nets, AComparisonThatIsDueIsMadeThoughWhatCameBackChanged) {
  for (const bool told : {false, true}) {  // by a step that found a changed row, or by a cell never seen written
    Cache& cache = caches_[told ? 1 : 0];
    show(cache, kShown, 300, 364);
    show(cache, kShown, 300, 364);
    change(cache, 310, 2);
    change(cache, 600, 4);
    if (told) watch_.compare_again();
    show(cache, told ? kShown : kShown + 1);
    EXPECT_EQ(indexed(cache, 300, 364), 0);
    EXPECT_EQ(indexed(cache, 600, 604), 0) << "told " << told;
    EXPECT_EQ(indexed(cache, 576, 640), 60);
  }
}

TEST_F(Nets, TokensOfCellsThatChangedUnseenAreLookedAtAgain) {
  Cache& cache = caches_[0];
  StreamIndex& entry = *cache.layer.streams[0];
  std::vector<uint64_t> visible(kCells / 64, ~uint64_t{0});
  const auto put = [&](int64_t cell, int64_t token) {
    std::copy_n(cache.v.begin() + token * kDim, kDim, cache.v.begin() + cell * kDim);
  };
  put(100, kCells - 1);
  std::vector<int32_t> rows;
  entry.earlier_places.find(cache.layer.view, visible, {}, 8, rows);
  EXPECT_EQ(rows, (std::vector<int32_t>{99, 100, 101, 102}));
  put(100, 5);
  put(200, kCells - 1);
  watch_.compare_again();
  show(cache, kShown);
  entry.earlier_places.find(cache.layer.view, visible, {}, 8, rows);
  EXPECT_EQ(rows, (std::vector<int32_t>{199, 200, 201, 202}));
}

TEST(CacheWatch, ForgetsTheOldestOfManyLayersThatNoBackendHasComputedWith) {
  constexpr int64_t kRows = 32;
  constexpr size_t kBytes = 64 * 2 * kRows;
  ggml_context* context = ggml_init({.mem_size = size_t{4} << 20, .mem_buffer = nullptr, .no_alloc = true});
  char* const memory = reinterpret_cast<char*>(size_t{1} << 40);  // nothing is read
  CacheWatch watch;
  const auto layer = [&](size_t number) {
    ggml_reset(context);
    AttentionMatch match{};
    for (const ggml_tensor** rows : {&match.k, &match.v}) {
      ggml_tensor* cache = ggml_new_tensor_3d(context, GGML_TYPE_F16, 64, kRows, 1);
      cache->data = memory + (2 * number + (rows == &match.v)) * kBytes;
      *rows = ggml_view_4d(context, cache, 64, kRows, 1, 1, cache->nb[1], cache->nb[1], cache->nb[2], 0);
    }
    match.q = match.k;
    return watch.layer_of(match, {});
  };
  const int owner = 0;
  for (size_t i = 0; i < 1200; ++i) watch.set_owner(*layer(i), &owner);
  const std::shared_ptr<CacheLayer> owned = layer(0), free = layer(1200);
  for (size_t i = 1201; i < 2224; ++i) layer(i);
  EXPECT_EQ(layer(1200), free) << "one of 1024";
  for (size_t i = 2224; i < 3247; ++i) layer(i);
  EXPECT_EQ(layer(1200), free) << "used since";
  for (size_t i = 3247; i < 4271; ++i) layer(i);
  EXPECT_NE(layer(1200), free);
  EXPECT_EQ(layer(0), owned);
  ggml_free(context);
}

}  // namespace
}  // namespace tactic::plugin
