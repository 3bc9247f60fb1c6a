// Tiles of centroids on their way to shared memory, a ring of them for each warp.
#pragma once

#include "cuda/centroid_tile.h"
#include "cuda/device.cuh"

namespace tactic::cuda {

/// The layout of TileView for a head_dim known at compile time.
template <int kDim>
struct CentroidTile {
  static constexpr int kLoads = (kDim + 63) / 64, kCodeBytes = kLoads * 64;
  int8_t codes[(kTileClusters + 2) * kCodeBytes];
  ClusterFacts facts[kTileClusters];
  uint32_t places[kTileClusters];
  float mean_step, unused[3];

  /// 16 bytes of a row.
  __device__ __forceinline__ uint4 load(int row, int chunk) const {
    return *reinterpret_cast<const uint4*>(codes + code_at(kCodeBytes, row, 16 * chunk));
  }
};

/// Of one warp; whole warps call. `barriers` and `tiles`: [stages] in shared memory.
template <int kDim>
class TileRing {
 public:
  static_assert(sizeof(CentroidTile<kDim>) == tile_bytes(CentroidTile<kDim>::kCodeBytes));

  __device__ TileRing(CentroidTile<kDim>* tiles_of_warp, uint64_t* barriers_of_warp, int num_stages)
      : tiles(tiles_of_warp), barriers(barriers_of_warp), stages(num_stages) {
#ifdef TACTIC_HOPPER
    const int lane = threadIdx.x & 31;
    if (lane < stages) TransferBarrier::init(barriers + lane);
    TransferBarrier::publish();
    __syncwarp();
#endif
  }

  /// Asks for a tile, which must not be one of more than `stages` that were not taken. nullptr: none.
  __device__ void ask(const std::byte* from) {
#ifdef TACTIC_HOPPER
    if (from == nullptr) return;
    if ((threadIdx.x & 31) == 0) {
      TransferBarrier::expect(barriers + asked, sizeof(CentroidTile<kDim>));
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       shared_address(tiles + asked)),
                   "l"(from), "n"(sizeof(CentroidTile<kDim>)), "r"(shared_address(barriers + asked))
                   : "memory");
    }
#else
    auto* to = reinterpret_cast<std::byte*>(tiles + asked);
    for (int at = 16 * (threadIdx.x & 31); from != nullptr && at < static_cast<int>(sizeof(CentroidTile<kDim>));
         at += 32 * 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to + at)), "l"(from + at)
                   : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    if (++asked == stages) asked = 0;
  }

  /// The tile that was asked for first of those not taken yet. One more ask() must follow before the next take().
  __device__ const CentroidTile<kDim>& take() {
    const CentroidTile<kDim>& tile = tiles[taken];
#ifdef TACTIC_HOPPER
    TransferBarrier::wait(barriers + taken, parity);
#else
    switch (stages) {
      case 1: asm volatile("cp.async.wait_group 0;" ::: "memory"); break;
      case 2: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
      case 3: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
      default: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
    }
    __syncwarp();
#endif
    if (++taken == stages) {
      taken = 0;
      parity ^= 1;
    }
    return tile;
  }

 private:
  CentroidTile<kDim>* const tiles;
  uint64_t* const barriers;
  const int stages;
  int asked = 0, taken = 0;
  uint32_t parity = 0;
};

}  // namespace tactic::cuda
