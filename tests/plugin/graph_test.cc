// Graphs made by hand, for caches that the test model does not have: sliding windows, masks with other values, memory
// that changes between graphs.
#include <sys/mman.h>

#include "graph_layer.h"

namespace tactic::test {
namespace {

class Graph : public ::testing::Test {
 protected:
  void SetUp() override {
    Host::plugin_device();
    forget_indexes();
    configure(kSparse);
    take_totals();
  }
};

// A ring of cells: each new token overwrites the oldest, and the mask shows a window of the newest only.
double windowed_error(int64_t cells, int64_t window) {
  Layer layer(cells);
  Rows rows(7);
  double worst = 0;
  const int64_t tokens = cells + cells / 2;
  std::vector<float> mask(static_cast<size_t>(cells), kHidden);
  layer.write(0, rows.keys(256), rows.values(256));
  std::fill_n(mask.begin(), 256, 0.0f);
  layer.attend(rows.query(), mask);  // from now on the layer is known
  for (int64_t begin = 256; begin < tokens; begin += 128) layer.write(begin, rows.keys(128), rows.values(128));
  for (int64_t t = tokens; t < tokens + 24; ++t) {
    // What slides out of the window would draw all attention.
    const int64_t out_of_window = (t - window) % cells;
    std::vector<float> loud = rows.query();
    std::vector<float> key(kRowElements), value(kRowElements, 50.0f);
    for (size_t i = 0; i < key.size(); ++i) key[i] = 4 * loud[i];
    layer.write(out_of_window, key, value);
    layer.write(t, rows.keys(1), rows.values(1));
    for (int64_t i = 0; i < cells; ++i)
      mask[static_cast<size_t>(i)] = (t - i % cells + cells) % cells < window ? 0.0f : kHidden;
    worst = std::max(worst, layer.error(rows.query(), mask));
  }
  return worst;
}

TEST_F(Graph, SlidingWindow) {
  const double error = windowed_error(1536, 1024);
  const tactic_totals totals = take_totals();
  std::printf("  window: error %.4f, %lld sparse of %lld\n", error, static_cast<long long>(totals.sparse_queries),
              static_cast<long long>(totals.queries));
  EXPECT_GT(totals.sparse_queries, 12);
  EXPECT_LT(error, kBound);
  configure(kSparse + ",fault=mask");
  EXPECT_GT(windowed_error(1536, 1024), kBound) << "the mask does not matter";
}

// In a full window every step sees as many rows as the one before, and draws others all the same.
TEST_F(Graph, StepsInAFullWindowDrawAnew) {
  configure(kIndexOptions + ",tau=60,refine=1,beta=1,places=0");
  constexpr int64_t kCells = 1024;
  constexpr int kSteps = 40, kFirst = 8;
  Layer layer(kCells);
  Rows rows(31);
  const std::vector<float> keys = rows.keys(kCells), values = rows.values(kCells), q = rows.query();
  const std::vector<float> mask(kCells, 0.0f);
  layer.write(0, keys, values);
  const std::vector<double> exact = layer.reference(q, mask);
  std::vector<double> sum(exact.size(), 0);
  double alone = 0;
  for (int64_t step = 0; step < kSteps; ++step) {  // the cell of the newest token, which says what was there before
    const auto row = [&](const std::vector<float>& all) {
      return std::vector<float>(all.begin() + step * kRowElements, all.begin() + (step + 1) * kRowElements);
    };
    layer.write(step, row(keys), row(values));
    const std::vector<float> out = layer.attend(q, mask);
    if (step < kFirst) continue;  // they read more
    for (size_t i = 0; i < out.size(); ++i) sum[i] += out[i];
    alone += relative_error(out, exact) / (kSteps - kFirst);
  }
  const double mean = relative_error(sum, exact, 1.0 / (kSteps - kFirst));
  std::printf("  full window: error %.4f of a step, %.4f of the mean of %d\n", alone, mean, kSteps - kFirst);
  EXPECT_EQ(take_totals().sparse_queries, kSteps);
  EXPECT_LT(mean, 0.4 * alone);
}

// Between min_context and min_sparse a window is not worth a cluster, a context that grows is: it will be long.
TEST_F(Graph, AContextThatGrowsIsClusteredBeforeItIsSelectedFrom) {
  configure("segment=256,provisional=64");
  constexpr int64_t kCells = 3072;
  Layer layer(kCells);
  Rows rows(18);
  std::vector<float> mask(kCells, kHidden);
  layer.write(0, rows.keys(1300), rows.values(1300));
  take_totals();
  const auto step = [&](int64_t visible) {
    std::fill_n(mask.begin(), visible, 0.0f);
    EXPECT_LT(layer.error(rows.query(), mask), visible < 2048 ? 1e-3 : kBound) << visible << " rows";
    return take_totals();
  };
  for (int i = 0; i < 20; ++i) EXPECT_EQ(step(1200).dense_queries, 1);
  layer.write(1300, rows.keys(kCells - 1300), rows.values(kCells - 1300));
  const tactic_totals window = step(1200), growing = step(1201);
  EXPECT_GT(growing.index_memory_bytes, window.index_memory_bytes);
  EXPECT_EQ(growing.dense_queries, 1);
  EXPECT_EQ(step(2047).dense_queries, 1);
  const tactic_totals first = step(2048);
  EXPECT_EQ(first.dense_queries, 0);
  for (int64_t visible = 2049; visible < 2056; ++visible) step(visible);
  const auto rows_read = [](const tactic_totals& totals) { return totals.tokens_certain + totals.tokens_sampled; };
  EXPECT_GT(rows_read(first), 1.2 * static_cast<double>(rows_read(step(2056)))) << "as the first step after a prompt";
}

// A short window in a long ring is not worth a selection, nor its rows a cluster; a query that sees more is.
TEST_F(Graph, ShortWindowIsReadDensely) {
  configure("min_context=1024,segment=256,provisional=64,error=0.03");
  constexpr int64_t kCells = 1536;
  Layer layer(kCells);
  Rows rows(17);
  std::vector<float> mask(kCells, kHidden);
  layer.write(0, rows.keys(kCells), rows.values(kCells));
  std::fill_n(mask.begin(), 512, 0.0f);
  double worst = 0;
  for (int step = 0; step < 20; ++step) worst = std::max(worst, layer.error(rows.query(), mask));
  EXPECT_LT(worst, 1e-3);
  tactic_totals totals = take_totals();
  EXPECT_EQ(totals.sparse_queries, 0);
  EXPECT_EQ(totals.queries, 20);
  const int64_t before = totals.index_memory_bytes;
  layer.write(0, rows.keys(256), rows.values(256));  // as a prompt
  EXPECT_LE(take_totals().index_memory_bytes, before) << "rows that no step can see are clustered";
  std::fill_n(mask.begin(), 1200, 0.0f);
  for (int step = 0; step < 4; ++step) EXPECT_LT(layer.error(rows.query(), mask), kBound);
  totals = take_totals();
  EXPECT_EQ(totals.sparse_queries, 4);
  EXPECT_GT(totals.index_memory_bytes, before);
}

// Two sequences in one cache, a short one in the first row.
TEST_F(Graph, AShortRowLeavesTheOthersSparse) {
  configure("min_context=1024,segment=256,provisional=64,error=0.03");
  constexpr int64_t kCells = 1536, kShort = 400;
  for (const size_t long_row : {0, 1}) {
    Layer layer(kCells);
    Rows rows(18);
    std::vector<float> mask(2 * kCells, kHidden);
    std::fill_n(mask.begin() + static_cast<int64_t>(1 - long_row) * kCells, kShort, 0.0f);  // enough for a selection
    std::fill_n(mask.begin() + static_cast<int64_t>(long_row) * kCells + kShort, kCells - kShort, 0.0f);
    layer.write(0, rows.keys(kCells), rows.values(kCells));
    take_totals();
    for (int step = 0; step < 20; ++step) EXPECT_LT(layer.error(rows.query(2), mask, 2), kBound);
    tactic_totals totals = take_totals();
    EXPECT_EQ(totals.queries, 40);
    EXPECT_EQ(totals.sparse_queries, 20) << "long row " << long_row;
    layer.write(kShort, rows.keys(kCells - kShort), rows.values(kCells - kShort));  // another prompt
    EXPECT_LT(layer.error(rows.query(2), mask, 2), kBound);
    EXPECT_EQ(take_totals().sparse_queries, 1);
  }
}

// KV heads on the dimension where streams are: no index is theirs.
TEST_F(Graph, HeadsOnTheLastDimensionAreExact) {
  configure(kSparse + ",check=0");
  constexpr int64_t kCells = 1024;
  Layer layer(kCells, 2);
  Rows rows(19), others(20);
  layer.use_stream(1);
  layer.write(0, others.keys(kCells), others.values(kCells));
  layer.use_stream(0);
  layer.write(0, rows.keys(kCells), rows.values(kCells));
  const std::vector<float> q = rows.query(), visible(kCells, 0.0f);
  ContextPtr context = make_context();
  ggml_context* c = context.get();
  ggml_tensor *query = ggml_new_tensor_4d(c, GGML_TYPE_F32, kDim, 1, kQueryHeads / kKvHeads, kKvHeads),
              *mask = ggml_new_tensor_4d(c, GGML_TYPE_F16, kCells, 1, 1, kKvHeads);
  const auto view = [&](ggml_tensor* cache) {
    ggml_tensor* of_stream = ggml_view_4d(c, cache, kDim, kKvHeads, kCells, 1, ggml_row_size(cache->type, kDim),
                                          cache->nb[1], cache->nb[2], 0);
    return ggml_permute(c, of_stream, 0, 3, 1, 2);
  };
  ggml_tensor* out = ggml_flash_attn_ext(c, query, view(layer.k()), view(layer.v()), mask, kScale, 0, 0);
  const BufferPtr buffer(ggml_backend_alloc_ctx_tensors_from_buft(c, ggml_backend_cpu_buffer_type()));
  std::memcpy(query->data, q.data(), ggml_nbytes(query));
  std::memset(mask->data, 0, ggml_nbytes(mask));
  ASSERT_TRUE(ggml_backend_dev_supports_op(Host::plugin_device(), out));
  ggml_cgraph* graph = ggml_new_graph(c);
  ggml_build_forward_expand(graph, out);
  const BackendPtr backend(ggml_backend_dev_init(Host::plugin_device(), nullptr));
  for (int step = 0; step < 4; ++step) ASSERT_EQ(ggml_backend_graph_compute(backend.get(), graph), GGML_STATUS_SUCCESS);
  const std::vector<double> expected = layer.reference(q, visible);
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double d = static_cast<const float*>(out->data)[i] - expected[i];
    difference += d * d;
    norm += expected[i] * expected[i];
  }
  EXPECT_LT(std::sqrt(difference / norm), 1e-3);
}

// ggml's own cases have scores so small that they hardly tell.
TEST_F(Graph, WhatBendsScoresIsDeclined) {
  constexpr int64_t kCells = 512;
  Layer layer(kCells);
  Rows rows(23);
  layer.write(0, rows.keys(kCells), rows.values(kCells));
  ContextPtr context = make_context();
  ggml_context* c = context.get();
  ggml_tensor *query = ggml_new_tensor_4d(c, GGML_TYPE_F32, kDim, 1, kQueryHeads, 1),
              *mask = ggml_new_tensor_4d(c, GGML_TYPE_F16, kCells, 1, 1, 1),
              *by_head = ggml_new_tensor_4d(c, GGML_TYPE_F16, kCells, 1, kQueryHeads, 1),
              *sinks = ggml_new_tensor_1d(c, GGML_TYPE_F32, kQueryHeads);
  const auto view = [&](ggml_tensor* cache) {
    return ggml_view_4d(c, cache, kDim, kCells, kKvHeads, 1, cache->nb[1], ggml_row_size(cache->type, kDim),
                        cache->nb[2], 0);
  };
  const auto taken = [&](ggml_tensor* shown, float max_bias, float softcap, ggml_tensor* added, float scale = kScale) {
    ggml_tensor* out = ggml_flash_attn_ext(c, query, view(layer.k()), view(layer.v()), shown, scale, max_bias, softcap);
    ggml_flash_attn_ext_add_sinks(out, added);
    return ggml_backend_dev_supports_op(Host::plugin_device(), out);
  };
  EXPECT_TRUE(taken(mask, 0, 0, nullptr));
  EXPECT_FALSE(taken(mask, 8, 0, nullptr)) << "ALiBi";
  EXPECT_FALSE(taken(mask, 0, 50, nullptr)) << "soft-capping";
  EXPECT_FALSE(taken(mask, 0, 0, sinks)) << "sinks";
  EXPECT_FALSE(taken(by_head, 0, 0, nullptr)) << "a mask for each head";
  EXPECT_FALSE(taken(mask, 0, 0, nullptr, NAN)) << "the library refuses it, and the step would fail";
}

TEST_F(Graph, MaskWithOtherValuesIsExact) {
  Layer layer(1024);
  Rows rows(8);
  layer.write(0, rows.keys(1000), rows.values(1000));
  std::vector<float> mask(1024, kHidden);
  for (size_t i = 0; i < 1000; ++i) mask[i] = i % 3 == 0 ? 0.0f : -0.01f * static_cast<float>(1000 - i);
  const double error = layer.error(rows.query(), mask);
  const tactic_totals totals = take_totals();
  EXPECT_EQ(totals.dense_queries, 1) << "a bias is no visibility";
  EXPECT_LT(error, 1e-3);
  for (size_t i = 0; i < 1000; ++i) mask[i] = i % 2 == 0 ? 0.0f : -0.0f;
  EXPECT_LT(layer.error(rows.query(), mask), kBound);
  EXPECT_EQ(take_totals().sparse_queries, 1) << "minus zero is zero";
}

TEST_F(Graph, RowsOfOneNodeHaveMasksOfTheirOwn) {
  Layer layer(1024);
  Rows rows(9);
  layer.write(0, rows.keys(1024), rows.values(1024));
  const int64_t count = 5;
  std::vector<float> mask(static_cast<size_t>(count * 1024), kHidden);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t i = 0; i < 1024; ++i) {
      const bool visible = r == 0 ? i < 900 : r == 1 ? i % 2 == 0 : r == 2 ? i >= 300 : r == 3 ? i == 17 : i < 1024;
      if (visible) mask[static_cast<size_t>(r * 1024 + i)] = 0;
    }
  }
  EXPECT_LT(layer.error(rows.query(count), mask, count), kBound);
  const tactic_totals totals = take_totals();
  EXPECT_EQ(totals.queries, count);
  EXPECT_GE(totals.sparse_queries, 3);
}

// A query that sees nothing gives zeros, and the others are not disturbed.
TEST_F(Graph, RowThatSeesNothing) {
  Layer layer(512);
  Rows rows(10);
  layer.write(0, rows.keys(512), rows.values(512));
  std::vector<float> mask(2 * 512, kHidden);
  std::fill_n(mask.begin() + 512, 512, 0.0f);
  const std::vector<float> q = rows.query(2), got = layer.attend(q, mask, 2);
  ASSERT_TRUE(layer.taken);
  for (int64_t i = 0; i < kQueryHeads * kDim; ++i) ASSERT_EQ(got[static_cast<size_t>(i)], 0.0f);
  for (const float x : got) ASSERT_TRUE(std::isfinite(x));
}

TEST_F(Graph, EmptyCacheIsDeclinedAndForgotten) {
  Layer layer(1024);
  Rows rows(11);
  const std::vector<float> visible(1024, 0.0f);
  layer.attend(rows.query(), visible);
  EXPECT_FALSE(layer.taken) << "the host asks a new context who takes its attention";
  layer.write(0, rows.keys(1024), rows.values(1024));
  EXPECT_LT(layer.error(rows.query(), visible), kBound);
  EXPECT_EQ(take_totals().sparse_queries, 1);
  EXPECT_GT(take_totals().kv_memory_bytes, 0);
  layer.zero();  // a new context got the memory
  layer.attend(rows.query(), visible);
  EXPECT_FALSE(layer.taken);
  EXPECT_EQ(take_totals().kv_memory_bytes, 0) << "what was known is of an earlier cache";
}

// A slot that is used for the first time shows its empty stream; the other slots' indexes are still good.
TEST_F(Graph, EmptyStreamForgetsItselfOnly) {
  Layer layer(1024, 2);
  Rows rows(14);
  const std::vector<float> visible(1024, 0.0f);
  layer.write(0, rows.keys(1024), rows.values(1024));
  EXPECT_LT(layer.error(rows.query(), visible), kBound);
  const tactic_totals before = take_totals();
  EXPECT_GT(before.index_memory_bytes, 0);
  layer.use_stream(1);
  layer.attend(rows.query(), visible);
  EXPECT_FALSE(layer.taken);
  const tactic_totals after = take_totals();
  EXPECT_EQ(after.kv_memory_bytes, before.kv_memory_bytes);
  EXPECT_EQ(after.index_memory_bytes, before.index_memory_bytes);
  layer.write(0, rows.keys(1024), rows.values(1024));
  EXPECT_LT(layer.error(rows.query(), visible), kBound);
  layer.use_stream(0);
  EXPECT_LT(layer.error(rows.query(), visible), kBound);
}

// The memory of a context that is gone, cut up differently: K of a new layer lies where V of an old one was, and the
// old K is no longer there. A write into the new layer must not be taken for one into the old.
TEST_F(Graph, MemoryCutUpDifferently) {
  constexpr int64_t kCells = 512;
  constexpr size_t kBytes = kCells * kRowElements * 2;  // whole pages
  Rows rows(15);
  const std::vector<float> visible(kCells, 0.0f);
  void* const memory = mmap(nullptr, 3 * kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  char* const at = static_cast<char*>(memory);
  BackendPtr backend;  // while it lives, nobody says that the old layer is gone
  {
    Layer old(kCells, 1, at, at + kBytes);
    old.write(0, rows.keys(kCells), rows.values(kCells));
    EXPECT_LT(old.error(rows.query(), visible), kBound);
    backend = old.take_backend();
  }
  munmap(at, kBytes);
  {
    Layer layer(kCells, 1, at + kBytes, at + 2 * kBytes);
    layer.attend(rows.query(), visible);                     // as the host asks a new context
    layer.write(0, rows.keys(kCells), rows.values(kCells));  // clusters as it goes
    EXPECT_LT(layer.error(rows.query(), visible), kBound);
    EXPECT_EQ(take_totals().kv_memory_bytes, 2 * static_cast<int64_t>(kBytes)) << "the old layer is forgotten";
  }
  munmap(at + kBytes, 2 * kBytes);
}

TEST_F(Graph, IndexesGoWithTheirContext) {
  Rows rows(16);
  const std::vector<float> visible(1024, 0.0f);
  Layer stays(1024);
  stays.write(0, rows.keys(1024), rows.values(1024));
  EXPECT_LT(stays.error(rows.query(), visible), kBound);
  const int64_t bytes = take_totals().index_memory_bytes;
  EXPECT_GT(bytes, 0);
  {
    Layer goes(1024);
    goes.write(0, rows.keys(1024), rows.values(1024));
    EXPECT_LT(goes.error(rows.query(), visible), kBound);
    EXPECT_GT(take_totals().index_memory_bytes, bytes * 3 / 2);
  }
  EXPECT_EQ(take_totals().index_memory_bytes, bytes);
  EXPECT_LT(stays.error(rows.query(), visible), kBound);
  EXPECT_EQ(take_totals().sparse_queries, 1) << "the other's is still there";
}

// A text that grows; all of it is shown.
struct Text {
  explicit Text(uint64_t seed) : rows(seed) {}
  void write(int64_t count) {
    layer.write(cells, rows.keys(count), rows.values(count));
    std::fill_n(mask.begin() + cells, count, 0.0f);
    cells += count;
  }
  Layer layer{2048};
  Rows rows;
  std::vector<float> mask = std::vector<float>(2048, kHidden);
  int64_t cells = 0;
};

// Rows of a prompt are more than a decode step has, and the first steps after them read more.
TEST_F(Graph, FirstStepsAfterAPromptReadMore) {
  configure(kIndexOptions + ",tau=100");
  Text text(14);
  const auto rows_read = [&] {  // by single steps, averaged over the same step of 8 passages
    std::vector<double> read(6);
    for (int passage = 0; passage < 8; ++passage) {
      text.write(9);
      for (double& sum : read) {
        text.write(1);
        take_totals();
        text.layer.attend(text.rows.query(), text.mask);
        const tactic_totals totals = take_totals();
        sum += static_cast<double>(totals.tokens_certain + totals.tokens_sampled) / 8;
      }
    }
    return read;
  };
  text.write(1536);
  text.layer.attend(text.rows.query(), text.mask);
  const std::vector<double> read = rows_read();
  std::printf("  rows read by steps after a prompt: %.0f %.0f %.0f .. %.0f\n", read[0], read[1], read[2], read[5]);
  EXPECT_GT(read[0], 1.5 * read[5]);
  EXPECT_GT(read[1], 1.1 * read[5]);
}

// Rows around earlier places of the current token, known by the first layer's values, are read for certain.
TEST_F(Graph, RowsAroundEarlierPlacesOfTheTokenAreRead) {
  configure(kIndexOptions + ",tau=1,refine=1");
  for (const int64_t stream : {0, 1}) {
    int64_t certain[2];
    for (const bool repeated : {false, true}) {
      Layer layer(2048, 2);
      layer.use_stream(stream);
      Rows rows(15);
      const std::vector<float> values = rows.values(1600), other = rows.values(1);
      std::vector<float> token(values.begin() + 1599 * kRowElements, values.end()), all = values;
      for (int64_t place = 300; place < 1000; place += 100)  // seven
        std::copy(token.begin(), token.end(), all.begin() + place * kRowElements);
      if (!repeated) std::copy(other.begin(), other.end(), all.begin() + 1599 * kRowElements);
      layer.write(0, rows.keys(1600), all);
      std::vector<float> mask(2048, kHidden);
      std::fill_n(mask.begin(), 1600, 0.0f);
      take_totals();
      layer.attend(rows.query(), mask);
      certain[repeated] = take_totals().tokens_certain;
    }
    EXPECT_EQ(certain[1] - certain[0], 7 * 4 * kKvHeads) << "four rows each, stream " << stream;
  }
}

TEST_F(Graph, ARewrittenCellIsNoEarlierPlaceAnyMore) {
  configure(kIndexOptions + ",tau=1,refine=1");
  int64_t certain[2];
  for (const bool stood : {false, true}) {
    Layer layer(2048);
    Rows rows(15);
    const std::vector<float> keys = rows.keys(1600), other = rows.values(1), key = rows.keys(1);
    const std::vector<float> q(kQueryHeads * kDim, 0);  // all rows weigh alike: nothing is learned of them
    std::vector<float> values = rows.values(1600);
    const std::vector<float> token(values.end() - kRowElements, values.end());
    std::copy(token.begin(), token.end(), values.begin() + 1000 * kRowElements);
    std::copy_n(stood ? token.begin() : other.begin(), kRowElements, values.begin() + 300 * kRowElements);
    layer.write(0, keys, values);
    std::vector<float> mask(2048, kHidden);
    std::fill_n(mask.begin(), 1600, 0.0f);
    layer.attend(q, mask);
    layer.write(300, key, other);
    layer.write(1599, key, token);
    take_totals();
    layer.attend(q, mask);
    certain[stood] = take_totals().tokens_certain;
  }
  EXPECT_EQ(certain[0], certain[1]);
}

// What a slot of a server is to its cache.
TEST_F(Graph, ASequenceIsReadAlikeInAnyStream) {
  Layer layer(1024, 2);
  const std::vector<float> visible(1024, 0.0f);
  std::vector<float> answers[2];
  for (const int64_t stream : {0, 1}) {
    Rows rows(23);
    layer.use_stream(stream);
    layer.write(0, rows.keys(1024), rows.values(1024));
    for (int step = 0; step < 4; ++step) {
      const std::vector<float> out = layer.attend(rows.query(), visible);
      answers[stream].insert(answers[stream].end(), out.begin(), out.end());
    }
  }
  EXPECT_EQ(take_totals().sparse_queries, 8);
  EXPECT_EQ(answers[0], answers[1]);
}

// A prompt is clustered as it comes; rows that are decoded at every fourth step, so that layers take turns.
TEST_F(Graph, RowsAreClusteredAsTheyCome) {
  configure(kIndexOptions + ",tau=1,refine=1,places=0");
  Text text(22);
  const std::vector<float> q(kQueryHeads * kDim, 0);
  text.write(512);
  text.layer.attend(q, text.mask);  // from now on the layer is known
  const int64_t bytes = take_totals().index_memory_bytes;
  text.write(509);
  EXPECT_GT(take_totals().index_memory_bytes, bytes * 3 / 2);
  int64_t before = 0, drops = 0;
  for (int step = 1; step <= 200; ++step) {
    text.write(1);
    text.layer.attend(q, text.mask);
    const int64_t certain = take_totals().tokens_certain / kKvHeads;
    EXPECT_LE(certain, 4 + 64 + 4) << "sinks, a small segment, and the steps until its turn; step " << step;
    if (certain < before - 32) {
      ++drops;
      EXPECT_EQ(step % 4, 0);
    }
    before = certain;
  }
  EXPECT_EQ(drops, 4);
}

}  // namespace
}  // namespace tactic::test
