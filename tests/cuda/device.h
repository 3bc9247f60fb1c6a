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

/// Scales of KV heads for rows stored as f8_e4m3. Their products with such numbers are numbers of f16.
struct F8Scales {
  std::vector<float> k, v;  // [num_kv_heads]
};
/// Every row of an f16 cache becomes one that f8_e4m3 with these scales can hold.
void round_to_f8(Cache& cache, const F8Scales& scales);

/// The rows of several problems (one sequence each, of one shape) in device memory, and room for their answers.
class DeviceBatch {
 public:
  /// `f8`: the caches are round_to_f8(), and the device has them so.
  DeviceBatch(const std::vector<Problem*>& problems, DeviceLayout layout, const F8Scales* f8 = nullptr);

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
  std::vector<Device<float>> scales_;
  Device<int32_t> lens_;
  Device<float> q_, out_, lse_;
};

constexpr DType kTypes[] = {DType::kF16, DType::kBF16, DType::kQ8_0, DType::kQ4_0};
constexpr int32_t kDims[] = {64, 80, 96, 128, 256};
constexpr DeviceLayout kLayouts[] = {DeviceLayout::kTokenMajor, DeviceLayout::kHeadMajor, DeviceLayout::kPages1,
                                     DeviceLayout::kPages16, DeviceLayout::kPages64};

/// Weights and queries are rounded to the type that the tensor cores multiply: 2^-11 or 2^-8.
double tolerance(DType dtype);

CacheSpec spec_of(DType dtype, int32_t dim, int64_t kv_len, int32_t heads = 2);

/// Queries as bf16 holds them, so that no backend rounds them.
void round_queries(Problem& problem);

/// `noise`: what rounding ties may do, which make a step draw another row than the reference does.
void expect_near(const Problem& expected, const std::vector<float>& out, const std::vector<float>& lse, DType dtype,
                 double noise = 0);

/// What the device reports of a step, from the rows that the reference read: the mass of the certain ones within the
/// output, and the variance of the total under independent draws, means over the query heads. (The reference's own
/// figures are the measured ones.)
struct ReadMass {
  double certain = 0, variance = 0;
};
ReadMass read_mass(const Problem& problem, const Selection& selection);

}  // namespace tactic::test
