// Whether rows that a step reads are the ones that were clustered, from eight bytes of each key and value.
#pragma once

#include "cuda/attend.cuh"
#include "cuda/select_sample.cuh"

namespace tactic::cuda {

/// Not 0 when a tile's row is not the one that was clustered: the lower half of the warp looks at its key, the upper
/// one at its value. checks: [rows] of the head.
template <DType kDType, int kDim>
__device__ __forceinline__ uint32_t row_changed(const uint8_t* checks, int32_t row, const std::byte* k,
                                                const std::byte* v, const RowTile& tile) {
  const bool value = (threadIdx.x & 16) != 0;
  const uint32_t stored = __ldg(checks + row);
  const uint32_t found = check_row(value ? v + tile.v_offset : k + tile.k_offset, stored_bytes<kDType>(kDim), row);
  return found ^ (value ? stored >> 4 : stored & 15);
}

/// All warps: whether a row of the block's marked clusters changed, as this lane sees it. marked: a bit per own
/// cluster.
template <DType kDType, int kDim>
__device__ __forceinline__ bool marked_rows_changed(const uint32_t* marked, const DecodeBatch& batch,
                                                    const SelectTables& tables, const OwnSegments& own,
                                                    const uint16_t* members, const uint8_t* checks,
                                                    const int32_t* pages, const std::byte* k, const std::byte* v) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  uint32_t changed = 0;
  for_marked(marked, own.clusters() / 32 + 1, [&](int32_t c) {
    const ClusterMembers cluster(tables, own, members, c);
    for (int32_t at = 16 * warp; at < cluster.size; at += 16 * kWarps) {
      const int32_t row = cluster.row(at + (lane & 15));
      changed |= row_changed<kDType, kDim>(checks, row, k, v,
                                           {row_offset(batch.k, pages, row), row_offset(batch.v, pages, row), 0});
    }
  });
  return changed != 0;
}

}  // namespace tactic::cuda
