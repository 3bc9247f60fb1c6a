// Which segments of a sequence a block of the cluster owns, and where their data lie. Segment s (full ones first, then
// the provisional ones) belongs to block s % splits, so that neighbouring segments, which tend to matter together, are
// spread.
#pragma once

#include "cuda/centroid_tile.h"
#include "cuda/params.h"

namespace tactic::cuda {

struct OwnSegment {
  int32_t cluster;        // first of its clusters among the sequence's
  int32_t local_cluster;  // and among the block's own
  int32_t num_clusters;
  int32_t slot;  // of its number of rows that are not finite
  int32_t first_row, num_rows;
};

/// Of a block: segment_of() is right below, and first wrong a third above.
inline constexpr int32_t kMaxOwnClusters = 1 << 22;

struct OwnSegments {
  IndexGeometry geometry;
  int32_t full, full_before;  // the sequence's full segments; the first own one
  int32_t own_full, own_provisional, first_provisional, splits;
  float per_full, per_provisional;  // segments per cluster: a division that costs one multiplication

  TACTIC_HOST_DEVICE OwnSegments(const IndexGeometry& g, const SequenceState& state, int32_t rank, int32_t num_splits)
      : geometry(g), full(state.full_segments), full_before(rank), splits(num_splits) {
    own_full = full > rank ? (full - rank + splits - 1) / splits : 0;
    first_provisional = (rank - full % splits + splits) % splits;
    own_provisional = state.provisional_segments > first_provisional
                          ? (state.provisional_segments - first_provisional + splits - 1) / splits
                          : 0;
    per_full = 1.0f / static_cast<float>(g.full_clusters);
    per_provisional = 1.0f / static_cast<float>(g.provisional_clusters);
  }

  TACTIC_HOST_DEVICE int32_t count() const { return own_full + own_provisional; }
  TACTIC_HOST_DEVICE int32_t clusters() const {
    return own_full * geometry.full_clusters + own_provisional * geometry.provisional_clusters;
  }
  TACTIC_HOST_DEVICE OwnSegment at(int32_t k) const {
    OwnSegment s;
    if (k < own_full) {
      s.slot = full_before + k * splits;
      s.cluster = s.slot * geometry.full_clusters;
      s.local_cluster = k * geometry.full_clusters;
      s.num_clusters = geometry.full_clusters;
      s.first_row = s.slot * geometry.segment_tokens;
      s.num_rows = geometry.segment_tokens;
    } else {
      const int32_t p = first_provisional + (k - own_full) * splits;
      s.slot = geometry.max_segments + p;
      s.cluster = geometry.provisional_begin + p * geometry.provisional_clusters;
      s.local_cluster = own_full * geometry.full_clusters + (k - own_full) * geometry.provisional_clusters;
      s.num_clusters = geometry.provisional_clusters;
      s.first_row = full * geometry.segment_tokens + p * geometry.provisional_tokens;
      s.num_rows = geometry.provisional_tokens;
    }
    return s;
  }
  /// The own segment that holds own cluster `local`, below kMaxOwnClusters. The half keeps the product away from whole
  /// numbers.
  TACTIC_HOST_DEVICE int32_t segment_of(int32_t local) const {
    const int32_t in_full = own_full * geometry.full_clusters;
    return local < in_full
               ? static_cast<int32_t>((static_cast<float>(local) + 0.5f) * per_full)
               : own_full + static_cast<int32_t>((static_cast<float>(local - in_full) + 0.5f) * per_provisional);
  }
};

/// Segment `number` of a sequence, the full ones first.
struct SegmentPlace {
  int32_t slot, first_row, num_rows;

  TACTIC_HOST_DEVICE SegmentPlace(const IndexGeometry& g, const SequenceState& state, int32_t number) {
    const int32_t full = state.full_segments, provisional = number - full;
    slot = provisional < 0 ? number : g.max_segments + provisional;
    first_row =
        provisional < 0 ? number * g.segment_tokens : full * g.segment_tokens + provisional * g.provisional_tokens;
    num_rows = provisional < 0 ? g.segment_tokens : g.provisional_tokens;
  }
};

/// The segment that holds a cluster; slot -1: the sequence has no such cluster.
struct ClusterPlace {
  int32_t slot = -1, first_row = 0;

  TACTIC_HOST_DEVICE ClusterPlace(const IndexGeometry& g, const SequenceState& state, int32_t cluster) {
    const bool full = cluster < g.provisional_begin;
    const int32_t number = full ? cluster / g.full_clusters : (cluster - g.provisional_begin) / g.provisional_clusters;
    if (number >= (full ? state.full_segments : state.provisional_segments)) return;
    const SegmentPlace segment(g, state, full ? number : state.full_segments + number);
    slot = segment.slot;
    first_row = segment.first_row;
  }
};

/// Clusters that a sequence has, padding included; the i-th of them has a number below max_clusters.
TACTIC_HOST_DEVICE inline int32_t num_clusters(const IndexGeometry& g, const SequenceState& state) {
  return state.full_segments * g.full_clusters + state.provisional_segments * g.provisional_clusters;
}
TACTIC_HOST_DEVICE inline int32_t cluster_number(const IndexGeometry& g, const SequenceState& state, int32_t i) {
  const int32_t in_full = state.full_segments * g.full_clusters;
  return i < in_full ? i : g.provisional_begin + i - in_full;
}

/// Rows that are read anyway: sinks, and those that no segment holds yet.
struct ExactRows {
  int32_t sinks, indexed, count;

  TACTIC_HOST_DEVICE ExactRows(const IndexGeometry& g, const SequenceState& state, int32_t kv_len) {
    indexed = state.full_segments * g.segment_tokens + state.provisional_segments * g.provisional_tokens;
    sinks = g.sink_tokens < indexed ? g.sink_tokens : indexed;
    count = sinks + (kv_len > indexed ? kv_len - indexed : 0);
  }
  TACTIC_HOST_DEVICE int32_t row(int32_t i) const { return i < sinks ? i : indexed + i - sinks; }
};

/// What is of use to a step that sees kv_len rows: nothing where the index holds rows from there on, which are hidden.
TACTIC_HOST_DEVICE inline SequenceState usable_state(const IndexGeometry& g, const SequenceState& state,
                                                     int32_t kv_len) {
  return kv_len < ExactRows(g, state, kv_len).indexed ? SequenceState{} : state;
}

}  // namespace tactic::cuda
