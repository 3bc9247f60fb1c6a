// merge: softmax states and partial outputs of warps and of a cluster's blocks become one answer.
#pragma once

#include <cstring>

#include "cuda/attend.cuh"
#include "cuda/launch_config.h"
#include "cuda/score.cuh"

namespace tactic::cuda {

/// What the blocks of a thread-block cluster send one another: each block's mailbox opens when all that it expects has
/// come. One block alone on devices without clusters.
struct Mailbox {
  /// One thread; then all threads arrive(), and wait() before they send to any.
  static __device__ __forceinline__ void open(uint64_t* box, uint32_t bytes) {
#ifdef TACTIC_HOPPER
    TransferBarrier::init(box);
    TransferBarrier::publish();
    TransferBarrier::expect(box, bytes);
#endif
  }
  /// One thread, after it was emptied and before another synchronize().
  static __device__ __forceinline__ void open_again(uint64_t* box, uint32_t bytes) {
#ifdef TACTIC_HOPPER
    TransferBarrier::expect(box, bytes);
#endif
  }
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
  static __device__ __forceinline__ void synchronize() {
    arrive();
    wait();
    __syncthreads();
  }
  /// To the same address of block `rank`; T has 4, 8 or 16 bytes.
  template <class T>
  static __device__ __forceinline__ void send(T* to, const T& value, int rank, uint64_t* box) {
#ifdef TACTIC_HOPPER
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    uint32_t words[sizeof(T) / 4], there, box_there;
    memcpy(words, &value, sizeof(T));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(to)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(box_there) : "r"(shared_address(box)), "r"(rank));
    if constexpr (sizeof(T) == 4) {
      asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(there),
                   "r"(words[0]), "r"(box_there)
                   : "memory");
    } else if constexpr (sizeof(T) == 8) {
      asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(there),
                   "r"(words[0]), "r"(words[1]), "r"(box_there)
                   : "memory");
    } else {
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(there),
          "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(box_there)
          : "memory");
    }
#else
    *to = value;
#endif
  }
  /// All threads of all blocks: what they have written to their own shared memory can be read() by the others then.
  static __device__ __forceinline__ void publish() {
#ifdef TACTIC_HOPPER
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
  }
  /// What block `rank` has at the same address; T has 4 bytes or a multiple of 16.
  template <class T>
  static __device__ __forceinline__ T read(const T* from, int rank) {
#ifdef TACTIC_HOPPER
    uint32_t there, words[sizeof(T) / 4];
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(from)), "r"(rank));
    static_assert(sizeof(T) == 4 || sizeof(T) % 16 == 0);
    if constexpr (sizeof(T) == 4) {
      asm volatile("ld.shared::cluster.b32 %0, [%1];" : "=r"(words[0]) : "r"(there) : "memory");
    } else {
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(T) / 4); i += 4)
        asm volatile("ld.shared::cluster.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[i]), "=r"(words[i + 1]), "=r"(words[i + 2]), "=r"(words[i + 3])
                     : "r"(there + 4 * i)
                     : "memory");
    }
    T value;
    memcpy(&value, words, sizeof(T));
    return value;
#else
    return *from;
#endif
  }
  /// All threads; parity: of the number of times that it was emptied before.
  static __device__ __forceinline__ void receive(uint64_t* box, uint32_t parity) {
#ifdef TACTIC_HOPPER
    TransferBarrier::wait(box, parity);
#else
    __syncthreads();
#endif
  }
};

/// Sums of a block over all it read, relative to its maximum.
struct BlockSums {
  float max, sum, sampled, variance;
};

enum Count { kForCertain, kSelected, kLeftOut, kSampled, kRefinedClusters, kRefinedRows, kCounts = 8 };

template <int kHeads>
struct alignas(16) MergeBuffers {
  float2 warp_states[kWarps][kHeads];       // max and sum
  float2 block_states[kMaxSplits][kHeads];  // written by the cluster's blocks
  float2 sinks[kHeads];                     // written by the cluster's first block (sinks.cuh)
  int32_t maxima[kHeads];                   // of the block, as ordered()
  BlockSums warp_sums[kWarps][kHeads];
  BlockSums block_sums[kMaxSplits][kHeads];
  int32_t counts[kCounts];  // of the block
  int32_t block_counts[kMaxSplits][kCounts];
  int32_t found_changed;        // by the block: a row that is not the one that was clustered
  int32_t changed[kMaxSplits];  // by the cluster's blocks
  float beta, variance_ratio;   // of the head, read with the queries
  float tau_factor;             // of the sequence
  uint64_t mailboxes[2];        // of states and of outputs
  uint64_t staged[kWarps][kMaxStages];
};

template <int kHeads>
__device__ __forceinline__ bool any_changed(const MergeBuffers<kHeads>& buffers, int splits) {
  int32_t any = 0;
  for (int s = 0; s < splits; ++s) any |= buffers.changed[s];
  return any != 0;
}

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
    Mailbox::send(&buffers.block_states[rank][lane % kHeads], float2{total.max, total.sum}, other,
                  &buffers.mailboxes[0]);
  }
}
/// What a block gets of these, and of the sinks.
template <int kHeads>
__device__ __forceinline__ uint32_t state_bytes(int splits) {
  return (splits + 1) * kHeads * sizeof(float2);
}

/// The cluster's sums of head h, relative to its maximum. each(s, factor): what block s's sums and outputs are
/// multiplied by.
template <int kHeads, class Each>
__device__ __forceinline__ BlockSums cluster_sums(const MergeBuffers<kHeads>& buffers, int splits, int h, Each each) {
  BlockSums total{kLowest, 0, 0, 0};
  for (int s = 0; s < splits; ++s) total.max = fmaxf(total.max, buffers.block_sums[s][h].max);
  for (int s = 0; s < splits; ++s) {
    const BlockSums block = buffers.block_sums[s][h];
    const float factor = exp2_fast(block.max - total.max);
    total.sum += factor * block.sum;
    total.sampled += factor * block.sampled;
    total.variance += factor * factor * block.variance;
    each(s, factor);
  }
  // Refinement takes back in one warp what another added: what is left is rounded, and may be below nothing.
  total.sampled = fmaxf(total.sampled, 0.0f);
  total.variance = fmaxf(total.variance, 0.0f);
  return total;
}

/// Maximum and sum of what a warp attended to, by head.
template <int kDim, int kHeads>
__device__ __forceinline__ void store_state(const AttendState<kDim>& state, float2* heads) {
  const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
  float sum = state.sum;
  sum += shuffle_xor(sum, 1);
  sum += shuffle_xor(sum, 2);
  if (t == 0 && g < kHeads) heads[g] = {state.max, sum};
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

/// How the blocks of a cluster share out their output: each gets a slice of it from all and writes that.
/// kChecked: they also say whether they found a changed row; counted: and what they read; draw_bytes: and what their
/// draw measured (send_draw).
template <int kDim, int kHeads, bool kChecked>
struct OutputSlices {
  int group, rank, splits;
  bool counted;
  uint32_t draw_bytes;

  /// An even number of outputs, as they are summed in pairs.
  __device__ int size() const { return ((group * kDim + splits - 1) / splits + 1) & ~1; }
  /// What the cluster's blocks send this one.
  __device__ uint32_t bytes() const {
    const int floats = min(max(group * kDim - rank * size(), 0), size());
    return splits * (floats * sizeof(float) + kHeads * sizeof(BlockSums) + (kChecked ? sizeof(int32_t) : 0) +
                     (rank == 0 ? draw_bytes + (counted ? kCounts * sizeof(int32_t) : 0) : 0));
  }
  /// After a block barrier behind store_warp. `from_blocks`: [splits, size()] of whom it is sent to.
  __device__ void send(MergeBuffers<kHeads>& buffers, const float* values, float* from_blocks) const {
    constexpr int kStride = value_stride(kDim);
    const int slice = size();
    uint64_t* box = &buffers.mailboxes[1];
    for (int i = 2 * threadIdx.x; i < group * kDim; i += 2 * kThreads) {
      float2 sum{};
      const float* from = values + i / kDim * kStride + i % kDim;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float2 x = *reinterpret_cast<const float2*>(from + w * kHeads * kStride);
        sum.x += x.x;
        sum.y += x.y;
      }
      const int to = i / slice;
      Mailbox::send(reinterpret_cast<float2*>(from_blocks + rank * slice + i - to * slice), sum, to, box);
    }
    // The last warps have no outputs to sum.
    for (int i = kThreads - 1 - threadIdx.x; i < kHeads * splits; i += kThreads) {
      const int h = i % kHeads;
      BlockSums sums{__int_as_float(ordered(buffers.maxima[h])), 0, 0, 0};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        sums.sum += buffers.warp_sums[w][h].sum;
        sums.sampled += buffers.warp_sums[w][h].sampled;
        sums.variance += buffers.warp_sums[w][h].variance;
      }
      Mailbox::send(&buffers.block_sums[rank][h], sums, i / kHeads, box);
    }
    if (kChecked && threadIdx.x < splits)
      Mailbox::send(&buffers.changed[rank], buffers.found_changed, threadIdx.x, box);
    if (counted && threadIdx.x < kCounts)
      Mailbox::send(&buffers.block_counts[rank][threadIdx.x], buffers.counts[threadIdx.x], 0, box);
  }
};

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
