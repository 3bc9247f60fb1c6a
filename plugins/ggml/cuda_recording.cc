#include "cuda_recording.h"

#include <cstdlib>
#include <utility>

#include "cuda_memory.h"

namespace tactic::plugin {

CudaRecording::~CudaRecording() {
  if (executable_ != nullptr) cudaGraphExecDestroy(executable_);
}

GpuAttention::Way CudaRecording::way(const Key& key, bool may_wait) {
  const bool again = key == std::exchange(last_, key);
  if (key.graph == 0 || may_wait || std::getenv("GGML_CUDA_DISABLE_GRAPHS") != nullptr) return GpuAttention::Way::kCut;
  if (executable_ != nullptr && key == recorded_) return GpuAttention::Way::kReplay;
  return again && key != refused_ ? GpuAttention::Way::kRecord : GpuAttention::Way::kCut;
}

void CudaRecording::begin(cudaStream_t stream) {
  const cudaError_t status = cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed);
  if (status != cudaSuccess) refused_ = last_;
  check(status, "recording");
}

bool CudaRecording::end(cudaStream_t stream, bool whole) {
  cudaGraph_t graph = nullptr;
  whole = cudaStreamEndCapture(stream, &graph) == cudaSuccess && whole;
  cudaGraphExecUpdateResultInfo result;
  if (whole && (executable_ == nullptr || cudaGraphExecUpdate(executable_, graph, &result) != cudaSuccess)) {
    if (executable_ != nullptr) cudaGraphExecDestroy(executable_);
    whole = cudaGraphInstantiate(&executable_, graph, 0) == cudaSuccess;
    if (!whole) executable_ = nullptr;
  }
  if (graph != nullptr) cudaGraphDestroy(graph);
  cudaGetLastError();
  recorded_ = whole ? last_ : Key{};
  if (!whole) refused_ = last_;
  return whole;
}

void CudaRecording::launch(cudaStream_t stream) { check(cudaGraphLaunch(executable_, stream), "replay"); }

}  // namespace tactic::plugin
