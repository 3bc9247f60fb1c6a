// A function of the host program that answers one-row attention in Tactic's place ("tactic_set_decoder").
#pragma once

#include <mutex>
#include <span>

#include "plugin_api.h"
#include "tactic/attention.h"

namespace tactic::plugin {

/// Thread-safe.
class HostDecoder {
 public:
  void set(tactic_decode_fn decode, void* user);
  bool is_set() const;
  /// Whether the host answered all of them; `stats` [queries.size()] is filled then.
  bool answer(std::span<const DecodeQuery> queries, StepStats* stats) const;

 private:
  mutable std::mutex mutex_;
  tactic_decode_fn decode_ = nullptr;
  void* user_ = nullptr;
};

}  // namespace tactic::plugin
