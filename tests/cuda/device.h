// Device memory for tests, and a batch of sequences whose rows come from caches on the host.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "support.h"
#include "tactic/cuda.h"
#include "tactic/error.h"

namespace tactic::test {

/// Owns device memory.
template <class T>
class Device {
 public:
  explicit Device(size_t count) : count_(count) {
    if (cudaMalloc(reinterpret_cast<void**>(&data_), std::max<size_t>(count, 1) * sizeof(T)) != cudaSuccess)
      throw Error("no device memory");
    cudaMemset(data_, 0xFF, count * sizeof(T));  // NaN, where nothing is written
  }
  explicit Device(const std::vector<T>& values) : Device(values.size()) { put(values); }
  ~Device() { cudaFree(data_); }
  Device(Device&& other) noexcept : data_(std::exchange(other.data_, nullptr)), count_(other.count_) {}
  Device& operator=(Device&&) = delete;

  T* get() const { return data_; }
  void put(const std::vector<T>& values) {
    cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice);
  }
  std::vector<T> values() const {
    std::vector<T> out(count_);
    if (cudaMemcpy(out.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost) != cudaSuccess)
      throw Error(cudaGetErrorString(cudaGetLastError()));
    return out;
  }

 private:
  T* data_ = nullptr;
  size_t count_;
};

enum class DeviceLayout : uint8_t { kTokenMajor, kHeadMajor, kPages1, kPages16, kPages64 };

/// The rows of several problems (one sequence each, of one shape) in device memory, and room for their answers.
class DeviceBatch {
 public:
  DeviceBatch(const std::vector<Problem*>& problems, DeviceLayout layout);

  cuda::DecodeBatch batch;
  cuda::DecodeLimits limits;

  /// Of sequence i: [num_q_heads, head_dim] and [num_q_heads].
  std::vector<float> out(size_t i) const;
  std::vector<float> lse(size_t i) const;
  void poison_out();
  void set_lens(const std::vector<int32_t>& lens) { lens_.put(lens); }

 private:
  size_t out_size_;
  std::vector<Device<std::byte>> rows_;
  std::vector<Device<int32_t>> tables_;
  Device<int32_t> lens_;
  Device<float> q_, out_, lse_;
};

}  // namespace tactic::test
