#include "match.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>

#include "ggml-backend.h"
#include "tactic/error.h"

namespace tactic::plugin {

namespace {

RowsView rows_view(const ggml_tensor* t, int64_t stream) {
  RowsView rows;
  rows.data = static_cast<const char*>(t->data) + static_cast<size_t>(stream) * t->nb[3];
  rows.dtype = *dtype_of(t->type);
  rows.token_stride_bytes = static_cast<int64_t>(t->nb[1]);
  rows.head_stride_bytes = static_cast<int64_t>(t->nb[2]);
  return rows;
}

bool rows_fit(const ggml_tensor* t) {
  const std::optional<DType> dtype = dtype_of(t->type);
  if (!dtype || t->nb[0] != ggml_type_size(t->type)) return false;
  const int64_t multiple = ggml_is_quantized(t->type) ? 32 : 16;
  return t->ne[0] % multiple == 0 && t->ne[0] >= multiple && t->ne[0] <= 1024;
}

}  // namespace

KvView AttentionMatch::view(int64_t stream) const {
  KvView kv;
  kv.k = rows_view(k, stream);
  kv.v = rows_view(v, stream);
  kv.num_kv_heads = static_cast<int32_t>(k->ne[2]);
  kv.head_dim = static_cast<int32_t>(k->ne[0]);
  kv.v_head_dim = static_cast<int32_t>(v->ne[0]);
  kv.kv_len = k->ne[1];
  return kv;
}

const float* AttentionMatch::query(int64_t row, int64_t stream) const {
  return reinterpret_cast<const float*>(static_cast<const char*>(q->data) + static_cast<size_t>(row) * q->nb[1] +
                                        static_cast<size_t>(stream) * q->nb[3]);
}

float* AttentionMatch::output(int64_t row, int64_t stream) const {
  return reinterpret_cast<float*>(static_cast<char*>(out->data) + static_cast<size_t>(row) * out->nb[2] +
                                  static_cast<size_t>(stream) * out->nb[3]);
}

const ggml_fp16_t* AttentionMatch::mask_row(int64_t row, int64_t stream) const {
  if (mask == nullptr) return nullptr;
  return reinterpret_cast<const ggml_fp16_t*>(static_cast<const char*>(mask->data) +
                                              static_cast<size_t>(row) * mask->nb[1] +
                                              static_cast<size_t>(stream % mask->ne[3]) * mask->nb[3]);
}

KvView CacheGeometry::stream_view(size_t stream) const {
  KvView kv = view;
  kv.k.data = static_cast<const char*>(view.k.data) + static_cast<int64_t>(stream) * k_stream_bytes;
  kv.v.data = static_cast<const char*>(view.v.data) + static_cast<int64_t>(stream) * v_stream_bytes;
  return kv;
}

size_t CacheGeometry::first_stream(const AttentionMatch& match) const {
  const int64_t offset = static_cast<const char*>(match.k->data) - static_cast<const char*>(k_cache);
  return static_cast<size_t>(k_stream_bytes > 0 ? offset / k_stream_bytes : 0);
}

int64_t CacheGeometry::row_bytes() const {
  return static_cast<int64_t>(tactic::row_bytes(view.k.dtype, view.head_dim) +
                              tactic::row_bytes(view.v.dtype, view.v_head_dim)) *
         view.num_kv_heads;
}

bool CacheGeometry::operator==(const CacheGeometry& other) const {
  const auto same = [](const RowsView& a, const RowsView& b) {
    return a.data == b.data && a.dtype == b.dtype && a.token_stride_bytes == b.token_stride_bytes &&
           a.head_stride_bytes == b.head_stride_bytes;
  };
  return same(view.k, other.view.k) && same(view.v, other.view.v) && view.num_kv_heads == other.view.num_kv_heads &&
         view.head_dim == other.view.head_dim && view.v_head_dim == other.view.v_head_dim && cells == other.cells &&
         num_streams == other.num_streams;
}

std::optional<CacheGeometry> cache_geometry(const AttentionMatch& match) {
  const ggml_tensor *k = match.k->view_src, *v = match.v->view_src;
  if (k == nullptr || v == nullptr || k->data == nullptr || v->data == nullptr) return std::nullopt;
  if (match.k->nb[1] != k->nb[1] || match.v->nb[1] != v->nb[1]) return std::nullopt;
  if (k->ne[1] != v->ne[1] || k->ne[2] != v->ne[2] || k->ne[3] != 1 || k->ne[1] < match.k->ne[1]) return std::nullopt;
  // The node's last dimension may be another than the cache's streams (KV heads, in MiniMax-M3's).
  if (match.streams() > 1 && (match.k->nb[3] != k->nb[2] || match.v->nb[3] != v->nb[2])) return std::nullopt;
  CacheGeometry cache;
  cache.k_cache = k->data;
  cache.v_cache = v->data;
  cache.view = match.view(0);
  cache.view.k.data = k->data;
  cache.view.v.data = v->data;
  cache.view.kv_len = k->ne[1];
  cache.cells = k->ne[1];
  cache.num_streams = k->ne[2];
  cache.k_stream_bytes = static_cast<int64_t>(k->nb[2]);
  cache.v_stream_bytes = static_cast<int64_t>(v->nb[2]);
  // Views that start inside a row (several models in one tensor), or show other streams of V, are none of ours.
  const int64_t k_offset = static_cast<const char*>(match.k->data) - static_cast<const char*>(k->data),
                v_offset = static_cast<const char*>(match.v->data) - static_cast<const char*>(v->data);
  const auto stream = static_cast<int64_t>(cache.first_stream(match));
  if (k_offset != stream * cache.k_stream_bytes || v_offset != stream * cache.v_stream_bytes) return std::nullopt;
  return cache;
}

int32_t layer_number(const ggml_tensor* cache, size_t fallback) {
  int number = 0;
  if (std::sscanf(cache->name, "cache_k_l%d", &number) == 1) return number;
  return static_cast<int32_t>(fallback);
}

bool views_filled_cache(const ggml_tensor* node) {
  const ggml_tensor* k = node->src[1];
  const ggml_tensor* cache = k->view_src;
  if (cache == nullptr || k->data == nullptr || node->src[2]->view_src == nullptr) return false;
  if (cache->buffer == nullptr || !ggml_backend_buffer_is_host(cache->buffer)) return false;
  const size_t bytes = ggml_row_size(k->type, k->ne[0]);
  for (int64_t stream = 0; stream < k->ne[3]; ++stream) {
    for (int64_t row = 0; row < k->ne[1] && row < 8; ++row) {
      const char* data = static_cast<const char*>(k->data) + static_cast<size_t>(stream) * k->nb[3] +
                         static_cast<size_t>(row) * k->nb[1];
      for (size_t i = 0; i < bytes; ++i) {
        if (data[i] != 0) return true;
      }
    }
  }
  return false;
}

std::string unsupported(const ggml_tensor* node) {
  const ggml_tensor *k = node->src[1], *v = node->src[2];
  float params[3];  // scale, max_bias (ALiBi), logit soft-cap
  std::memcpy(params, node->op_params, sizeof params);
  if (node->src[4] != nullptr) return "attention sinks";
  if (!std::isfinite(params[0])) return "a scale that is not finite";
  if (params[1] != 0) return "ALiBi";
  if (params[2] != 0) return "logit soft-capping";
  for (const ggml_tensor* rows : {k, v}) {
    if (!dtype_of(rows->type)) return std::string("a cache of type ") + ggml_type_name(rows->type);
    if (!rows_fit(rows)) return "rows of " + std::to_string(rows->ne[0]) + " elements of " + ggml_type_name(rows->type);
  }
  return {};
}

std::optional<AttentionMatch> readable_attention(const ggml_tensor* node) {
  if (node->op != GGML_OP_FLASH_ATTN_EXT || !unsupported(node).empty()) return std::nullopt;
  const ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2], *mask = node->src[3];
  float scale;
  std::memcpy(&scale, node->op_params, sizeof scale);
  if (q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float)) return std::nullopt;
  if (q->ne[0] != k->ne[0] || k->ne[1] != v->ne[1] || k->ne[2] != v->ne[2] || q->ne[2] % k->ne[2] != 0)
    return std::nullopt;
  if (q->ne[3] != k->ne[3] || q->ne[3] != v->ne[3]) return std::nullopt;
  if (q->nb[1] % 4 != 0 || q->nb[2] % 4 != 0 || k->ne[1] > INT32_MAX) return std::nullopt;
  if (node->type != GGML_TYPE_F32 || node->nb[0] != sizeof(float)) return std::nullopt;
  if (mask != nullptr) {
    if (mask->type != GGML_TYPE_F16 || mask->nb[0] != 2 || mask->ne[0] < k->ne[1] || mask->ne[1] < q->ne[1])
      return std::nullopt;
    if (mask->ne[2] != 1 || q->ne[3] % mask->ne[3] != 0) return std::nullopt;
  }
  return AttentionMatch{q, k, v, mask, const_cast<ggml_tensor*>(node), scale};
}

bool takes_attention(const ggml_tensor* node, const PluginOptions& options) {
  if (!options.enabled) return false;
  const std::optional<AttentionMatch> match = readable_attention(node);
  if (!match || match->rows() > kMaxRows || match->k->ne[1] < options.min_context) return false;
  return options.accept_any || views_filled_cache(node);
}

bool match_write(const ggml_tensor* node) {
  if (node->op != GGML_OP_SET_ROWS) return false;
  const ggml_tensor *rows = node->src[0], *cells = node->src[1];
  if (rows->type != GGML_TYPE_F32 || (cells->type != GGML_TYPE_I64 && cells->type != GGML_TYPE_I32)) return false;
  if (node->ne[0] != rows->ne[0] || node->ne[2] != rows->ne[2] || node->ne[3] != rows->ne[3] ||
      cells->ne[0] != rows->ne[1])
    return false;
  if (cells->ne[1] < 1 || cells->ne[2] < 1 || rows->ne[2] % cells->ne[1] != 0 || rows->ne[3] % cells->ne[2] != 0)
    return false;
  return dtype_of(node->type).has_value() && node->nb[0] == ggml_type_size(node->type) &&
         rows->nb[0] == sizeof(float) && node->ne[0] % ggml_blck_size(node->type) == 0;
}

int64_t cell_number(const ggml_tensor* cells, int64_t i1, int64_t i2, int64_t i3) {
  const char* at = static_cast<const char*>(cells->data) + static_cast<size_t>(i1) * cells->nb[0] +
                   static_cast<size_t>(i2 % cells->ne[1]) * cells->nb[1] +
                   static_cast<size_t>(i3 % cells->ne[2]) * cells->nb[2];
  if (cells->type == GGML_TYPE_I32) {
    int32_t cell;
    std::memcpy(&cell, at, sizeof cell);
    return cell;
  }
  int64_t cell;
  std::memcpy(&cell, at, sizeof cell);
  return cell;
}

void check_cells(const ggml_tensor* node) {
  const ggml_tensor* cells = node->src[1];
  for (int64_t i3 = 0; i3 < cells->ne[2]; ++i3) {
    for (int64_t i2 = 0; i2 < cells->ne[1]; ++i2) {
      for (int64_t i1 = 0; i1 < cells->ne[0]; ++i1) {
        const int64_t cell = cell_number(cells, i1, i2, i3);
        if (cell >= 0 && cell < node->ne[1]) continue;
        throw Error("cell " + std::to_string(cell) + " of " + node->name + " must lie in 0.." +
                    std::to_string(node->ne[1] - 1));
      }
    }
  }
}

int64_t rows_to_store(const ggml_tensor* node) {
  const ggml_tensor* rows = node->src[0];
  return rows->ne[1] * rows->ne[2] * rows->ne[3];
}

void store_rows(const ggml_tensor* node, int64_t begin, int64_t end) {
  const ggml_tensor *rows = node->src[0], *cells = node->src[1];
  for (int64_t r = begin; r < end; ++r) {
    const int64_t i1 = r % rows->ne[1], i2 = r / rows->ne[1] % rows->ne[2], i3 = r / (rows->ne[1] * rows->ne[2]);
    const int64_t cell = cell_number(cells, i1, i2, i3);
    const auto* source =
        reinterpret_cast<const float*>(static_cast<const char*>(rows->data) + static_cast<size_t>(i1) * rows->nb[1] +
                                       static_cast<size_t>(i2) * rows->nb[2] + static_cast<size_t>(i3) * rows->nb[3]);
    char* target = static_cast<char*>(node->data) + static_cast<size_t>(cell) * node->nb[1] +
                   static_cast<size_t>(i2) * node->nb[2] + static_cast<size_t>(i3) * node->nb[3];
    switch (node->type) {
      case GGML_TYPE_F32: std::memcpy(target, source, static_cast<size_t>(node->ne[0]) * 4); break;
      case GGML_TYPE_F16: ggml_fp32_to_fp16_row(source, reinterpret_cast<ggml_fp16_t*>(target), node->ne[0]); break;
      case GGML_TYPE_BF16: ggml_fp32_to_bf16_row(source, reinterpret_cast<ggml_bf16_t*>(target), node->ne[0]); break;
      default: ggml_get_type_traits(node->type)->from_float_ref(source, target, node->ne[0]); break;
    }
  }
}

}  // namespace tactic::plugin
