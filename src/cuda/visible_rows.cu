// Rows that masks show, for hosts that know them as masks only.
#include <string>

#include "cuda/launch.h"
#include "tactic/error.h"

namespace tactic::cuda {

namespace {

constexpr int kMaskThreads = 1024;

__global__ void __launch_bounds__(kMaskThreads)
    visible_rows_kernel(const unsigned char* masks, int64_t stride, int32_t n_kv, int32_t* kv_lens) {
  __shared__ int32_t end, first_hidden;  // of the visible rows; of the others
  __shared__ int32_t other;              // values that say neither
  if (threadIdx.x == 0) end = 0, first_hidden = n_kv, other = 0;
  __syncthreads();
  const auto* mask = reinterpret_cast<const uint4*>(masks + blockIdx.x * stride);
  int32_t my_end = 0, my_hidden = n_kv, my_other = 0;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < n_kv / 8; i += kMaskThreads) {
    const uint4 eight = __ldg(mask + i);
    const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t value = words[j / 2] >> (j % 2 * 16) & 0xFFFFu;
      const int32_t row = i * 8 + j;
      if (value == 0xFC00u) {
        my_hidden = min(my_hidden, row);
      } else {
        my_end = row + 1;
        my_other |= (value & 0x7FFFu) != 0;
      }
    }
  }
  atomicMax(&end, my_end);
  atomicMin(&first_hidden, my_hidden);
  if (my_other != 0) other = 1;
  __syncthreads();
  if (threadIdx.x == 0) kv_lens[blockIdx.x] = other == 0 && first_hidden >= end ? end : -1;
}

}  // namespace

void visible_rows(const void* masks, int64_t stride_bytes, int32_t n_kv, int32_t count, int32_t* kv_lens,
                  Stream stream) {
  if (n_kv < 0 || n_kv % 8 != 0) throw Error("n_kv (" + std::to_string(n_kv) + ") must be a multiple of 8");
  if (stride_bytes % 16 != 0 || reinterpret_cast<uintptr_t>(masks) % 16 != 0)
    throw Error("masks must lie at multiples of 16 bytes, not " + std::to_string(stride_bytes) + " apart");
  if (count <= 0) return;
  visible_rows_kernel<<<static_cast<unsigned>(count), kMaskThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const unsigned char*>(masks), stride_bytes, n_kv, kv_lens);
  check(cudaGetLastError(), "masks");
}

}  // namespace tactic::cuda
