// What kernels are given: views of device memory, passed by value. No CUDA headers, so that host code can fill them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tactic/cuda.h"

namespace tactic::cuda {

/// Rows of a segment and its clusters are numbered by arithmetic, so that no table stands between a step and its data:
/// full segment s covers rows [s * segment_tokens, + segment_tokens) and has its clusters at s * full_clusters;
/// provisional segment p of a sequence with f full ones covers rows [f * segment_tokens + p * provisional_tokens, +
/// provisional_tokens) and has its clusters at provisional_begin + p * provisional_clusters. Members of a segment stand
/// in `members` at the segment's own rows, cluster by cluster, and at the end those that are not finite, in no cluster.
struct IndexGeometry {
  int32_t segment_tokens = 0, provisional_tokens = 0;
  int32_t full_clusters = 0, provisional_clusters = 0;  // per segment and KV head, multiples of 16
  int32_t provisional_begin = 0;                        // clusters of full segments before them
  int32_t max_clusters = 0;                             // per sequence and KV head
  int32_t max_segments = 0;                             // full ones, per sequence
  int32_t all_segments = 0;                             // and behind them the provisional ones: slots of num_not_finite
  int32_t max_rows = 0;
  int32_t sink_tokens = 0;
  int32_t code_bytes = 0;  // of one centroid: head_dim up to a multiple of 64
  float outlier_fraction = 0;
};

/// How far the index of a sequence goes. Lives in device memory, so that a captured graph sees it grow.
struct SequenceState {
  int32_t full_segments = 0;
  int32_t provisional_segments = 0;

  bool operator==(const SequenceState&) const = default;
};

inline constexpr int kMaxGroup = 8;  // query heads of a KV head

/// What steps have learned about a head's estimates: as core's Calibration.
struct HeadCalibration {
  float beta = 0;
  float variance_ratio = 1;
  float sum_xx = 0, sum_xy = 0;
  float usual_variance[kMaxGroup] = {};  // [group] of a draw, relative; 0: unknown
};

inline constexpr int kMaxFollowers = 32;
inline constexpr int kMaxLikely = 64;  // rows that a query names itself
inline constexpr int kMaxHeavy = 64;
inline constexpr int kMaxSuspects = 64;

/// Rows of a block's own segments that the next step reads for certain, ascending.
struct Followers {
  int32_t count = 0;
  int32_t splits = 0;  // of the step that named them: with others, segments have other owners
  int32_t rows[kMaxFollowers];
};

/// Rows of a block's own segments that steps found heavy though their clusters promised little: core's Calibration.
struct HeavyRows {
  int32_t count = 0, num_suspects = 0;
  int32_t splits = 0;  // of the step that wrote them
  int32_t unused = 0;
  int32_t rows[kMaxHeavy];         // found so twice: every step that learns reads them for certain
  int32_t suspects[kMaxSuspects];  // once, the latest last
};

struct IndexView {
  IndexGeometry geometry;
  int32_t num_kv_heads = 0;
  std::byte* tiles = nullptr;              // [sequences, heads, max_clusters / 16, tile_bytes()]
  uint16_t* members = nullptr;             // [sequences, heads, max_rows] rows relative to the segment's first
  uint16_t* num_not_finite = nullptr;      // [sequences, heads, all segments] rows that are read by every step
  int32_t* any_not_finite = nullptr;       // [sequences] not 0: a segment had such rows since the sequence was empty
  HeadCalibration* calibration = nullptr;  // [sequences, heads]
  Followers* followers = nullptr;          // [sequences, heads, kMaxSplits]
  HeavyRows* heavy = nullptr;              // [sequences, heads, kMaxSplits]
  uint8_t* row_checks = nullptr;           // [sequences, heads, max_rows] as core's Segment
  SequenceState* states = nullptr;         // [sequences]
};

/// What a step does besides: nothing, compare rows with their check values, that (where asked for) and what learning
/// needs, or these (where asked for) and read on until it has its target_mass.
enum class StepKind { kPlain, kChecked, kLearning, kVerified };

struct DecodeParams {
  DecodeBatch batch;
  IndexView index;
  float tau = 0, target_error = 0;  // tau 0: from target_error
  float refine = 0;
  float beta = 0;  // 0: the index's
  uint64_t seed = 0;
  bool check_rows = false;
  int32_t splits = 0;              // blocks that share a (sequence, KV head); a thread-block cluster
  int32_t max_own_clusters = 0;    // room in each block's tables
  int32_t stages = 1;              // tiles of centroids that a warp has on their way, 1 to 4
  size_t shared_bytes = 0;         // of a block
  std::byte* workspace = nullptr;  // the tables, where they do not fit into shared memory
  size_t block_workspace_bytes = 0;
  StepRecord* records = nullptr;  // [sequences, num_kv_heads] or nullptr
  float target_mass = 0;          // kVerified
};

/// What a query head's order holds.
struct OrderTotals {
  int32_t tokens, clusters;
};
/// Softmax over some rows, natural log.
struct PartialSoftmax {
  float max;
  double sum;
};

/// A pair is a sequence and KV head, a head here a query head of its group.
struct RankParams {
  DecodeBatch batch;
  IndexView index;
  float target_mass = 0;  // fit; 0: topk
  int32_t budget = 0;     // topk
  int32_t max_rows = 0;   // per pair
  int32_t max_probes = 0;
  int32_t splits = 0;  // blocks that score the probes of a head; other kernels have multiples of it
  // Workspace. Clusters are numbered among those that the sequence has:
  float* dots = nullptr;            // [pairs, heads, max_clusters]
  uint32_t* places = nullptr;       // [pairs, max_clusters] as TileView's
  uint64_t* entries = nullptr;      // [pairs, heads, max_clusters] what is sorted: falling score, cluster
  int32_t* order = nullptr;         // [pairs, heads, max_clusters] clusters that have members, by falling score
  int32_t* before = nullptr;        // [pairs, heads, max_clusters] tokens ahead of each in the order
  OrderTotals* totals = nullptr;    // [pairs, heads]
  float* probes = nullptr;          // [pairs, heads, max_probes] scores of those
  PartialSoftmax* exact = nullptr;  // [pairs, heads, splits] of the rows read anyway
  int32_t* taken = nullptr;         // [pairs, max_clusters] first members that are read
  int32_t* rows = nullptr;          // [pairs, max_rows] to read
  int32_t* counts = nullptr;        // [pairs] of those
  int32_t* probed = nullptr;        // [pairs] keys that were read for the fit
  int32_t* exact_counts = nullptr;  // [pairs] of those at the list's beginning that are read anyway
  int32_t* changed = nullptr;       // [pairs] not 0: a listed row is not the one that was clustered
  StepRecord* records = nullptr;    // [pairs] or nullptr
};

struct DenseParams {
  DecodeBatch batch;
  const int32_t* rows = nullptr;          // [pairs, max_rows] to read, or nullptr: all of them
  const int32_t* counts = nullptr;        // [pairs] of those
  const int32_t* exact_counts = nullptr;  // [pairs] of those at the list's beginning that are not checked
  const uint8_t* row_checks = nullptr;    // [pairs, max_checks] of the index, or nullptr: no row is looked at
  int32_t max_checks = 0;
  int32_t* changed = nullptr;  // [pairs] not 0: a row of the list is not the one that was clustered. Without a list:
                               // only such pairs are read, or (nullptr) all
  int32_t max_rows = 0;
  int32_t splits = 0;
  float* partial_out = nullptr;    // [sequences, heads, splits, group, head_dim]
  float* partial_state = nullptr;  // [sequences, heads, splits, group, 2] max (log2) and sum
  uint32_t* arrived = nullptr;     // [sequences, heads] zero before and after each run
  StepRecord* records = nullptr;   // [sequences, heads] or nullptr; of a list, its maker writes them
};

}  // namespace tactic::cuda
