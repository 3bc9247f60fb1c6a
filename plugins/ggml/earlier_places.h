// Where the text stood before as it stands now. Heads that copy look for the rows around such a place, and no step
// before has looked there, nor does any cluster say so. Values of the first layer are functions of the token alone, so
// they tell where the current token, and those before it, stood before.
#pragma once

#include <cstdint>
#include <vector>

#include "tactic/kv_view.h"

namespace tactic::plugin {

/// Knows the tokens of one stream of the first layer's cache by signatures of their values.
class EarlierPlaces {
 public:
  static constexpr size_t kAlone = 16;  // places of the current token alone, of which more say nothing
  static constexpr int kBefore = 1;     // rows named of each, besides its own
  static constexpr int kAfter = 2;      // measured: docs/method.md, earlier places
  static constexpr int kLongest = 8;    // tokens compared
  static constexpr int kDifferent = 4;  // bits of a signature in which the same token may differ: rounding

  /// Cells [begin, begin + count) are written.
  void forget(int64_t begin, int64_t count);
  void forget_all() { known_.clear(); }

  /// The rows around those visible cells where the text up to them ends as it does at the newest one, ascending: of the
  /// `most` with the longest common end, and of those the last. Text goes from visible cell to visible cell. `kv`: the
  /// first layer's cache. `visible`: bits of cells. `written`: cells of the last write; the newest cell is the last of
  /// them that is visible, or else the last visible one.
  void find(const KvView& kv, const std::vector<uint64_t>& visible, const std::vector<int32_t>& written, int32_t most,
            std::vector<int32_t>& rows);

 private:
  uint64_t signature(const KvView& kv, int64_t cell);

  std::vector<uint64_t> signatures_;  // [cells]
  std::vector<uint64_t> known_;       // bits of cells whose signature holds
  std::vector<float> values_;
};

}  // namespace tactic::plugin
