// Launchers of the kernels, and what host code must know of them.
#pragma once

#include <cuda_runtime.h>

#include "cuda/launch_config.h"

namespace tactic::cuda {

/// Throws Error naming the call when it failed.
void check(cudaError_t status, const char* what);

/// Fills in clusters_of.
void count_clusters(DeviceFacts& facts);

void launch_decode(const DecodeParams& params, const DeviceFacts& device, cudaStream_t stream);
/// Of rows of one type (decode_of_type.cu).
template <DType kDType>
void launch_decode(const DecodeParams& params, const DeviceFacts& device, cudaStream_t stream);
void launch_dense(const DenseParams& params, const DeviceFacts& device, cudaStream_t stream);

/// Rows of a sequence from `row` on are no longer heavy, nor suspects.
void launch_forget_heavy(const IndexView& index, int32_t sequence, int32_t row, cudaStream_t stream);

/// Ranks the clusters of each query head, then (of fit) finds how much of that order is read, then lists the rows that
/// the heads of a pair read.
void launch_rank(const RankParams& params, const DeviceFacts& device, cudaStream_t stream);
void launch_fit(const RankParams& params, const DeviceFacts& device, cudaStream_t stream);
void launch_list(const RankParams& params, const DeviceFacts& device, cudaStream_t stream);

/// Launches kernel(params), allowed to begin before the kernel in front of it has ended.
template <class Kernel, class Params>
void launch_dependent(Kernel kernel, const Params& params, dim3 grid, int threads, const DeviceFacts& device,
                      cudaStream_t stream, const char* what) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = {static_cast<unsigned>(threads), 1, 1};
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = device.has_clusters ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, params), what);
}

/// Launches kernel(params): params.splits blocks for each (sequence, KV head), in clusters of `cluster_blocks`, allowed
/// to begin before the kernel in front of it has ended.
template <class Kernel, class Params>
void launch_step(Kernel kernel, const Params& params, size_t shared_bytes, int32_t cluster_blocks,
                 const DeviceFacts& device, cudaStream_t stream, const char* what) {
  // The most there is, not shared_bytes: the setting is the kernel's, whichever thread launches it.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(device.shared_bytes_per_block)),
        what);
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster_blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = {static_cast<unsigned>(params.batch.num_sequences * params.batch.num_kv_heads * params.splits), 1,
                    1};
  config.blockDim = {kThreads, 1, 1};
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = device.has_clusters ? 2 : 0;
  check(cudaLaunchKernelEx(&config, kernel, params), what);
}

/// Clusters segments of one sequence, for every head.
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
  float* scratch = nullptr;  // [heads, num_segments, scratch_floats]
  size_t scratch_floats = 0;
};
/// Shared memory that a block of it needs at least.
size_t cluster_shared_bytes(int32_t head_dim);
size_t cluster_scratch_bytes(int32_t rows, int32_t clusters, int32_t head_dim);
void launch_cluster(const ClusterParams& params, const DeviceFacts& device, cudaStream_t stream);

/// Compares rows [first_row, end_row) of a sequence with their check values, for every head.
struct VerifyParams {
  IndexView index;
  DecodeBatch batch;
  int32_t sequence = 0;
  int32_t first_row = 0, end_row = 0;
  int32_t* first_changed = nullptr;  // becomes the least row that differs, if that is less
};
void launch_verify(const VerifyParams& params, cudaStream_t stream);

/// Calls fn.operator()<dtype>() for the batch's, which is_compiled().
template <class Fn>
void dispatch_type(const DecodeBatch& batch, Fn fn) {
  switch (batch.k.dtype) {
    case DType::kBF16: return fn.template operator()<DType::kBF16>();
    case DType::kF16: return fn.template operator()<DType::kF16>();
    case DType::kF8E4M3: return fn.template operator()<DType::kF8E4M3>();
#ifndef TACTIC_CUDA_FEW
    case DType::kQ8_0: return fn.template operator()<DType::kQ8_0>();
    case DType::kQ4_0: return fn.template operator()<DType::kQ4_0>();
#endif
    default: break;
  }
}

/// Calls fn.operator()<head_dim>() likewise.
template <class Fn>
void dispatch_dim(const DecodeBatch& batch, Fn fn) {
  switch (batch.head_dim) {
    case 64: return fn.template operator()<64>();
    case 128: return fn.template operator()<128>();
#ifndef TACTIC_CUDA_FEW
    case 80: return fn.template operator()<80>();
    case 96: return fn.template operator()<96>();
    case 256: return fn.template operator()<256>();
#endif
    default: break;
  }
}

/// Calls fn.operator()<head_dim, heads>() likewise.
template <class Fn>
void dispatch_shape(const DecodeBatch& batch, Fn fn) {
  const bool few = batch.num_q_heads / batch.num_kv_heads <= 4;
  dispatch_dim(batch, [&]<int kDim>() { few ? fn.template operator()<kDim, 4>() : fn.template operator()<kDim, 8>(); });
}

/// Calls fn.operator()<dtype, head_dim, heads>() likewise.
template <class Fn>
void dispatch(const DecodeBatch& batch, Fn fn) {
  dispatch_type(batch, [&]<DType kDType>() {
    dispatch_shape(batch, [&]<int kDim, int kHeads>() { fn.template operator()<kDType, kDim, kHeads>(); });
  });
}

}  // namespace tactic::cuda
