// What all backends of the process share.
#pragma once

#include <memory>
#include <mutex>
#include <string>

#include "cache_watch.h"
#include "host_decoder.h"
#include "plugin_options.h"
#include "plugin_stats.h"

namespace tactic::plugin {

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

/// JSON for "tactic_inspect".
std::string inspect_json();

}  // namespace tactic::plugin
