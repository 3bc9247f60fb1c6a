// What happened to the caches: which cells were written, which changed unseen, and an index for each.
//
// Cells are seen being written through SET_ROWS. State restore and shifts write them unseen; five things catch that: a
// visible cell that was never seen written, an indexed cell that comes back after steps that did not see it, a check
// value that does not match in a row that a step reads, the plug-in having been off, and, once any of these has
// happened, a comparison of all check values.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "match.h"
#include "passages.h"
#include "tactic/earlier_places.h"
#include "tactic/kv_index.h"
#include "tactic/stats.h"

namespace tactic::plugin {

/// The index of one stream of one layer's cache.
struct StreamIndex {
  KvIndex index;
  uint64_t verified = 0;  // the generation in which its rows were last compared
  // Bits of cells whose content is known: shown to a query, or seen being written, in the step under way and since, and
  // in the step before it.
  std::vector<uint64_t> known, known_before;
  std::vector<int32_t> written;    // cells of the last write, in its order
  int64_t written_since_step = 0;  // rows
  Passages passages;
  EarlierPlaces earlier_places;  // of the first layer
  /// The cells that a step's first row shows. Where a passage begins, what was learned is forgotten and rows that were
  /// taken back leave the index, so that a request that is asked again reads the same rows again. `max_rows`: the step
  /// writes no more. False: no step begins, for another layer has attended to this layer's cache in it.
  bool begin_step(const std::vector<uint64_t>& visible, int64_t num_visible, int64_t max_rows);
  /// A step begins that sees `rows` at most. `few`: less than a selection is worth.
  void note_length(int64_t rows, bool few) {
    short_steps_ = few && rows <= last_rows_ ? std::min(short_steps_ + 1, kManyShort) : 0;
    last_rows_ = rows;
  }
  /// Step after step sees few rows and no more than before, as in a sliding window: rows are not clustered.
  bool stays_short() const { return short_steps_ == kManyShort; }
  /// DecodeQuery::tau_factor of the step under way.
  float tau_factor() const;
  explicit StreamIndex(const IndexOptions& options, const KvShape& shape) : index(options, shape) {}

 private:
  static constexpr int32_t kManyShort = 16;
  int32_t short_steps_ = 0;
  int64_t last_rows_ = 0;
};

/// One layer's cache as attention nodes show it.
struct CacheLayer : CacheGeometry {
  const void* owner = nullptr;  // the backend that last computed with it
  int32_t layer = 0;
  uint64_t last_used = 0;
  std::vector<HeadStats> last_step;  // [num_kv_heads] of the first query, when inspected
  int64_t last_kv_len = 0;
  size_t last_stream = 0;
  std::vector<std::unique_ptr<StreamIndex>> streams;
};

/// Thread-safe; a CacheLayer itself is used by one thread at a time, as its cache is.
class CacheWatch {
 public:
  /// The layer whose cache `match` shows, made or made anew when its geometry is new. nullptr: no cache we can watch.
  std::shared_ptr<CacheLayer> layer_of(const AttentionMatch& match, const IndexOptions& options);

  /// The streams that `match` shows are empty: whatever was known of their memory is of an earlier cache.
  void note_empty(const AttentionMatch& match);

  /// A SET_ROWS node was computed. Returns the layer if its V was written, K having been before, and its geometry is
  /// known.
  std::shared_ptr<CacheLayer> note_write(const ggml_tensor* node, const PluginOptions& options);

  /// Makes the index fit what the query sees: unseen cells count as written and, if anything may have changed unseen,
  /// all rows are compared. `visible`: bits of n_kv cells. `first`: of the step's queries at this stream.
  void before_step(CacheLayer& layer, size_t stream, const std::vector<uint64_t>& visible, bool first,
                   const Faults& faults);

  /// Rows may have changed unseen: the next step of each stream compares all of its rows.
  void compare_again();

  /// Bytes of all indexes, and of the K and V rows they describe.
  void memory(int64_t& index_bytes, int64_t& kv_bytes);

  /// The backend that computes with a layer.
  void set_owner(CacheLayer& layer, const void* owner);

  /// The backend is gone, and its context with it: so are the layers that were its own.
  void forget(const void* owner);

  /// Options of new indexes changed: drop the old ones.
  void clear();

  template <class Fn>
  void for_each(Fn fn) {
    const std::lock_guard lock(mutex_);
    for (auto& [key, layer] : layers_) fn(*layer);
  }

 private:
  void drop_oldest();

  std::mutex mutex_;
  std::unordered_map<const void*, std::shared_ptr<CacheLayer>> layers_;  // by the K cache's memory
  uint64_t generation_ = 1;
  uint64_t clock_ = 0;
};

}  // namespace tactic::plugin
