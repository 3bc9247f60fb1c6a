// One sparse decode step in one kernel, for rows of the type TACTIC_DECODE_TYPE: an object of its own for each, so that
// they compile at the same time.
#include "cuda/decode_block.cuh"
#include "cuda/launch.h"

namespace tactic::cuda {

namespace {

template <DType kDType, int kDim, int kHeads, StepKind kKind>
__global__ void __launch_bounds__(kThreads, 1) decode_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(16) std::byte shared[];
  DecodeBlock<kDType, kDim, kHeads, kKind>(params, shared).run();
}

template <DType kDType, int kDim, int kHeads>
void launch(const DecodeParams& params, const DeviceFacts& device, cudaStream_t stream) {
  const bool names_rows = params.batch.learn || params.batch.likely_rows != nullptr;
  const auto kernel = params.target_mass > 0 ? decode_kernel<kDType, kDim, kHeads, StepKind::kVerified>
                      : names_rows           ? decode_kernel<kDType, kDim, kHeads, StepKind::kLearning>
                      : params.check_rows    ? decode_kernel<kDType, kDim, kHeads, StepKind::kChecked>
                                             : decode_kernel<kDType, kDim, kHeads, StepKind::kPlain>;
  static_assert(sizeof(MergeBuffers<kHeads>) + sizeof(QuantizedQueries<kDim, kHeads>) ==
                merge_bytes(kHeads) + quantized_bytes(kDim, kHeads));
  launch_step(kernel, params, params.shared_bytes, params.splits, device, stream, "decode");
}

}  // namespace

template <DType kDType>
void launch_decode(const DecodeParams& params, const DeviceFacts& device, cudaStream_t stream) {
  dispatch_shape(params.batch, [&]<int kDim, int kHeads>() { launch<kDType, kDim, kHeads>(params, device, stream); });
}
template void launch_decode<DType::TACTIC_DECODE_TYPE>(const DecodeParams&, const DeviceFacts&, cudaStream_t);

}  // namespace tactic::cuda
