// Rows that masks show, for hosts that know them as masks only.
#include <cub/block/block_scan.cuh>
#include <string>

#include "cuda/launch.h"
#include "tactic/error.h"

namespace tactic::cuda {

namespace {

constexpr int kMaskThreads = 1024;

struct MaskParams {
  const unsigned char* masks;
  int64_t stride;
  int32_t n_kv;
  VisibleRows* rows;
  int32_t* tables;
};

__device__ uint32_t hash_of(int32_t cell) {
  uint32_t h = static_cast<uint32_t>(cell) * 0x9E3779B1u + 0x7F4A7C15u;
  h = (h ^ h >> 15) * 0x85EBCA77u;
  return h ^ h >> 13;
}

// fn(cell, value) for cells [8 * begin, 8 * end).
template <class Fn>
__device__ void for_cells(const uint4* mask, int32_t begin, int32_t end, Fn fn) {
  for (int32_t i = begin; i < end; ++i) {
    const uint4 eight = __ldg(mask + i);
    const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int j = 0; j < 8; ++j) fn(i * 8 + j, words[j / 2] >> (j % 2 * 16) & 0xFFFFu);
  }
}

__global__ void __launch_bounds__(kMaskThreads) visible_rows_kernel(const MaskParams p) {
  using Scan = cub::BlockScan<int32_t, kMaskThreads>;
  __shared__ typename Scan::TempStorage scan;
  __shared__ int32_t end, other;  // of the visible cells; whether a value says neither
  __shared__ uint32_t hash;
  if (threadIdx.x == 0) end = other = 0, hash = 0;
  __syncthreads();
  const auto* mask = reinterpret_cast<const uint4*>(p.masks + blockIdx.x * p.stride);
  const int32_t eights = p.n_kv / 8, each = (eights + kMaskThreads - 1) / kMaskThreads;
  const int32_t my_begin = min(static_cast<int32_t>(threadIdx.x) * each, eights), my_end = min(my_begin + each, eights);
  int32_t count = 0, last = -1;
  bool neither = false;
  uint32_t my_hash = 0;
  for_cells(mask, my_begin, my_end, [&](int32_t cell, uint32_t value) {
    if (value == 0xFC00u) return;
    ++count;
    last = cell;
    my_hash += hash_of(cell);
    neither = neither || (value & 0x7FFFu) != 0;
  });
  if (last >= 0) atomicMax(&end, last + 1);
  if (neither) other = 1;
  atomicAdd(&hash, my_hash);
  int32_t before, total;
  Scan(scan).ExclusiveSum(count, before, total);
  __syncthreads();
  if (threadIdx.x == 0)
    p.rows[blockIdx.x] = {other != 0 ? -1 : total, end, hash, hash - (total > 0 ? hash_of(end - 1) : 0)};
  if (p.tables == nullptr || total == end) return;
  int32_t* table = p.tables + int64_t{blockIdx.x} * p.n_kv + before;
  for_cells(mask, my_begin, my_end, [&](int32_t cell, uint32_t value) {
    if (value != 0xFC00u) *table++ = cell;
  });
}

}  // namespace

void visible_rows(const void* masks, int64_t stride_bytes, int32_t n_kv, int32_t count, VisibleRows* rows,
                  int32_t* tables, Stream stream) {
  if (n_kv < 0 || n_kv % 8 != 0) throw Error("n_kv (" + std::to_string(n_kv) + ") must be a multiple of 8");
  if (stride_bytes % 16 != 0 || reinterpret_cast<uintptr_t>(masks) % 16 != 0)
    throw Error("masks must lie at multiples of 16 bytes, not " + std::to_string(stride_bytes) + " apart");
  if (count <= 0) return;
  visible_rows_kernel<<<static_cast<unsigned>(count), kMaskThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      {static_cast<const unsigned char*>(masks), stride_bytes, n_kv, rows, tables});
  check(cudaGetLastError(), "masks");
}

}  // namespace tactic::cuda
