// From ggml's tensors to requests. The same functions decide what the device accepts and what it computes.
#pragma once

#include <optional>
#include <string>

#include "dtype.h"
#include "ggml.h"
#include "plugin_options.h"
#include "tactic/kv_view.h"

namespace tactic::plugin {

/// FLASH_ATTN_EXT with few rows: Q [head_dim, rows, num_q_heads, streams], K and V [dim, n_kv, num_kv_heads, streams].
struct AttentionMatch {
  const ggml_tensor* q;
  const ggml_tensor* k;
  const ggml_tensor* v;
  const ggml_tensor* mask;  // or nullptr
  ggml_tensor* out;         // [v_head_dim, num_q_heads, rows, streams]
  float sm_scale;

  int64_t rows() const { return q->ne[1]; }
  int64_t streams() const { return q->ne[3]; }
  KvView view(int64_t stream) const;  // the rows the node shows
  const float* query(int64_t row, int64_t stream) const;
  float* output(int64_t row, int64_t stream) const;
  const ggml_fp16_t* mask_row(int64_t row, int64_t stream) const;
};

/// The cache that an attention node shows a part of: [elements of all KV heads, cells, streams].
struct CacheGeometry {
  const void* k_cache = nullptr;
  const void* v_cache = nullptr;
  KvView view;  // of stream 0, all cells
  int64_t k_stream_bytes = 0, v_stream_bytes = 0;
  int64_t cells = 0;  // per stream
  int64_t num_streams = 0;

  KvView stream_view(size_t stream) const;
  /// The stream that the first of the node's is.
  size_t first_stream(const AttentionMatch& match) const;
  /// Of K and V of one cell, all heads.
  int64_t row_bytes() const;
  bool operator==(const CacheGeometry& other) const;
};
/// nullopt: K and V are no views of a cache that can be watched.
std::optional<CacheGeometry> cache_geometry(const AttentionMatch& match);

/// The layer's number as the cache's name says it, else `fallback`.
int32_t layer_number(const ggml_tensor* cache, size_t fallback);

/// Whether K is a view of a tensor in host memory that holds something. A new context asks for its attention device
/// before anything is in its cache, and switches flash attention off if that is not the layer's; an empty cache is
/// declined then.
bool views_filled_cache(const ggml_tensor* node);

/// What of an attention node this library does not do, in plain words; empty: nothing.
std::string unsupported(const ggml_tensor* node);

/// An attention node that can be computed here, whoever is to do it.
std::optional<AttentionMatch> readable_attention(const ggml_tensor* node);

/// Rows per stream up to which attention is taken over: llama.cpp computes more of them in tiles, as fast as we could.
constexpr int64_t kMaxRows = 64;

/// Whether such a node is taken from the host.
bool takes_attention(const ggml_tensor* node, const PluginOptions& options);

/// SET_ROWS of f32 rows into a tensor of a type we know.
bool match_write(const ggml_tensor* node);

/// The cell that row i1 of matrix (i2, i3) of a SET_ROWS node goes to; `cells` repeats over the matrices.
int64_t cell_number(const ggml_tensor* cells, int64_t i1, int64_t i2 = 0, int64_t i3 = 0);

/// Throws Error if a cell lies outside the node's tensor. Called before anything is stored.
void check_cells(const ggml_tensor* node);

/// Stores rows [begin, end) of the node's rows, counted over all of its dimensions.
void store_rows(const ggml_tensor* node, int64_t begin, int64_t end);
int64_t rows_to_store(const ggml_tensor* node);

}  // namespace tactic::plugin
