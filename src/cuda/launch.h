// Launchers of the kernels, and what host code must know of them.
#pragma once

#include <cuda_runtime.h>

#include "cuda/params.h"

namespace tactic::cuda {

/// Throws Error naming the call when it failed.
void check(cudaError_t status, const char* what);
/// Whether the current device has thread-block clusters.
bool has_clusters();

void launch_decode(const DecodeParams& params, cudaStream_t stream);
void launch_dense(const DenseParams& params, cudaStream_t stream);

/// Clusters segment `slot_rows` of one sequence: `rows` rows from first_row on, for every head. See cluster.cu.
struct ClusterParams {
  IndexView index;
  DecodeBatch batch;
  int32_t sequence = 0;
  int32_t first_segment = 0, num_segments = 0;  // of the kind
  bool provisional = false;
  int32_t full_segments = 0;  // of the sequence, for where provisional ones begin
  int32_t num_clusters = 0;   // per segment, before padding
  int32_t iterations = 0, num_outliers = 0;
  uint64_t seed = 0;
  float* scratch = nullptr;  // cluster_scratch_bytes() per segment and head
};
size_t cluster_scratch_bytes(int32_t rows, int32_t clusters, int32_t head_dim);
void launch_cluster(const ClusterParams& params, cudaStream_t stream);

/// Calls fn.operator()<dtype, head_dim, heads>() for the batch's.
template <class Fn>
void dispatch(const DecodeBatch& batch, Fn fn) {
  const bool few = batch.num_q_heads / batch.num_kv_heads <= 4;
  const auto by_heads = [&]<DType kDType, int kDim>() {
    few ? fn.template operator()<kDType, kDim, 4>() : fn.template operator()<kDType, kDim, 8>();
  };
  const auto by_dim = [&]<DType kDType>() {
    switch (batch.head_dim) {
      case 64: return by_heads.template operator()<kDType, 64>();
      case 128: return by_heads.template operator()<kDType, 128>();
#ifndef TACTIC_CUDA_FEW
      case 80: return by_heads.template operator()<kDType, 80>();
      case 96: return by_heads.template operator()<kDType, 96>();
      case 256: return by_heads.template operator()<kDType, 256>();
#endif
      default: break;
    }
  };
  switch (batch.k.dtype) {
    case DType::kBF16: return by_dim.template operator()<DType::kBF16>();
    case DType::kF16: return by_dim.template operator()<DType::kF16>();
#ifndef TACTIC_CUDA_FEW
    case DType::kQ8_0: return by_dim.template operator()<DType::kQ8_0>();
    case DType::kQ4_0: return by_dim.template operator()<DType::kQ4_0>();
#endif
    default: break;
  }
}

}  // namespace tactic::cuda
