// What one decode step of one layer did. Filled only when asked for.
#pragma once

#include <cstdint>

namespace tactic {

enum class DenseReason : uint8_t {
  kNone,        // not dense
  kAsked,       // Select::kDense
  kNoIndex,     // nothing is clustered yet, or too few rows to gain
  kMask,        // the mask holds other values than visible and hidden
  kRowChanged,  // a row's check value did not match: the cache was changed unseen
  kNotFinite,   // a score or an estimate was NaN or infinite
};

const char* dense_reason_name(DenseReason reason);

struct StepStats {
  int64_t kv_len = 0;  // visible rows of the query
  int32_t num_kv_heads = 0;
  int64_t tokens_certain = 0;  // rows read with certainty, summed over KV heads
  int64_t tokens_sampled = 0;  // rows read by chance, summed over KV heads
  int64_t tokens_value = 0;    // of all those, rows whose V was read too
  int64_t refined_clusters = 0;
  int64_t index_bytes = 0;       // of the index read
  int64_t kv_bytes = 0;          // of K and V read, probes and refinement included, but not what a step read before it
                                 // fell back to dense attention
  int64_t kv_bytes_present = 0;  // of K and V visible to the query
  double estimated_mass = 0;     // kSample: mass of the certain rows, mean over query heads. Else 1: kDense reads all
                                 // of it, kFit and kTopK measure nothing
  double mass_std_error = 0;     // its standard error, root mean square over query heads; 0 where it is not estimated
  DenseReason dense = DenseReason::kNone;

  /// Bytes of K, V and index read over those of K and V present. Above 1 when a step has read nearly every row and the
  /// index too, or keys twice (probes).
  double read_fraction() const {
    return kv_bytes_present > 0 ? static_cast<double>(kv_bytes + index_bytes) / static_cast<double>(kv_bytes_present)
                                : 0.0;
  }
};

/// What a sampling step believes of the mass of the rows it read with certainty, for one query head. Of a dense step
/// exactly 1. kFit and kTopK measure nothing and leave it so, whatever they miss.
struct MassEstimate {
  double mass = 1;
  double std_error = 0;
  double low = 1, high = 1;  // its 95% interval
};

/// The same for one KV head of a sparse step, for those who want to look at it.
struct HeadStats {
  int64_t tokens = 0;         // rows read
  int64_t exact_tokens = 0;   // of those, sinks, recent and expected rows
  double exact_mass = 0;      // estimated mass of those, mean over the group; kFit, kTopK: beside the rows read
  double estimated_mass = 0;  // of all certain rows, mean over the group; kFit, kTopK: 1
  float tau = 0;              // kSample: the one used
  float beta = 0;             // kSample: the one used
};

}  // namespace tactic
