// One sparse decode step in one kernel.
#include "cuda/decode_block.cuh"
#include "cuda/launch.h"

namespace tactic::cuda {

namespace {

template <DType kDType, int kDim, int kHeads, StepKind kKind>
__global__ void __launch_bounds__(kThreads, 1) decode_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(16) std::byte shared[];
  DecodeBlock<kDType, kDim, kHeads, kKind>(params, shared).run();
}

__global__ void __launch_bounds__(kThreads, 1) empty_kernel() {}

template <DType kDType, int kDim, int kHeads>
void launch(const DecodeParams& params, const DeviceFacts& device, cudaStream_t stream) {
  const auto kernel = params.facts != nullptr ? decode_kernel<kDType, kDim, kHeads, StepKind::kLearning>
                      : params.check_rows     ? decode_kernel<kDType, kDim, kHeads, StepKind::kChecked>
                                              : decode_kernel<kDType, kDim, kHeads, StepKind::kPlain>;
  static_assert(sizeof(MergeBuffers<kHeads>) + sizeof(QuantizedQueries<kDim, kHeads>) ==
                merge_bytes(kHeads) + quantized_bytes(kDim, kHeads));
  launch_step(kernel, params, params.shared_bytes, params.splits, device, stream, "decode");
}

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
  dispatch(params.batch,
           [&]<DType kDType, int kDim, int kHeads>() { launch<kDType, kDim, kHeads>(params, device, stream); });
}

}  // namespace tactic::cuda
