// Whether the rows that a sequence's index holds are still the ones that were clustered: their check values, all of
// them.
#include "cuda/launch.h"
#include "cuda/rows.cuh"

namespace tactic::cuda {

namespace {

constexpr int kVerifyThreads = 256;

template <DType kDType, int kDim>
__global__ void __launch_bounds__(kVerifyThreads) verify_kernel(const VerifyParams p) {
  const auto row = static_cast<int32_t>(blockIdx.x * kVerifyThreads + threadIdx.x) + p.first_row;
  const auto head = static_cast<int>(blockIdx.y);
  if (row >= p.end_row) return;
  const int32_t* pages = pages_of(p.batch, p.sequence);
  constexpr int kBytes = stored_bytes<kDType>(kDim);
  const std::byte* key = rows_of(p.batch.k, pages, p.sequence, head) + row_offset(p.batch.k, pages, row);
  const std::byte* value = rows_of(p.batch.v, pages, p.sequence, head) + row_offset(p.batch.v, pages, row);
  const uint32_t found = check_row(key, kBytes, row) | check_row(value, kBytes, row) << 4;
  const int64_t pair = int64_t{p.sequence} * p.index.num_kv_heads + head;
  if (found != p.index.row_checks[pair * p.index.geometry.max_rows + row]) atomicMin(p.first_changed, row);
}

}  // namespace

void launch_verify(const VerifyParams& params, cudaStream_t stream) {
  if (params.first_row >= params.end_row) return;
  const auto blocks = static_cast<unsigned>((params.end_row - params.first_row + kVerifyThreads - 1) / kVerifyThreads);
  dispatch_type(params.batch, [&]<DType kDType>() {
    dispatch_dim(params.batch, [&]<int kDim>() {
      verify_kernel<kDType, kDim>
          <<<dim3(blocks, static_cast<unsigned>(params.batch.num_kv_heads)), kVerifyThreads, 0, stream>>>(params);
    });
  });
  check(cudaGetLastError(), "verify");
}

}  // namespace tactic::cuda
