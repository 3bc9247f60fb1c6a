// The ggml device of type ACCEL: takes decode attention and cache writes from the CPU, leaves everything else to it.
#pragma once

#include <memory>
#include <mutex>
#include <string>

#include "cache_watch.h"
#include "ggml-backend-impl.h"
#include "host_decoder.h"
#include "plugin_options.h"
#include "plugin_stats.h"

namespace tactic::plugin {

/// What all backends of the process share.
struct Shared {
  CacheWatch watch;
  PluginStats stats;
  HostDecoder decoder;

  std::shared_ptr<const PluginOptions> options() const;
  /// New indexes if the index options changed.
  void set_options(const PluginOptions& options);

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const PluginOptions> options_ = std::make_shared<PluginOptions>();
};

Shared& shared();

ggml_backend_dev_t accel_device(ggml_backend_reg_t reg);

/// Threads of a backend made by accel_device (the host sets them).
void set_num_threads(ggml_backend_t backend, int num_threads);

/// JSON for "tactic_inspect".
std::string inspect_json();

}  // namespace tactic::plugin
