// Where the text stood before as it stands now. Heads that copy look for the rows around such a place, and no step
// before has looked there, nor does any cluster say so: a decode step that is told of them (DecodeQuery::likely_rows)
// reads them for certain. Values of the first layer are functions of the token alone, so they tell where the current
// token, and those before it, stood before; in models whose first layer's values depend on more nothing is found, nor
// where V has fewer than 32 dimensions. A row is looked at once; after that a call compares 64 bits of every visible
// row, and those of the rows before it where they agree, and keeps 8 bytes a row of kv_len. Measured:
// docs/method.md, 3.7.
//
//   tactic::EarlierPlaces places;                                       // one per sequence
//   places.find(first_layer, {}, {}, 8, rows);                          // once per token, after its rows are stored
//   query.likely_rows = rows.data(), query.num_likely_rows = rows.size();        // of every layer with the same rows
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "tactic/kv_view.h"

namespace tactic {

/// Knows the tokens of one cache by signatures of the first layer's values. Not thread-safe.
class EarlierPlaces {
 public:
  static constexpr size_t kAlone = 16;  // places of the current token alone, of which more say nothing
  static constexpr int kBefore = 1;     // rows named of each, besides its own
  static constexpr int kAfter = 2;      // measured: docs/method.md, earlier places
  static constexpr int kLongest = 8;    // tokens compared
  static constexpr int kDifferent = 4;  // bits of a signature in which the same token may differ: rounding

  /// Rows [row_begin, row_begin + count) were overwritten: find() looks at them again. It does so by itself with the
  /// newest row, with those named as written, and with rows that lay beyond an earlier kv_len. Throws Error unless rows
  /// lie in 0..2^31-1.
  void forget(int64_t row_begin, int64_t count);
  void forget_all() { known_.clear(); }

  /// The rows around those visible rows where the text up to them ends as it does at the newest one, ascending: of the
  /// `most` with the longest common end, and of those the last; at most 4 * most rows. Text goes from visible row to
  /// visible row. `first_layer`: the first layer's cache, of which the values of head 0 are read, K may be missing.
  /// `visible`: a bit per row, as DecodeQuery::visible, rows past its end are hidden; empty: all of kv_len. `written`:
  /// rows of the last write where they need not be the last ones; the newest row is the last of them that is visible,
  /// or else the last visible one; those that are not visible are passed over. Throws Error if the view cannot be read
  /// or `most` is below 0.
  void find(const KvView& first_layer, std::span<const uint64_t> visible, std::span<const int32_t> written,
            int32_t most, std::vector<int32_t>& rows);

 private:
  uint64_t signature(const KvView& kv, int64_t row);

  std::vector<uint64_t> signatures_;  // [rows]
  std::vector<uint64_t> known_;       // bits of rows whose signature holds
  std::vector<uint64_t> visible_;     // bits of the rows that are there
  std::vector<float> values_;
};

}  // namespace tactic
