// Which rows a decode step reads and with what weight. Every selector, and every baseline, ends in one of these.
#pragma once

#include <cstdint>
#include <vector>

namespace tactic {

/// Rows of one KV head for one query. Certain rows come first, sampled rows after them.
struct HeadSelection {
  std::vector<int32_t> tokens;  // row numbers, each at most once
  std::vector<float>
      log_weights;  // added to the score: 0 for a certain row, -ln(inclusion probability) for a sampled one
  std::vector<int32_t> clusters;  // that each token was read as a member of (numbered over all segments), -1 for tokens
                                  // that are read whatever their cluster says
  int64_t num_certain = 0;        // tokens[0 .. num_certain) are certain

  void clear() { tokens.clear(), log_weights.clear(), clusters.clear(), num_certain = 0; }
};

/// One HeadSelection per KV head.
struct Selection {
  std::vector<HeadSelection> heads;
};

}  // namespace tactic
