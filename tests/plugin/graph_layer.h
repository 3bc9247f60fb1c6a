// One layer's cache, and graphs over it made by hand as the host makes them. The oracle is softmax attention in double
// precision.
#pragma once

#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <ggml.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "llama_session.h"

namespace tactic::test {

inline constexpr int64_t kDim = 64, kQueryHeads = 4, kKvHeads = 2, kRowElements = kDim * kKvHeads;
inline constexpr float kScale = 0.125f;  // 1 / sqrt(kDim)
// error=0.03 is meant for the attention mass; measured here: up to 0.025 of the output's length.
inline constexpr double kBound = 0.06;

template <class T, void (*free_fn)(T*)>
struct Free {
  void operator()(T* object) const { free_fn(object); }
};
using ContextPtr = std::unique_ptr<ggml_context, Free<ggml_context, ggml_free>>;
using BufferPtr = std::unique_ptr<ggml_backend_buffer, Free<ggml_backend_buffer, ggml_backend_buffer_free>>;
using BackendPtr = std::unique_ptr<ggml_backend, Free<ggml_backend, ggml_backend_free>>;

inline ContextPtr make_context() {
  return ContextPtr(ggml_init({ggml_tensor_overhead() * 64 + ggml_graph_overhead(), nullptr, true}));
}

/// |scale * got - expected| / |expected| over all elements.
template <class Values>
double relative_error(const Values& got, const std::vector<double>& expected, double scale = 1) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += (got[i] * scale - expected[i]) * (got[i] * scale - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference / norm);
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

  /// K and V rows into cells begin, begin + 1, ... (modulo the number of cells), as SET_ROWS does.
  void write(int64_t begin, const std::vector<float>& k, const std::vector<float>& v) {
    std::vector<int64_t> cells(k.size() / static_cast<size_t>(kRowElements));
    for (size_t i = 0; i < cells.size(); ++i) cells[i] = (begin + static_cast<int64_t>(i)) % cells_;
    ASSERT_EQ(write_cells(cells, k, v), GGML_STATUS_SUCCESS);
  }
  /// `from`: the tensors written to begin with this cell, and the numbers count from it.
  ggml_status write_cells(std::vector<int64_t> numbers, const std::vector<float>& k, const std::vector<float>& v,
                          int64_t from = 0) {
    const auto count = static_cast<int64_t>(numbers.size());
    const ContextPtr context = make_context();
    ggml_tensor* k_rows = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, kRowElements, count);
    ggml_tensor* v_rows = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, kRowElements, count);
    ggml_tensor* cells = ggml_new_tensor_1d(context.get(), GGML_TYPE_I64, count);
    const auto all_streams = [&](ggml_tensor* cache) {
      ggml_tensor* const all = ggml_reshape_2d(context.get(), cache, kRowElements, cells_ * cache->ne[2]);
      return from == 0 ? all
                       : ggml_view_2d(context.get(), all, kRowElements, all->ne[1] - from, all->nb[1],
                                      static_cast<size_t>(from) * all->nb[1]);
    };
    ggml_tensor* k_set = ggml_set_rows(context.get(), all_streams(k_), k_rows, cells);
    ggml_tensor* v_set = ggml_set_rows(context.get(), all_streams(v_), v_rows, cells);
    const BufferPtr buffer(ggml_backend_alloc_ctx_tensors_from_buft(context.get(), ggml_backend_cpu_buffer_type()));
    for (int64_t& number : numbers) number += stream_ * cells_;
    std::memcpy(k_rows->data, k.data(), k.size() * 4);
    std::memcpy(v_rows->data, v.data(), v.size() * 4);
    std::memcpy(cells->data, numbers.data(), numbers.size() * 8);
    return compute(context.get(), {k_set, v_set});
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
    EXPECT_EQ(compute(context.get(), {out}), GGML_STATUS_SUCCESS);
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
    return relative_error(got, reference(q, mask, rows));
  }

  void use_stream(int64_t stream) { stream_ = stream; }
  ggml_tensor* k() { return k_; }
  ggml_tensor* v() { return v_; }
  /// The layer goes, what computed with it stays.
  BackendPtr take_backend() { return std::move(backend_); }
  bool taken = false;
  std::function<void()> before_compute, after_compute;

 private:
  ggml_status compute(ggml_context* context, const std::vector<ggml_tensor*>& outputs) {
    ggml_cgraph* graph = ggml_new_graph(context);
    for (ggml_tensor* output : outputs) {
      EXPECT_TRUE(ggml_backend_dev_supports_op(device_, output)) << ggml_op_name(output->op);
      ggml_build_forward_expand(graph, output);
    }
    if (before_compute) before_compute();
    const ggml_status status = ggml_backend_graph_compute(backend_.get(), graph);
    if (after_compute) after_compute();
    return status;
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

inline constexpr float kHidden = -HUGE_VALF;

}  // namespace tactic::test
