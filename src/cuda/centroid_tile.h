// Sixteen clusters of one segment and KV head as they lie in memory, all that `score` wants to know of them in one
// piece: it comes to a block's shared memory by one copy.
//
// Rows of 8-bit codes: the centroids' residuals from the segment's mean key, then that key in two rows, high parts and
// low parts of eight bits each (like a query), so that the same integer tensor-core product scores both.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cuda/params.h"

#ifdef __CUDACC__
#define TACTIC_HOST_DEVICE __host__ __device__
#else
#define TACTIC_HOST_DEVICE
#endif

namespace tactic::cuda {

inline constexpr int32_t kTileClusters = 16;
/// Units of a low part in one of the high part.
inline constexpr float kLowUnits = 254;

struct ClusterFacts {
  float scale;   // centroid = mean of its segment + scale * code
  float spread;  // mean squared distance of the members to it, per dimension
};

/// x = high + low / kLowUnits, to 1/508.
struct SplitCode {
  int8_t high, low;
};
TACTIC_HOST_DEVICE inline SplitCode split_code(float x) {
  const float high = rintf(x);
  return {static_cast<int8_t>(high), static_cast<int8_t>(rintf((x - high) * kLowUnits))};
}

TACTIC_HOST_DEVICE constexpr int32_t tile_bytes(int32_t code_bytes) {
  return (kTileClusters + 2) * code_bytes + kTileClusters * (8 + 4) + 16;
}

/// Where byte d of a row of codes lies: halves of 128 bytes change places in every other row, so that eight threads
/// that read 16 bytes each of two rows meet in no bank.
TACTIC_HOST_DEVICE constexpr int32_t code_at(int32_t code_bytes, int32_t row, int32_t d) {
  return row * code_bytes + (code_bytes >= 128 ? d ^ (row & 1) << 6 : d);
}

/// A tile at `data`, `code_bytes` being head_dim up to a multiple of 64.
struct TileView {
  std::byte* data;
  int32_t code_bytes;

  TACTIC_HOST_DEVICE int8_t& code(int32_t cluster, int32_t d) const {
    return reinterpret_cast<int8_t*>(data)[code_at(code_bytes, cluster % kTileClusters, d)];
  }
  TACTIC_HOST_DEVICE ClusterFacts& facts(int32_t cluster) const {
    return reinterpret_cast<ClusterFacts*>(data + (kTileClusters + 2) * code_bytes)[cluster % kTileClusters];
  }
  /// First member (from the segment's first row) << 16 | members.
  TACTIC_HOST_DEVICE uint32_t& place(int32_t cluster) const {
    return reinterpret_cast<uint32_t*>(data + (kTileClusters + 2) * code_bytes +
                                       kTileClusters * 8)[cluster % kTileClusters];
  }
  TACTIC_HOST_DEVICE float mean(int32_t d) const {
    const auto* codes = reinterpret_cast<const int8_t*>(data);
    return mean_step() * (static_cast<float>(codes[code_at(code_bytes, kTileClusters, d)]) +
                          static_cast<float>(codes[code_at(code_bytes, kTileClusters + 1, d)]) / kLowUnits);
  }
  TACTIC_HOST_DEVICE float centroid(int32_t cluster, int32_t d) const {
    return mean(d) + facts(cluster).scale * static_cast<float>(code(cluster, d));
  }
  /// Element d of a mean key whose largest is `largest`.
  TACTIC_HOST_DEVICE void set_mean(int32_t d, float x, float largest) const {
    const SplitCode split = split_code(largest > 0 ? x / largest * 127 : 0);
    auto* codes = reinterpret_cast<int8_t*>(data);
    codes[code_at(code_bytes, kTileClusters, d)] = split.high;
    codes[code_at(code_bytes, kTileClusters + 1, d)] = split.low;
    mean_step() = largest / 127;
  }
  TACTIC_HOST_DEVICE float& mean_step() const {
    return *reinterpret_cast<float*>(data + (kTileClusters + 2) * code_bytes + kTileClusters * (8 + 4));
  }
};

/// The tile of a cluster of a (sequence, KV head).
TACTIC_HOST_DEVICE inline TileView tile_of(const IndexView& index, int64_t pair, int32_t cluster) {
  const IndexGeometry& g = index.geometry;
  const int64_t tile = pair * (g.max_clusters / kTileClusters) + cluster / kTileClusters;
  return {index.tiles + tile * tile_bytes(g.code_bytes), g.code_bytes};
}

}  // namespace tactic::cuda
