// Decode attention on a CUDA device: one query token per sequence, a batch of sequences, one layer.
//
// Everything a step needs is in device memory and run() only launches kernels on the given stream: no allocation, no
// synchronization, so a step can be captured into a CUDA graph, and stays valid while kv_lens and the index grow, as
// long as the Decode and the LayerIndex live. The device that was current when they were made must be so at every call.
//
//   tactic::cuda::LayerIndex index(index_options, {8, 128, 128}, max_sequences, max_rows);
//   index.build(sequence, batch, kv_len, stream);                      // after prefill
//   tactic::cuda::Decode decode(decode_options, {...limits...});
//   decode.run(batch, &index, stream);
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "tactic/kv_index.h"
#include "tactic/kv_view.h"
#include "tactic/options.h"
#include "tactic/stats.h"

namespace tactic::cuda {

/// A cudaStream_t; nullptr is the default stream.
using Stream = void*;

/// Rows [num_sequences, num_kv_heads, kv_len, head_dim] of K or V in device memory. Addresses and strides are multiples
/// of 16 bytes for f16 and bf16, of 8 for f8_e4m3, of 2 for q8_0 and q4_0, whose head_dim is a multiple of 32 (not 80)
/// and whose numbers lie within f16's range.
struct DeviceRows {
  const void* data = nullptr;
  DType dtype = DType::kF16;
  int64_t sequence_stride_bytes = 0;  // without page tables, of several sequences: at least a row's
  int64_t head_stride_bytes = 0;
  int64_t token_stride_bytes = 0;
  int64_t page_stride_bytes = 0;  // with page tables: pages lie this far apart, whatever the sequence
  int32_t page_tokens = 0;
  const float* head_scales = nullptr;  // f8_e4m3 only: device [num_kv_heads], what is stored times this; nullptr: 1
};

/// Sequence i of a batch is sequence i of the index. One of no rows gets zeros, and minus infinity as its lse; one
/// whose index holds rows from its kv_len on is read whole, as if it had no index (slower, and StepRecord::dense says
/// so), until LayerIndex::truncate(). Short sequences are sampled too, where the CPU is dense below 256 indexed rows.
/// The bits of an answer depend on the number of sequences (blocks per sequence and so the order of sums), not on what
/// the others hold.
struct DecodeBatch {
  int32_t num_sequences = 0;
  int32_t num_q_heads = 0, num_kv_heads = 0;  // up to 8 query heads per KV head
  int32_t head_dim = 0;                       // of K, V, q and out: 64, 80, 96, 128 or 256
  float sm_scale = 1;
  DeviceRows k, v;
  const int32_t* page_tables = nullptr;  // device [num_sequences, max_pages], or nullptr: tokens lie in order
  int32_t max_pages = 0;
  const int32_t* kv_lens = nullptr;      // device [num_sequences] rows from there on are hidden, none is read
  const void* q = nullptr;               // device [num_sequences, num_q_heads, head_dim]
  void* out = nullptr;                   // device, like q
  DType q_dtype = DType::kF16;           // of q and out: f32, f16 or bf16
  float* lse = nullptr;                  // device [num_sequences, num_q_heads] natural log, or nullptr
  const uint64_t* stream_ids = nullptr;  // device [num_sequences] for the random offsets, or nullptr: all 0
  int32_t layer = 0;  // with seed, stream_ids and kv_len - 1 makes the random offsets, and shifts when a step learns
  /// select=sample only. tau_factors: device [num_sequences], as DecodeQuery::tau_factor; or nullptr: 1. Of one that is
  /// not a number, or negative, tau becomes 1. likely_rows: device [num_sequences, max_likely_rows], in any order; or
  /// nullptr. They are read for certain where they stand in clusters; -1, rows that the sequence does not have and rows
  /// that come twice are none. Such steps run the kernel that learning ones do.
  const float* tau_factors = nullptr;
  const int32_t* likely_rows = nullptr;
  int32_t max_likely_rows = 0;  // up to 64
  /// select=sample: a sequence's steps follow one another. Every eighth position (kv_len - 1 + layer), what is
  /// read adjusts the index's calibration (beta, and what target_error becomes), and a step reads the rows after those
  /// that weighed much in the one before (docs/method.md, followers) and those found heavy twice, as on the CPU. The
  /// same step twice may then read differently. Such steps write to the index, so that no other step may read it at the
  /// same time.
  bool learn = false;
};

/// What an attention mask shows.
struct VisibleRows {
  int32_t count;  // rows, a kv_len; -1: the mask holds other values than 0 and minus infinity, which no step takes
  int32_t end;    // one more than the last of them; equal to `count` where they are the first ones
  uint32_t rows;  // a sum over hashes of the rows' numbers: other rows have another, as good as always
  uint32_t rows_before;  // the same without the last row
};

/// `masks`: device, f16 [count] of n_kv elements, a multiple of 8, `stride_bytes` apart; addresses and stride are
/// multiples of 16. rows: device [count]. tables: device [count, n_kv], or nullptr; where rows are not the first ones,
/// begins with those that are shown, a page table of pages of one token. Throws Error for n_kv and addresses that are
/// none of these.
void visible_rows(const void* masks, int64_t stride_bytes, int32_t n_kv, int32_t count, VisibleRows* rows,
                  int32_t* tables, Stream stream);

/// What the host knows of the lengths and pages that a batch has on the device; all in host memory.
struct HostTables {
  const int32_t* kv_lens = nullptr;      // [num_sequences]
  const int32_t* page_tables = nullptr;  // [num_sequences, max_pages], or nullptr: tokens lie in order
  int32_t num_pages = 0;                 // pages that exist
};

/// What one step read of one sequence and KV head.
struct StepRecord {
  int32_t kv_len;
  int32_t tokens_exact;      // sinks, recent, followed, heavy, likely and not finite rows; all of them when dense
  int32_t tokens_selected;   // by the selector, certain and sampled
  int32_t tokens_sampled;    // of those, drawn, their clusters not having been refined
  int32_t clusters_refined;  // sample
  int32_t tokens_refined;    // added by that, and by reading on for target_mass
  int32_t tokens_probed;     // fit: keys read for it, counted for every query head
  int32_t clusters;          // scored
  int32_t segments;          // of those
  float tau, beta;           // sample: the ones used
  float certain_mass;        // share that certain rows have of the output's weights, mean over the group's heads; 1 for
                             // fit and topk, which measure none, and where every row was read
  float mass_std_error;      // of that, root mean square over the heads: with DecodeBatch::learn or target_mass as the
                             // draw measures it (as on the CPU), else that of independent draws, which is larger
  DenseReason dense;         // why every row was read, if so: asked for; a row that was read is not the one that was
                             // clustered (check_rows; only for this KV head); or, kNoIndex, kv_len is less than the
                             // rows that the index holds
};

/// The records of one sequence, [batch.num_kv_heads] in host memory, as the statistics of a step on the CPU.
/// A step is dense when every head was.
StepStats step_stats(const StepRecord* records, const DecodeBatch& batch, const IndexOptions& options);

/// The indexes of one layer for up to max_sequences sequences, in device memory.
/// Not thread-safe. Work is ordered by the streams it is given.
class LayerIndex {
 public:
  /// Throws Error when options or shape are out of range, or the device's memory does not suffice. Beyond what
  /// validate(options) asks: v_head_dim is head_dim, sink_tokens at most provisional_tokens, clustering incremental.
  LayerIndex(const IndexOptions& options, const KvShape& shape, int32_t max_sequences, int32_t max_rows);
  ~LayerIndex();
  LayerIndex(LayerIndex&&) noexcept;
  LayerIndex& operator=(LayerIndex&&) noexcept;

  /// Takes over an index made on the CPU, of the same rows stored in the same bytes (else check_rows finds every row
  /// changed), and its calibration; not the rows that steps found heavy or expect. From the first segment on that holds
  /// rows which are gone or were rewritten since, it takes over none: steps read these rows exactly until build().
  /// Throws Error, and changes nothing, when options or shape are others than this index's, or the segments do not
  /// follow one another from row 0 on, full ones before as many provisional ones as make a full one at most.
  /// Synchronizes the stream.
  void upload(int32_t sequence, const KvIndex& index, Stream stream);

  /// Clusters the rows [0, kv_len) of a sequence of the batch that are in no segment yet: what fills a segment becomes
  /// one, full parts of the rest provisional ones. A smaller kv_len truncates. Of the batch, K, V, their shape and the
  /// page tables count. May be called after every token: where nothing is due, nothing happens, and
  /// what steps expect of the next one (DecodeBatch::learn) stays.
  /// Takes scratch memory from the device's pool (cudaMallocAsync) and gives it back, on the stream, so it is not for
  /// capturing. A build and the steps before and after it that read its sequence belong on one stream, or an event
  /// between them. Throws Error, and changes nothing, when arguments do not fit or memory runs out.
  void build(int32_t sequence, const DecodeBatch& batch, int32_t kv_len, Stream stream);

  /// Rows from kv_len on are gone: segments that hold any of them are dropped. Does nothing where none does. With the
  /// last segment goes what was learned from the sequence: kv_len 0 readies a slot for another one.
  void truncate(int32_t sequence, int32_t kv_len, Stream stream);

  /// Compares the check value of every row that a sequence's index holds with the rows of the batch, for whom does not
  /// know whether the cache was written in between. Returns the first row that differs, or how many rows the index
  /// holds. Segments from that row on are dropped, and so are those that hold rows from kv_len on. Check values are as
  /// KvIndex::verify() says. Synchronizes the stream. Throws Error as build() does.
  int32_t verify(int32_t sequence, const DecodeBatch& batch, int32_t kv_len, Stream stream);

  /// Forgets what steps have learned of a sequence, as KvIndex::forget_learned().
  void forget_learned(int32_t sequence, Stream stream);

  /// Rows of a sequence that are in clusters: those before them all are.
  int32_t rows_indexed(int32_t sequence) const;

  size_t memory_bytes() const;
  const IndexOptions& options() const;

  struct Impl;
  const Impl& impl() const { return *impl_; }

 private:
  std::unique_ptr<Impl> impl_;
};

/// What a Decode must be able to serve.
struct DecodeLimits {
  int32_t max_sequences = 1;
  int32_t num_q_heads = 0, num_kv_heads = 0, head_dim = 0;
  int32_t max_rows = 0;  // longest kv_len; no index may have more
  IndexOptions index;    // of the indexes it will be used with
};

/// Launches decode steps. Holds the workspace, so that two steps at once need two of these; they may share an index
/// unless one of them learns.
class Decode {
 public:
  /// Throws Error when limits or options are out of range, or the device's memory does not suffice. kFit and kTopK
  /// take at most 65535 pairs of sequence and KV head.
  Decode(const DecodeOptions& options, const DecodeLimits& limits);
  ~Decode();
  Decode(Decode&&) noexcept;
  Decode& operator=(Decode&&) noexcept;

  /// All but Select::kDense need the index. kSample and kDense are one launch each; kFit and kTopK rank all clusters,
  /// list the rows and read them, in several. `records`: device [num_sequences, num_kv_heads] or nullptr. Throws Error
  /// when the batch does not fit the limits, naming the value and the limit; nothing is launched then.
  void run(const DecodeBatch& batch, const LayerIndex* index, Stream stream, StepRecord* records = nullptr);

  /// run() cannot look at lengths and pages, which only the device knows by then. Whoever has them on the host too can
  /// have them checked before: throws Error, naming the value and the limit, when a length is negative or above the
  /// limits' max_rows, or a page that a length uses is none of those that exist. A step with such numbers reads
  /// memory that is not the cache's.
  void plan(const DecodeBatch& batch, const HostTables& tables) const;

  size_t workspace_bytes() const;

  struct Impl;

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace tactic::cuda
