// Decode attention over an indexed KV cache: one query token per sequence, all heads of one layer.
//
//   tactic::Attention attention({.select = tactic::Select::kSample});
//   tactic::DecodeQuery query;            // q, kv, index, out ...
//   attention.run({&query, 1}, &stats);
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "tactic/error.h"
#include "tactic/kv_index.h"
#include "tactic/kv_view.h"
#include "tactic/options.h"
#include "tactic/selection.h"
#include "tactic/stats.h"

namespace tactic {

/// One query token of one sequence at one layer.
struct DecodeQuery {
  const float* q = nullptr;   // [num_q_heads, head_dim]
  int64_t q_head_stride = 0;  // in floats, head_dim to 2^31
  int32_t num_q_heads = 0;    // a multiple of kv.num_kv_heads up to 65536
  float sm_scale = 1.0f;      // score = sm_scale * q.k
  KvView kv;                  // kv_len may be less than the index knows: rows from there on are hidden, none is read
  KvIndex* index = nullptr;   // nullptr: dense. Calibration and statistics are kept in it
  const uint64_t* visible = nullptr;  // bit r of word r / 64: row r takes part. nullptr: all of kv.kv_len
  const float* bias = nullptr;        // [kv_len] added to the scores, -inf hides; makes the step dense; nullptr: none
  const int32_t* likely_rows = nullptr;  // [num_likely_rows] ascending: read for certain where they stand in clusters
  int32_t num_likely_rows = 0;
  float tau_factor = 1;    // in (0, 1e6]. sample: reads as if tau were so many times its value; more than 1 for steps
                           // that matter more
  uint64_t stream_id = 0;  // with seed, layer and position it makes the random offset of the sampling
  int32_t layer = 0;
  int64_t position = 0;  // of the token in its sequence, one more at each step: at the same one a step draws the same
                         // rows again, and clusters are learned from at every eighth (DecodeOptions::beta)
  float* out = nullptr;  // [num_q_heads, v_head_dim]; may be the memory of this query's q
  int64_t out_head_stride = 0;      // in floats, v_head_dim to 2^31
  float* lse = nullptr;             // [num_q_heads] natural log of the sum of exp(score), or nullptr
  HeadStats* head_stats = nullptr;  // [num_kv_heads], filled by sparse steps on the CPU (others leave it), or nullptr
  MassEstimate* masses = nullptr;   // [num_q_heads], measured by kSample alone, or nullptr
  Selection* selection = nullptr;   // every row read and its log weight, for those who want to look at it, or nullptr
};

/// Throws Error when shapes do not fit, naming the value and the limit. run() does so first of all.
void validate(const DecodeQuery& query);

/// Which implementation computes. kReference is the specification in double precision and one thread.
enum class Backend : uint8_t { kCpu, kReference };

/// Holds scratch memory that is reused between calls. Not thread-safe; make one per calling thread.
class Attention {
 public:
  explicit Attention(const DecodeOptions& options = {}, Backend backend = Backend::kCpu, int32_t num_threads = 0);
  ~Attention();
  Attention(Attention&&) noexcept;
  Attention& operator=(Attention&&) noexcept;

  /// Computes every query. A query that cannot be answered within the options is answered exactly, and its stats say
  /// why. A query without any visible row gives zeros and lse = -infinity. `stats`: one per query, or nullptr. Writes
  /// what it learns into the queries' indexes: while it runs, nobody else may use these. Throws Error when shapes do
  /// not fit, naming the value and the limit.
  void run(std::span<const DecodeQuery> queries, StepStats* stats = nullptr);

  void set_options(const DecodeOptions& options);
  const DecodeOptions& options() const;
  void set_num_threads(int32_t num_threads);  // at most 1024; 0: OpenMP's default

  struct Impl;

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace tactic
