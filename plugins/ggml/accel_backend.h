// Computes the nodes that the device has accepted: stores rows, keeps the indexes of their caches, attends.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "cache_watch.h"
#include "ggml-backend.h"
#include "mask_row.h"
#include "match.h"
#include "plugin_options.h"
#include "tactic/attention.h"

namespace tactic::plugin {

/// Used by one thread at a time.
class AccelBackend {
 public:
  int num_threads = 0;

  ggml_status compute(ggml_cgraph* graph);

 private:
  void write(const ggml_tensor* node, const PluginOptions& options);
  void index_rows(const ggml_tensor* node, const PluginOptions& options);
  void attend(ggml_tensor* node, const PluginOptions& options);
  void run(const ggml_tensor& node, const PluginOptions& options);

  /// Makes the index of a stream fit what the node's rows show of it, which may be of several sequences. Returns
  /// whether one of them is long enough to use it. Sets `prompt`, and leaves the passage alone, where a sequence has
  /// more rows in the node than a decode step: they are answered exactly.
  bool prepare(CacheLayer& layer, size_t stream, std::span<const MaskRow> rows, const PluginOptions& options,
               bool& prompt);
  void use_index(CacheLayer& layer, size_t stream, int64_t row, const PluginOptions& options, const MaskRow& bits,
                 DecodeQuery& query);
  void name_likely_rows(CacheLayer& layer, size_t stream, int32_t places, const MaskRow& bits, DecodeQuery& query);
  void cluster_prompt(CacheLayer& layer, size_t stream, const PluginOptions& options);
  void maintain(CacheLayer& layer, size_t stream, double budget);

  /// Likely rows of one query.
  struct Likely {
    int64_t cells = 0, visible = 0;  // where these rows are rows
    std::vector<int32_t> rows;
  };

  Attention attention_;
  std::vector<Likely> likely_;  // one per query of a node
  std::vector<DecodeQuery> queries_;
  std::vector<StepStats> stats_;
  std::vector<MaskRow> masks_;         // one per query of a node
  int32_t node_layer_ = -1;            // of the node before
  const void* first_cache_ = nullptr;  // of the first node that was computed
};

}  // namespace tactic::plugin
