// Launching a sparse decode step, and what that must know of the device.
#include "cuda/launch.h"

namespace tactic::cuda {

namespace {

__global__ void __launch_bounds__(kThreads, 1) empty_kernel() {}

}  // namespace

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
