// Sums over steps, and the statistics file.
#pragma once

#include <cstdint>
#include <cstdio>
#include <mutex>
#include <string>

#include "plugin_api.h"
#include "tactic/stats.h"

namespace tactic::plugin {

/// Thread-safe.
class PluginStats {
 public:
  ~PluginStats();

  /// Writes one JSON line per decode step to `path` from now on; empty: no more.
  void open(const std::string& path);

  /// One attention node: `stats` [num_queries].
  void add_node(const StepStats* stats, int64_t num_queries, int32_t layer, int64_t attend_ns);
  void add_write(int64_t ns);
  void add_clustering(int64_t ns);

  /// Since the last call.
  tactic_totals take();

 private:
  void end_step();
  void write_line();

  std::mutex mutex_;
  tactic_totals totals_{}, step_{};  // all, and the decode step under way
  int32_t last_layer_ = -1;          // of the step under way
  int32_t deepest_layer_ = -1;       // of the steps so far: with it a step ends; the first ends where the second begins
  int64_t step_number_ = 0;
  std::FILE* file_ = nullptr;
  std::string path_;
};

}  // namespace tactic::plugin
