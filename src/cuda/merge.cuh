// merge: softmax states and partial outputs of warps and of a cluster's blocks become one answer.
#pragma once

#include <cooperative_groups.h>

#include "cuda/attend.cuh"
#include "cuda/launch_config.h"
#include "cuda/score.cuh"

namespace tactic::cuda {

/// Blocks of a cluster: barrier, and the address of a variable in another block's shared memory. One block alone on
/// devices without clusters.
struct BlockCluster {
  static __device__ __forceinline__ void sync() {
#ifdef TACTIC_HOPPER
    cooperative_groups::this_cluster().sync();
#else
    __syncthreads();
#endif
  }
  /// A barrier in two halves; nothing that was written before is promised to be seen behind it.
  static __device__ __forceinline__ void arrive() {
#ifdef TACTIC_HOPPER
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
  }
  static __device__ __forceinline__ void wait() {
#ifdef TACTIC_HOPPER
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
  }
  template <class T>
  static __device__ __forceinline__ T* in_block(T* p, int rank) {
#ifdef TACTIC_HOPPER
    return cooperative_groups::this_cluster().map_shared_rank(p, rank);
#else
    return p;
#endif
  }
};

/// Sums of a block over all it read, relative to its maximum.
struct BlockSums {
  float max, sum, sampled, variance;
};

enum Count { kOutliers, kSelected, kSampled, kRefinedClusters, kRefinedRows, kCounts = 8 };

template <int kHeads>
struct alignas(16) MergeBuffers {
  float2 warp_states[kWarps][kHeads];       // max and sum
  float2 block_states[kMaxSplits][kHeads];  // written by the cluster's blocks
  int32_t maxima[kHeads];                   // of the block, as ordered()
  BlockSums warp_sums[kWarps][kHeads];
  BlockSums block_sums[kMaxSplits][kHeads];
  int32_t counts[kCounts];  // of the block
  int32_t block_counts[kMaxSplits][kCounts];
  int32_t found_changed;        // by the block: a row that is not the one that was clustered
  int32_t changed[kMaxSplits];  // by the cluster's blocks
  float beta, variance_ratio;   // of the head, read with the queries
};

/// Floats as integers of the same order, for atomicMax; its own inverse.
__device__ __forceinline__ int32_t ordered(int32_t bits) { return bits >= 0 ? bits : bits ^ 0x7FFFFFFF; }

/// Folds `n` states per head, spread over the lanes of a warp, head = lane % kHeads. Every lane gets its head's.
template <int kHeads>
__device__ __forceinline__ RunningSum fold_states(const float2 (*states)[kHeads], int n) {
  const int lane = threadIdx.x & 31;
  RunningSum total;
  for (int i = lane / kHeads; i < n; i += 32 / kHeads) {
    const float2 state = states[i][lane % kHeads];
    total.add(state.x, state.y);
  }
#pragma unroll
  for (int step = kHeads; step < 32; step *= 2) {
    const float max = shuffle_xor(total.max, step), sum = shuffle_xor(total.sum, step);
    total.add(max, sum);
  }
  return total;
}

/// After a block barrier behind the writes of warp_states: warp 0 folds them and sends them to every block.
template <int kHeads>
__device__ __forceinline__ void share_states(MergeBuffers<kHeads>& buffers, int rank, int splits) {
  if (threadIdx.x >= 32) return;
  const RunningSum total = fold_states<kHeads>(buffers.warp_states, kWarps);
  const int lane = threadIdx.x & 31;
  for (int other = lane / kHeads; other < splits; other += 32 / kHeads) {
    *BlockCluster::in_block(&buffers.block_states[rank][lane % kHeads], other) = {total.max, total.sum};
  }
}

/// The cluster's sums of head h, relative to its maximum; factors[s]: what block s's sums and outputs are multiplied
/// by.
template <int kHeads>
__device__ __forceinline__ BlockSums cluster_sums(const MergeBuffers<kHeads>& buffers, int splits, int h,
                                                  float (&factors)[kMaxSplits]) {
  BlockSums blocks[kMaxSplits], total{kLowest, 0, 0, 0};
#pragma unroll
  for (int s = 0; s < kMaxSplits; ++s) {
    if (s < splits) {
      blocks[s] = buffers.block_sums[s][h];
    } else {
      blocks[s] = {kLowest, 0, 0, 0};
    }
    total.max = fmaxf(total.max, blocks[s].max);
  }
#pragma unroll
  for (int s = 0; s < kMaxSplits; ++s) {
    factors[s] = s < splits ? exp2_fast(blocks[s].max - total.max) : 0;
    total.sum += factors[s] * blocks[s].sum;
    total.sampled += factors[s] * blocks[s].sampled;
    total.variance += factors[s] * factors[s] * blocks[s].variance;
  }
  return total;
}

/// A warp's output, rescaled to the block's maximum of each head: values [kHeads, value_stride(kDim)] in shared memory,
/// and its sums.
/// maxima: lane (g, t) has that of head g.
template <int kDim, int kHeads>
__device__ __forceinline__ void store_warp(const AttendState<kDim>& state, float maximum, float* values,
                                           BlockSums* sums) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const float factor = exp2_fast(state.max - maximum);
  float sum = state.sum * factor, sampled = state.sampled_sum * factor,
        variance = state.sampled_variance * factor * factor;
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    sum += shuffle_xor(sum, step);
    sampled += shuffle_xor(sampled, step);
    variance += shuffle_xor(variance, step);
  }
  if (t == 0 && g < kHeads) sums[g] = {maximum, sum, sampled, variance};
  const float f0 = shuffle(factor, 8 * t), f1 = shuffle(factor, 8 * t + 4);
  if (2 * t >= kHeads) return;
  const bool odd = (t & 1) != 0;  // such lanes write their halves in the other order, so that no two meet in a bank
#pragma unroll
  for (int p = 0; p < AttendState<kDim>::kParts; ++p) {
    if (kDim % 64 != 0 && 64 * p + 8 * g >= kDim) continue;
    float* to = values + 2 * t * value_stride(kDim) + 64 * p + 8 * g;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int half = odd ? 1 - i : i;
      float a[4], b[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        a[j] = odd ? state.acc[p][2 * (1 - i)][j] : state.acc[p][2 * i][j];
        b[j] = odd ? state.acc[p][2 * (1 - i) + 1][j] : state.acc[p][2 * i + 1][j];
      }
      *reinterpret_cast<float4*>(to + 4 * half) = {a[0] * f0, a[2] * f0, b[0] * f0, b[2] * f0};
      *reinterpret_cast<float4*>(to + value_stride(kDim) + 4 * half) = {a[1] * f1, a[3] * f1, b[1] * f1, b[3] * f1};
    }
  }
}

template <class Out>
__device__ __forceinline__ void store_output(void* out, int64_t i, float x) {
  if constexpr (sizeof(Out) == 4) {
    static_cast<float*>(out)[i] = x;
  } else {
    static_cast<Out*>(out)[i] = static_cast<Out>(x);
  }
}

__device__ __forceinline__ void store_output(void* out, DType dtype, int64_t i, float x) {
  switch (dtype) {
    case DType::kF32: store_output<float>(out, i, x); break;
    case DType::kBF16: store_output<__nv_bfloat16>(out, i, x); break;
    default: store_output<__half>(out, i, x); break;
  }
}

__device__ __forceinline__ float load_query(const void* q, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kF32: return static_cast<const float*>(q)[i];
    case DType::kBF16: return __bfloat162float(static_cast<const __nv_bfloat16*>(q)[i]);
    default: return __half2float(static_cast<const __half*>(q)[i]);
  }
}

}  // namespace tactic::cuda
