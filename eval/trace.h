// Traces: what attention saw in one prefill of a real model. Per layer the K and V rows of the whole cache as stored,
// and the queries of all heads at chosen positions. Format: docs/trace-format.md. Any layer can be read alone.
//
//   Trace trace("prose.trace");
//   const TraceLayer layer = trace.layer(3);
//   for (int64_t i = 0; i < trace.info().num_queries(); ++i) {
//     const float* q = layer.query(i);              // [num_q_heads, head_dim]
//     const RowRange rows = layer.visible(i);       // the rows this query attends to
//   }
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "tactic/kv_view.h"

namespace tactic::eval {

/// What every layer says about itself in the header.
struct TraceLayerInfo {
  int32_t layer = 0;        // number in the model
  int32_t num_q_heads = 0;  // a multiple of num_kv_heads
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;  // of K and Q
  int32_t v_head_dim = 0;
  DType k_dtype = DType::kF16, v_dtype = DType::kF16;
  float sm_scale = 0;  // score = sm_scale * q.k
  int64_t window = 0;  // sliding window: a query sees this many rows, itself included; 0: all before it

  bool operator==(const TraceLayerInfo&) const = default;
};

enum class QueryKind : uint8_t {
  kDecode,  // to be answered: stands for a decode step at its position
  kPrompt,  // one of the last prompt positions, which eviction methods look at
};

struct TraceInfo {
  std::string model, text;         // names
  int64_t kv_len = 0;              // rows of every layer; row p is position p
  int64_t prompt_len = 0;          // positions below are prompt: decode queries lie at prompt_len and after
  std::vector<int64_t> positions;  // [num_queries] ascending
  std::vector<QueryKind> kinds;    // [num_queries]
  std::vector<TraceLayerInfo> layers;

  int64_t num_queries() const { return static_cast<int64_t>(positions.size()); }
};

/// Throws Error naming what is out of range. `file` goes into the message.
void validate(const TraceInfo& info, const std::string& file);

/// Rows [begin, end).
struct RowRange {
  int64_t begin = 0, end = 0;
};

/// A view of one layer; valid as long as its Trace.
struct TraceLayer {
  const TraceInfo* trace = nullptr;
  const TraceLayerInfo* info = nullptr;
  KvView kv;                 // all rows; head-major
  std::span<const float> q;  // [num_queries, num_q_heads, head_dim]

  const float* query(int64_t i) const { return q.data() + i * info->num_q_heads * info->head_dim; }
  /// Rows that query i attends to: causal, and inside the window.
  RowRange visible(int64_t i) const {
    const int64_t end = trace->positions[static_cast<size_t>(i)] + 1;
    return {info->window > 0 && end > info->window ? end - info->window : 0, end};
  }
  int32_t group_size() const { return info->num_q_heads / info->num_kv_heads; }
};

/// A trace file mapped into memory. Reading from several threads is fine once layer(i) has returned for that layer.
class Trace {
 public:
  /// Throws Error when the file is no trace, of another version, cut short, or says something impossible.
  explicit Trace(const std::string& path);
  ~Trace();
  Trace(Trace&&) noexcept;
  Trace& operator=(Trace&&) noexcept;

  const TraceInfo& info() const;
  const std::string& path() const;
  int32_t num_layers() const { return static_cast<int32_t>(info().layers.size()); }
  /// Layer i of the file. The first call reads all of it: throws Error naming the first value that is NaN or infinite.
  TraceLayer layer(int32_t i) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Writes a trace layer by layer, in any order. The file appears under its name when finish() succeeds.
class TraceWriter {
 public:
  /// Throws Error when `info` is out of range or the file cannot be written.
  TraceWriter(const std::string& path, const TraceInfo& info);
  ~TraceWriter();  // without finish(): removes what was written
  TraceWriter(const TraceWriter&) = delete;
  TraceWriter& operator=(const TraceWriter&) = delete;

  /// k, v: rows in their dtypes, [num_kv_heads, kv_len, head_dim]; q: [num_queries, num_q_heads, head_dim].
  void write_layer(int32_t i, std::span<const std::byte> k, std::span<const std::byte> v, std::span<const float> q);
  /// Throws Error when a layer is missing.
  void finish();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tactic::eval
