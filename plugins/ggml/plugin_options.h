// The grammar of the variable TACTIC: "key=value,key=value".
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "tactic/options.h"

namespace tactic::plugin {

/// Safeguards that a test takes out to prove that it would notice.
struct Faults {
  bool ignore_mask = false;    // fault=mask
  bool ignore_writes = false;  // fault=writes
  bool skip_verify = false;    // fault=verify

  bool any() const { return ignore_mask || ignore_writes || skip_verify; }
};

struct PluginOptions {
  bool enabled = true;  // select=off: every node is the host's
  DecodeOptions decode;
  IndexOptions index;
  int32_t min_context = 1024;  // padded cache length from which attention is taken over
  int32_t min_sparse = 2048;   // rows that a query sees from which rows are selected, at least min_context
  bool own_lengths = false;    // one of these two was given: a GPU takes over from there on too
  int32_t max_rows = 8;        // more rows of one sequence in a step are a prompt
  int32_t places = 8;          // earlier places of the text around which rows are read (tactic/earlier_places.h)
  bool accept_any = false;     // accept=any: also tensors that are no view of a filled cache (test-backend-ops)
  bool inspect = false;
  Faults faults;
};

/// Defaults, then the preset, then the single keys. Throws Error naming the key, its value and what is allowed, and
/// when both `error` and `tau` are given.
PluginOptions parse_options(std::string_view text);

}  // namespace tactic::plugin
