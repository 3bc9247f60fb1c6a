// The index over the K rows of one layer: clusters of the older rows, and the rows that are not clustered yet.
//
// Rows are named by their place in the cache. Whoever writes rows says so with write(); maintain() then clusters what
// has become full. A row that was rewritten is read exactly until its segment is built anew, so a query never sees an
// old key.
//
//   tactic::KvIndex index({}, {.num_kv_heads = 8, .head_dim = 128, .v_head_dim = 128});
//   index.write(0, kv.kv_len);         // after the rows have been stored
//   index.maintain(kv);
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "tactic/kv_view.h"
#include "tactic/options.h"

namespace tactic {

struct KvShape {
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t v_head_dim = 0;
};

struct IndexState;  // src/core/index_state.h

/// Not thread-safe; different indexes may be used from different threads.
class KvIndex {
 public:
  KvIndex(const IndexOptions& options, const KvShape& shape);
  ~KvIndex();
  KvIndex(KvIndex&&) noexcept;
  KvIndex& operator=(KvIndex&&) noexcept;

  /// Rows [row_begin, row_begin + count) were stored or overwritten: they are read exactly until maintain() clusters
  /// them. Overwritten rows wait until they are worth a new segment: until provisional_tokens rows of a full one wait,
  /// or a quarter of a provisional one. Reads no row; memory is a quarter of a byte for
  /// each row up to the highest one ever written, at most twice that. Throws Error unless rows lie in 0..2^31-1.
  void write(int64_t row_begin, int64_t count);

  /// Rows from kv_len on are gone.
  void truncate(int64_t kv_len);

  /// These rows are gone, and segments that hold any of them: their other rows are clustered anew when that is due,
  /// with Clustering::kWhole when segment_tokens rows wait for it. Until then they are read exactly.
  void remove(int64_t row_begin, int64_t count);

  /// Clusters what is due. `max_segments` bounds the work of this call, negative: all that is due. A full segment
  /// counts as 1, a provisional one as (provisional_tokens / segment_tokens)^2 * cluster_tokens /
  /// provisional_cluster_tokens (1/16 with clusters of 16, 9/256 with clusters of 9), so that a call with less than 1
  /// builds provisional ones alone. With Clustering::kWhole any call clusters all that is due. Returns whether another
  /// call with this budget would find something to do. Throws Error if `kv` does not fit the shape or kv_len is less
  /// than the rows written.
  bool maintain(const KvView& kv, double max_segments = -1);

  /// Compares the check values of indexed rows in [row_begin, row_begin + count); rows that differ count as rewritten.
  /// Where more than 8 rows and a 32nd of a segment differ, all of its rows do, as most changed rows may have passed.
  /// Returns how many differed. Check values are made of eight bytes of a key and of its value: of rows of another text
  /// one in 256 per KV head passes, of rows with a few changed elements many may (write() is sure). Throws Error as
  /// write() and maintain() do.
  int64_t verify(const KvView& kv, int64_t row_begin, int64_t count);
  /// Of all indexed rows.
  int64_t verify(const KvView& kv);

  /// Forgets everything but the options.
  void clear();

  /// Forgets what decode steps have learned (calibration, rows that they found heavy or expect). Steps over the same
  /// rows from here on read the same rows again.
  void forget_learned();

  /// Threads that maintain() may use, at most 1024; 0: OpenMP's default. The result does not depend on it.
  void set_num_threads(int32_t num_threads);

  /// Bits of rows [64 * word, 64 * word + 64): the row was written.
  uint64_t written_word(int64_t word) const;
  uint64_t indexed_word(int64_t word) const;  // the row is in clusters and unchanged since
  int64_t rows_written() const;               // rows that hold something
  int64_t rows_indexed() const;               // of those, rows in clusters and unchanged since
  int64_t num_clusters() const;               // per KV head
  double mean_spread(int32_t head) const;     // mean squared distance of rows to their centroids, per dimension
  size_t memory_bytes() const;                // centroids, spreads, members, row checks, bits; not what was learned
  const IndexOptions& options() const;
  const KvShape& shape() const;

  IndexState& state() { return *state_; }
  const IndexState& state() const { return *state_; }

 private:
  std::unique_ptr<IndexState> state_;
};

}  // namespace tactic
