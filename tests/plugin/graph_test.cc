// Graphs made by hand, for caches that the test model does not have: sliding windows, masks with other values, memory
// that changes between graphs. The oracle is softmax attention in double precision.
#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <ggml.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "llama_session.h"

namespace tactic::test {
namespace {

constexpr int64_t kDim = 64, kQueryHeads = 4, kKvHeads = 2, kRowElements = kDim * kKvHeads;
constexpr float kScale = 0.125f;  // 1 / sqrt(kDim)
// error=0.01 is meant for the attention mass; measured here: up to 0.021 of the output's length.
constexpr double kBound = 0.06;

template <class T, void (*free_fn)(T*)>
struct Free {
  void operator()(T* object) const { free_fn(object); }
};
using ContextPtr = std::unique_ptr<ggml_context, Free<ggml_context, ggml_free>>;
using BufferPtr = std::unique_ptr<ggml_backend_buffer, Free<ggml_backend_buffer, ggml_backend_buffer_free>>;
using BackendPtr = std::unique_ptr<ggml_backend, Free<ggml_backend, ggml_backend_free>>;

ContextPtr make_context() {
  return ContextPtr(ggml_init({ggml_tensor_overhead() * 64 + ggml_graph_overhead(), nullptr, true}));
}

/// One layer's cache, and graphs over it as the host makes them.
class Layer {
 public:
  /// In memory of its own, or with K at `k_data` and V at `v_data`.
  explicit Layer(int64_t cells, int64_t streams = 1, char* k_data = nullptr, char* v_data = nullptr) : cells_(cells) {
    device_ = Host::plugin_device();
    backend_.reset(ggml_backend_dev_init(device_, nullptr));
    k_ = ggml_new_tensor_3d(context_.get(), GGML_TYPE_F16, kRowElements, cells, streams);
    v_ = ggml_new_tensor_3d(context_.get(), GGML_TYPE_F16, kRowElements, cells, streams);
    ggml_set_name(k_, "cache_k_l0");
    ggml_set_name(v_, "cache_v_l0");
    if (k_data == nullptr) {
      buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(context_.get(), ggml_backend_cpu_buffer_type()));
    } else {
      char* const first = std::min(k_data, v_data);
      buffer_.reset(ggml_backend_cpu_buffer_from_ptr(
          first, static_cast<size_t>(std::max(k_data, v_data) - first) + ggml_nbytes(v_)));
      ggml_backend_tensor_alloc(buffer_.get(), k_, k_data);
      ggml_backend_tensor_alloc(buffer_.get(), v_, v_data);
    }
    zero();
  }

  void zero() { ggml_backend_buffer_clear(buffer_.get(), 0); }

  /// K and V rows of `count` tokens into cells begin, begin + 1, ... (modulo the number of cells), as SET_ROWS does.
  void write(int64_t begin, const std::vector<float>& k, const std::vector<float>& v) {
    const auto count = static_cast<int64_t>(k.size()) / kRowElements;
    const ContextPtr context = make_context();
    ggml_tensor* k_rows = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, kRowElements, count);
    ggml_tensor* v_rows = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, kRowElements, count);
    ggml_tensor* cells = ggml_new_tensor_1d(context.get(), GGML_TYPE_I64, count);
    const auto all_streams = [&](ggml_tensor* cache) {
      return ggml_reshape_2d(context.get(), cache, kRowElements, cells_ * cache->ne[2]);
    };
    ggml_tensor* k_set = ggml_set_rows(context.get(), all_streams(k_), k_rows, cells);
    ggml_tensor* v_set = ggml_set_rows(context.get(), all_streams(v_), v_rows, cells);
    const BufferPtr buffer(ggml_backend_alloc_ctx_tensors_from_buft(context.get(), ggml_backend_cpu_buffer_type()));
    std::vector<int64_t> numbers(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) numbers[static_cast<size_t>(i)] = stream_ * cells_ + (begin + i) % cells_;
    std::memcpy(k_rows->data, k.data(), k.size() * 4);
    std::memcpy(v_rows->data, v.data(), v.size() * 4);
    std::memcpy(cells->data, numbers.data(), numbers.size() * 8);
    compute(context.get(), {k_set, v_set});
  }

  /// Attention of `rows` queries [rows][kQueryHeads][kDim] with a mask [rows][cells]; the output has the queries'
  /// shape.
  std::vector<float> attend(const std::vector<float>& q, const std::vector<float>& mask, int64_t rows = 1) {
    const ContextPtr context = make_context();
    ggml_tensor* query = ggml_new_tensor_4d(context.get(), GGML_TYPE_F32, kDim, rows, kQueryHeads, 1);
    ggml_tensor* bias = ggml_new_tensor_4d(context.get(), GGML_TYPE_F16, cells_, rows, 1, 1);
    const auto view = [&](ggml_tensor* cache) {
      const size_t row = ggml_row_size(cache->type, kRowElements), head = ggml_row_size(cache->type, kDim);
      return ggml_view_4d(context.get(), cache, kDim, cells_, kKvHeads, 1, row, head, cache->nb[2],
                          static_cast<size_t>(stream_) * cache->nb[2]);
    };
    ggml_tensor* out = ggml_flash_attn_ext(context.get(), query, view(k_), view(v_), bias, kScale, 0, 0);
    const BufferPtr buffer(ggml_backend_alloc_ctx_tensors_from_buft(context.get(), ggml_backend_cpu_buffer_type()));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t h = 0; h < kQueryHeads; ++h) {
        std::memcpy(static_cast<float*>(query->data) + (h * rows + r) * kDim, q.data() + (r * kQueryHeads + h) * kDim,
                    kDim * 4);
      }
    }
    ggml_fp32_to_fp16_row(mask.data(), static_cast<ggml_fp16_t*>(bias->data), rows * cells_);
    taken = ggml_backend_dev_supports_op(device_, out);
    if (!taken) return {};
    compute(context.get(), {out});
    const auto* result = static_cast<const float*>(out->data);
    return {result, result + rows * kQueryHeads * kDim};
  }

  std::vector<double> reference(const std::vector<float>& q, const std::vector<float>& mask, int64_t rows = 1) const {
    std::vector<double> out(q.size(), 0);
    const auto element = [this](const ggml_tensor* cache, int64_t cell, int64_t head, int64_t i) {
      return double{ggml_fp16_to_fp32(
          static_cast<const ggml_fp16_t*>(cache->data)[(stream_ * cells_ + cell) * kRowElements + head * kDim + i])};
    };
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t h = 0; h < kQueryHeads; ++h) {
        const int64_t head = h / (kQueryHeads / kKvHeads), at = (r * kQueryHeads + h) * kDim;
        double sum = 0;
        for (int64_t cell = 0; cell < cells_; ++cell) {
          const double hidden = mask[static_cast<size_t>(r * cells_ + cell)];
          if (hidden == -HUGE_VAL) continue;
          double score = 0;
          for (int64_t i = 0; i < kDim; ++i) score += q[static_cast<size_t>(at + i)] * element(k_, cell, head, i);
          const double weight = std::exp(score * kScale + hidden);
          sum += weight;
          for (int64_t i = 0; i < kDim; ++i) out[static_cast<size_t>(at + i)] += weight * element(v_, cell, head, i);
        }
        for (int64_t i = 0; i < kDim; ++i) out[static_cast<size_t>(at + i)] /= sum;
      }
    }
    return out;
  }

  /// |got - expected| / |expected| over all elements; reports the dense share.
  double error(const std::vector<float>& q, const std::vector<float>& mask, int64_t rows = 1) {
    const std::vector<float> got = attend(q, mask, rows);
    if (got.empty()) return HUGE_VAL;
    const std::vector<double> expected = reference(q, mask, rows);
    double difference = 0, norm = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      difference += (got[i] - expected[i]) * (got[i] - expected[i]);
      norm += expected[i] * expected[i];
    }
    return std::sqrt(difference / norm);
  }

  void use_stream(int64_t stream) { stream_ = stream; }
  ggml_tensor* k() { return k_; }
  ggml_tensor* v() { return v_; }
  bool taken = false;

 private:
  void compute(ggml_context* context, const std::vector<ggml_tensor*>& outputs) {
    ggml_cgraph* graph = ggml_new_graph(context);
    for (ggml_tensor* output : outputs) {
      ASSERT_TRUE(ggml_backend_dev_supports_op(device_, output)) << ggml_op_name(output->op);
      ggml_build_forward_expand(graph, output);
    }
    ASSERT_EQ(ggml_backend_graph_compute(backend_.get(), graph), GGML_STATUS_SUCCESS);
  }

  int64_t cells_, stream_ = 0;
  ggml_backend_dev_t device_ = nullptr;
  ContextPtr context_ = make_context();
  ggml_tensor *k_ = nullptr, *v_ = nullptr;
  BufferPtr buffer_;
  BackendPtr backend_;
};

/// Rows around a few directions per head, as keys of a text are.
class Rows {
 public:
  explicit Rows(uint64_t seed) : random_(seed), directions_(16 * kRowElements) {
    for (float& x : directions_) x = 1.5f * normal_(random_);
  }
  std::vector<float> keys(int64_t count) {
    std::vector<float> rows(static_cast<size_t>(count * kRowElements));
    for (int64_t r = 0; r < count; ++r) {
      const auto topic = static_cast<int64_t>(random_() % 16);
      for (int64_t i = 0; i < kRowElements; ++i) {
        rows[static_cast<size_t>(r * kRowElements + i)] =
            directions_[static_cast<size_t>(topic * kRowElements + i)] + normal_(random_);
      }
    }
    return rows;
  }
  std::vector<float> values(int64_t count) {
    std::vector<float> rows(static_cast<size_t>(count * kRowElements));
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = normal_(random_) + (i % kRowElements < 32 ? 1.0f : 0.0f);
    return rows;
  }
  std::vector<float> query(int64_t rows = 1) {
    std::vector<float> q(static_cast<size_t>(rows * kQueryHeads * kDim));
    const auto topic = static_cast<size_t>(random_() % 16);
    for (size_t i = 0; i < q.size(); ++i)
      q[i] = 0.5f * (directions_[topic * kRowElements + i % kRowElements] + normal_(random_));
    return q;
  }

 private:
  std::mt19937_64 random_;
  std::normal_distribution<float> normal_;
  std::vector<float> directions_;
};

class Graph : public ::testing::Test {
 protected:
  void SetUp() override {
    Host::plugin_device();
    forget_indexes();
    configure(kSparse);
    take_totals();
  }
};

constexpr float kHidden = -HUGE_VALF;

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
  {
    Layer old(kCells, 1, at, at + kBytes);
    old.write(0, rows.keys(kCells), rows.values(kCells));
    EXPECT_LT(old.error(rows.query(), visible), kBound);
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

// State restore writes the cache behind the plug-in's back.
double error_after_unseen_change(const std::string& mode, tactic_totals& totals) {
  forget_indexes();
  configure(mode);
  Layer layer(1024);
  Rows rows(12), other(13);
  const std::vector<float> visible(1024, 0.0f);
  layer.write(0, rows.keys(1024), rows.values(1024));
  layer.attend(rows.query(), visible);
  const std::vector<float> k = other.keys(1024), v = other.values(1024);
  ggml_fp32_to_fp16_row(k.data(), static_cast<ggml_fp16_t*>(layer.k()->data), static_cast<int64_t>(k.size()));
  ggml_fp32_to_fp16_row(v.data(), static_cast<ggml_fp16_t*>(layer.v()->data), static_cast<int64_t>(v.size()));
  take_totals();
  double worst = 0;
  for (int i = 0; i < 8; ++i) worst = std::max(worst, layer.error(other.query(), visible));
  totals = take_totals();
  return worst;
}

TEST_F(Graph, UnseenChangeIsNoticedByTheRowsRead) {
  tactic_totals totals{};
  const double error = error_after_unseen_change(kSparse, totals);
  EXPECT_LT(error, kBound);
  EXPECT_EQ(totals.changed_queries, 1) << "then the index is built anew";
  EXPECT_EQ(totals.sparse_queries, 7);
  const double without = error_after_unseen_change(kSparse + ",check=0,fault=verify", totals);
  std::printf("  unseen change: error %.4f, unchecked %.4f\n", error, without);
  EXPECT_GT(without, kBound);
}

}  // namespace
}  // namespace tactic::test
