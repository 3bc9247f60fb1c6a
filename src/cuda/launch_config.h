// Where everything goes: the geometry of an index and the launch configuration of a step, from shapes and device facts
// alone. Pure host functions; what sizes memory, launches and tests all read them here.
#pragma once

#include <string>

#include "cuda/centroid_tile.h"
#include "cuda/params.h"

namespace tactic::cuda {

inline constexpr int kWarps = 12;  // of a block of decode and dense
inline constexpr int kThreads = kWarps * 32;
inline constexpr int kMaxSplits = 8;  // the largest thread-block cluster that every device can place
inline constexpr int kMaxStages = 4;  // tiles of centroids that a warp has on their way

struct DeviceFacts {
  int32_t num_sms = 0;
  size_t shared_bytes_per_block = 0;  // opt-in limit
  bool has_clusters = false;
  int32_t clusters_of[kMaxSplits + 1] =
      {};  // thread-block clusters of so many blocks that run at once, one block an SM
};

/// Query heads that kernels are compiled for: the group rounded up to 4 or 8.
constexpr int32_t head_bucket(int32_t group_size) { return group_size <= 4 ? 4 : 8; }

/// Throws Error naming what is out of range.
IndexGeometry index_geometry(const IndexOptions& options, const KvShape& shape, int32_t max_rows);

/// What a sequence of `rows` rows has when all that is due has been clustered.
SequenceState state_at(const IndexGeometry& geometry, int64_t rows);

/// What of an index made on the CPU a sequence can take over: its segments up to the first that holds rows which are
/// gone or were rewritten since. Throws Error when the index is of other options or another shape, its segments do not
/// follow one another from row 0 on, the full ones first, or there are more than the geometry has room for.
SequenceState uploaded_state(const KvIndex& index, const IndexOptions& options, const KvShape& shape,
                             const IndexGeometry& geometry);

/// Bytes of MergeBuffers<heads>.
constexpr size_t merge_bytes(int32_t heads) {
  const size_t h = static_cast<size_t>(heads);
  return kWarps * h * 8 + kMaxSplits * h * 8 + h * 8 + h * 4 + (kWarps + kMaxSplits) * h * 16 + 8 * 4 +
         kMaxSplits * 8 * 4 + (4 + kMaxSplits) * 4 + (2 + kWarps * kMaxStages) * 8;
}
inline constexpr int kFollowerSlots = 256;  // of its hash table
/// Bytes of FollowerBuffers.
inline constexpr size_t kFollowerBytes =
    16 + 2 * kMaxGroup * 4 + (kMaxHeavy + kMaxFollowers + kMaxLikely + kFollowerSlots) * 4 + 256 * 8;
/// Bytes of LearnBuffers.
inline constexpr size_t kLearnBytes = (kMaxSplits + kWarps) * 16;
/// Bytes of MeasureBuffers.
inline constexpr size_t kMeasureBytes = (kMaxSplits + kWarps) * kMaxGroup * 32;
/// Bytes of QuantizedQueries<head_dim, heads>.
constexpr size_t quantized_bytes(int32_t head_dim, int32_t heads) {
  return static_cast<size_t>(heads) * static_cast<size_t>(2 * ((head_dim + 63) / 64 * 64) + 8);
}
/// Floats from one head's partial output to the next in shared memory, so that a warp's stores meet in no bank.
constexpr int32_t value_stride(int32_t head_dim) { return head_dim + 4; }
/// Shared memory of a block of `decode` besides its tables, with `stages` tiles of centroids a warp; partial outputs
/// lie where these were.
constexpr size_t fixed_bytes(int32_t head_dim, int32_t heads, int32_t stages) {
  const size_t h = static_cast<size_t>(heads), values = kWarps * h * static_cast<size_t>(value_stride(head_dim)) * 4,
               tiles = kWarps * static_cast<size_t>(stages * tile_bytes((head_dim + 63) / 64 * 64));
  return merge_bytes(heads) + kFollowerBytes + kLearnBytes + kMeasureBytes + quantized_bytes(head_dim, heads) +
         static_cast<size_t>((head_dim + 31) / 32 * 512) + h * static_cast<size_t>(head_dim + kMaxSplits * 4) * 4 +
         (values > tiles ? values : tiles);
}
/// Bytes of SelectTables; the clusters are a multiple of 16.
inline constexpr int32_t kTablePadding = 8;
size_t table_bytes(int32_t own_clusters, int32_t own_segments, int32_t heads);

struct DecodeConfig {
  int32_t splits = 1;        // blocks per (sequence, KV head)
  int32_t own_clusters = 0;  // room per block
  int32_t own_segments = 0;
  int32_t stages = kMaxStages;
  size_t shared_bytes = 0;
  size_t block_workspace_bytes = 0;  // 0: tables are in shared memory
};

/// As many blocks per pair as fill the device once, no more than its largest cluster.
DecodeConfig decode_config(const DeviceFacts& device, const IndexGeometry& geometry, int32_t num_sequences,
                           int32_t num_kv_heads, int32_t head_dim, int32_t group_size);

/// Blocks per (sequence, KV head) of the dense step: one wave of blocks, but at least four tiles for each warp.
int32_t dense_splits(const DeviceFacts& device, int32_t num_sequences, int32_t num_kv_heads, int64_t max_rows);

/// The next array in `memory`, or nullptr while only the size is asked for.
template <class T>
T* take(std::byte* memory, size_t& at, size_t count) {
  T* p = memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + at);
  at += (count * sizeof(T) + 255) / 256 * 256;
  return p;
}

/// Arrays of a rank within `memory` for up to so many sequences, all but `exact`; returns their size. `g`: of the
/// largest index.
size_t lay_out_rank(RankParams& params, const IndexGeometry& g, const DecodeLimits& limits, std::byte* memory);

/// Whether this build has kernels for rows of this type and length.
bool is_compiled(DType dtype, int32_t head_dim);

/// Throws Error when the batch does not fit the limits or its pointers and strides are not as the header says.
void validate(const DecodeBatch& batch, const DecodeLimits& limits);
/// What K and V alone must be, for whoever reads only those.
void validate_rows(const DecodeBatch& batch);
/// Throws Error unless a sequence's page table can hold kv_len rows, called `name`; returns how many pages they need.
int64_t check_pages(const std::string& name, const DecodeBatch& batch, int64_t kv_len);
/// Lengths in 0..max_rows, and every page that they use among those that exist.
void validate(const HostTables& tables, const DecodeBatch& batch, int32_t max_rows);
/// Throws Error for limits that no device serves.
void validate(const DecodeLimits& limits);
/// Throws Error when a block does not get that much shared memory on the device. `what` needs it.
void check_shared(const std::string& what, size_t bytes, const DeviceFacts& device);

}  // namespace tactic::cuda
