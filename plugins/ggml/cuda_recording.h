// A graph's parts and our attention between them as one CUDA graph.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "gpu_hook.h"

namespace tactic::plugin {

class CudaRecording {
 public:
  /// What a recording is of: which nodes of a graph are taken again and again, and with which memory. Lengths, rows and
  /// indexes are in device memory, so that it sees new ones.
  struct Key {
    uint64_t graph = 0, setup = 0;
    std::vector<size_t> taken;
    std::vector<bool> paged;  // of each stream of each node: read through its table
    bool operator==(const Key&) const = default;
  };

  CudaRecording() = default;
  ~CudaRecording();
  CudaRecording(const CudaRecording&) = delete;
  CudaRecording& operator=(const CudaRecording&) = delete;

  /// How a graph is computed; from the second time on it is worth recording.
  GpuAttention::Way way(const Key& key, bool may_wait);

  /// What `stream`, and streams that wait for it, are given from here on is recorded, until end(). Throws Error.
  void begin(cudaStream_t stream);
  /// Returns whether launch() can compute what way() was asked about last. `whole`: all of it was given.
  bool end(cudaStream_t stream, bool whole);
  void launch(cudaStream_t stream);

 private:
  Key last_, recorded_, refused_;
  cudaGraphExec_t executable_ = nullptr;  // of `recorded_`
};

}  // namespace tactic::plugin
