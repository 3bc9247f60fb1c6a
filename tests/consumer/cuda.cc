// One decode step over 16384 random rows of one sequence on a CUDA device, sparse against dense.
#include "tactic/cuda.h"

#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "tactic/error.h"

namespace {

constexpr int kRows = 16384, kDim = 128, kHeads = 2, kQHeads = 8;

template <class T>
T* on_device(const std::vector<T>& values) {
  void* data = nullptr;
  cudaMalloc(&data, values.size() * sizeof(T));
  cudaMemcpy(data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice);
  return static_cast<T*>(data);
}

std::vector<float> decode(tactic::Select select, tactic::cuda::DecodeBatch batch, const tactic::cuda::LayerIndex& index,
                          int* rows_read) {
  const tactic::cuda::DecodeLimits limits{1, kQHeads, kHeads, kDim, kRows, index.options()};
  tactic::cuda::Decode step({.select = select, .target_error = 0.02f}, limits);
  std::vector<float> out(kQHeads * kDim);
  std::vector<tactic::cuda::StepRecord> records(kHeads);
  tactic::cuda::StepRecord* device_records = on_device(records);
  batch.out = on_device(out);
  step.run(batch, select == tactic::Select::kDense ? nullptr : &index, nullptr, device_records);
  cudaMemcpy(out.data(), batch.out, out.size() * sizeof(float), cudaMemcpyDeviceToHost);
  cudaMemcpy(records.data(), device_records, kHeads * sizeof(records[0]), cudaMemcpyDeviceToHost);
  *rows_read = records[0].tokens_exact + records[0].tokens_selected + records[0].tokens_refined;
  return out;
}

}  // namespace

int main() try {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<_Float16> k(kHeads * kRows * kDim), v(k.size());
  std::vector<float> q(kQHeads * kDim);
  for (_Float16& x : k) x = static_cast<_Float16>(normal(random));
  for (_Float16& x : v) x = static_cast<_Float16>(normal(random));
  for (float& x : q) x = normal(random);
  tactic::cuda::LayerIndex index({}, {.num_kv_heads = kHeads, .head_dim = kDim, .v_head_dim = kDim}, 1, kRows);
  tactic::cuda::DecodeBatch batch;
  batch.num_sequences = 1;
  batch.num_q_heads = kQHeads;
  batch.num_kv_heads = kHeads;
  batch.head_dim = kDim;
  batch.sm_scale = 0.088f;
  batch.k = {on_device(k), tactic::DType::kF16, kHeads * kRows * kDim * 2, kRows * kDim * 2, kDim * 2};
  batch.v = batch.k;
  batch.v.data = on_device(v);
  batch.kv_lens = on_device(std::vector<int32_t>{kRows});
  batch.q = on_device(q);
  batch.q_dtype = tactic::DType::kF32;
  index.build(0, batch, kRows, nullptr);
  int sparse_rows = 0, dense_rows = 0;
  const std::vector<float> sparse = decode(tactic::Select::kSample, batch, index, &sparse_rows);
  const std::vector<float> exact = decode(tactic::Select::kDense, batch, index, &dense_rows);
  double error = 0;  // values have variance 1, so this is in units of a value
  for (size_t i = 0; i < sparse.size(); ++i) error += (sparse[i] - exact[i]) * (sparse[i] - exact[i]);
  error = std::sqrt(error / static_cast<double>(sparse.size()));
  std::printf("rows read %d of %d, error %.4f\n", sparse_rows, dense_rows, error);
  return sparse_rows < dense_rows && dense_rows == kRows && error < 0.05 ? 0 : 1;
} catch (const tactic::Error& e) {
  std::printf("%s\n", e.what());
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0 ? 1
                                                                    : 0;  // without a device that is as it should be
}
