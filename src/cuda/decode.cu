// Launching a sparse decode step, what that must know of the device, and what steps must not remember.
#include "cuda/launch.h"

namespace tactic::cuda {

namespace {

__global__ void __launch_bounds__(kThreads, 1) empty_kernel() {}

// A thread a list, which keeps its order.
__global__ void forget_heavy_kernel(HeavyRows* lists, int32_t num_lists, int32_t end) {
  const auto i = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= num_lists) return;
  HeavyRows& list = lists[i];
  const auto keep = [&](int32_t* rows, int32_t& count) {
    int32_t kept = 0;
    for (int32_t at = 0; at < count; ++at) {
      if (rows[at] < end) rows[kept++] = rows[at];
    }
    count = kept;
  };
  keep(list.rows, list.count);
  keep(list.suspects, list.num_suspects);
}

}  // namespace

void launch_forget_heavy(const IndexView& index, int32_t sequence, int32_t row, cudaStream_t stream) {
  const int32_t lists = index.num_kv_heads * kMaxSplits;
  forget_heavy_kernel<<<(lists + 63) / 64, 64, 0, stream>>>(index.heavy + int64_t{sequence} * lists, lists, row);
  check(cudaGetLastError(), "heavy rows");
}

void count_clusters(DeviceFacts& facts) {
  const char* what = "clusters of the device";
  const auto bytes = static_cast<int>(facts.shared_bytes_per_block);
  check(cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), what);
  for (int32_t blocks = 1; blocks <= kMaxSplits; ++blocks) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = {static_cast<unsigned>(blocks), 1, 1};
    config.blockDim = {kThreads, 1, 1};
    config.dynamicSmemBytes = facts.shared_bytes_per_block;
    config.attrs = &attribute;
    config.numAttrs = 1;
    check(cudaOccupancyMaxActiveClusters(&facts.clusters_of[blocks], empty_kernel, &config), what);
  }
}

void launch_decode(const DecodeParams& params, const DeviceFacts& device, cudaStream_t stream) {
  dispatch_type(params.batch, [&]<DType kDType>() { launch_decode<kDType>(params, device, stream); });
}

}  // namespace tactic::cuda
