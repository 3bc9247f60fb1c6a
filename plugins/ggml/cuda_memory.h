// Memory on a CUDA device and beside it.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "tactic/error.h"

namespace tactic::plugin {

/// Throws Error naming the call when it failed.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw Error(std::string(what) + ": " + cudaGetErrorString(status));
}

/// The same array in device memory and in host memory that copies need not wait for.
template <class T>
struct Mirror {
  T* device = nullptr;
  T* host = nullptr;

  explicit Mirror(size_t count) {
    check(cudaMalloc(reinterpret_cast<void**>(&device), count * sizeof(T)), "device memory");
    if (cudaHostAlloc(reinterpret_cast<void**>(&host), count * sizeof(T), cudaHostAllocDefault) == cudaSuccess) return;
    cudaFree(device);
    check(cudaErrorMemoryAllocation, "pinned memory");
  }
  ~Mirror() {
    cudaFree(device);
    cudaFreeHost(host);
  }
  Mirror(const Mirror&) = delete;
  Mirror& operator=(const Mirror&) = delete;
};

/// Grows, never shrinks.
struct DeviceTable {
  int32_t* data = nullptr;
  size_t count = 0;

  /// Whether the memory is another now.
  bool reserve(size_t wanted) {
    if (wanted <= count) return false;
    cudaFree(data);  // waits for what uses it
    data = nullptr;
    count = 0;
    check(cudaMalloc(reinterpret_cast<void**>(&data), wanted * sizeof(int32_t)), "table of visible cells");
    count = wanted;
    return true;
  }
  DeviceTable() = default;
  ~DeviceTable() { cudaFree(data); }
  DeviceTable(const DeviceTable&) = delete;
  DeviceTable& operator=(const DeviceTable&) = delete;
};

}  // namespace tactic::plugin
