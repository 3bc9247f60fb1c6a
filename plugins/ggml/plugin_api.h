// What a host program that knows the plug-in may ask of it, beyond what ggml asks. Each function is found with
// ggml_backend_reg_get_proc_address(reg, name). They apply to every context of the process and may be called by any
// thread; "tactic_take_totals" and "tactic_inspect" only while no context computes, for they look at the indexes.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "tactic/c_api.h"

#ifdef __cplusplus
extern "C" {
#endif

/// "tactic_configure": replaces the options, in the grammar of the variable TACTIC ("select=sample,error=0.03").
/// Options that decide which nodes are taken (select=off, min_context) act when a context next builds its graph.
/// Returns 0; or -1 and a message in `error`, and the options stay as they were.
typedef int (*tactic_configure_fn)(const char* options, char* error, size_t error_size);

/// Sums over the attention nodes of decode steps since the last call of "tactic_take_totals". Steps that read a prompt
/// of 64 rows or fewer are none.
struct tactic_totals {
  int64_t nodes;            // attention nodes computed
  int64_t queries;          // query rows in them (one per sequence and layer)
  int64_t dense_queries;    // of those, answered by reading everything
  int64_t changed_queries;  // of those, because a row had been changed unseen
  int64_t kv_heads;         // sum over queries of KV heads
  int64_t tokens_certain;   // sums over queries and KV heads, as in tactic::StepStats
  int64_t tokens_sampled;
  int64_t tokens_value;
  int64_t refined_clusters;
  int64_t index_bytes;
  int64_t kv_bytes;
  int64_t kv_bytes_present;
  double estimated_mass;       // sum over sparse queries
  double mass_variance;        // sum over sparse queries of the squared standard error
  int64_t sparse_queries;      // number of terms in those two sums
  int64_t attend_ns;           // wall time in attention nodes
  int64_t write_ns;            // wall time storing rows
  int64_t cluster_ns;          // wall time clustering
  int64_t index_memory_bytes;  // now, all indexes
  int64_t kv_memory_bytes;     // now, the K and V rows they describe
};
typedef void (*tactic_take_totals_fn)(struct tactic_totals* totals);

/// "tactic_inspect": JSON about every indexed layer as of its last step (needs the option inspect=1):
/// {"layers": [{"layer": 0, "stream": 0, "kv_len": n, "heads": [{"clusters": n, "mean_spread": x, "beta": x, "tokens":
/// n,
///   "exact_tokens": n, "exact_mass": x, "estimated_mass": x, "tau": x}, ...]}]}
/// Writes at most `size` bytes with a terminating zero and returns the bytes needed.
typedef size_t (*tactic_inspect_fn)(char* json, size_t size);

/// "tactic_set_decoder": from now on every attention node of one query row is offered to `decode`, which may fill
/// query->out and `stats` (from zeros) and return 0, or return anything else and have it answered exactly. So methods
/// other than Tactic's are measured end to end. query->layer is the model's, query->index NULL, query->position the
/// number of rows it sees. Calls come from one thread per context, for the nodes that the options take over. NULL ends
/// it.
typedef int (*tactic_decode_fn)(void* user, const tactic_query* query, tactic_step_stats* stats);
typedef void (*tactic_set_decoder_fn)(tactic_decode_fn decode, void* user);

#ifdef __cplusplus
}
#endif
