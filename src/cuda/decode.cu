// One sparse decode step in one kernel.
#include "cuda/decode_block.cuh"
#include "cuda/launch.h"

namespace tactic::cuda {

namespace {

template <DType kDType, int kDim, int kHeads, bool kChecked>
__global__ void __launch_bounds__(kThreads, 1) decode_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(16) std::byte shared[];
  DecodeBlock<kDType, kDim, kHeads, kChecked>(params, shared).run();
}

template <DType kDType, int kDim, int kHeads>
void launch(const DecodeParams& params, const DeviceFacts& device, cudaStream_t stream) {
  const auto kernel =
      params.check_rows ? decode_kernel<kDType, kDim, kHeads, true> : decode_kernel<kDType, kDim, kHeads, false>;
  static_assert(sizeof(MergeBuffers<kHeads>) + sizeof(QuantizedQueries<kDim, kHeads>) ==
                merge_bytes(kHeads) + quantized_bytes(kDim, kHeads));
  launch_step(kernel, params, params.shared_bytes, params.splits, device, stream, "decode");
}

}  // namespace

void launch_decode(const DecodeParams& params, const DeviceFacts& device, cudaStream_t stream) {
  dispatch(params.batch,
           [&]<DType kDType, int kDim, int kHeads>() { launch<kDType, kDim, kHeads>(params, device, stream); });
}

}  // namespace tactic::cuda
