// What a sparse step says of itself: the logarithms of its sums, and its record.
#pragma once

#include "cuda/merge.cuh"
#include "cuda/segments.h"

namespace tactic::cuda {

/// One warp of one block of the cluster, after all have sent their sums. pair: (sequence, KV head). changed: every row
/// was read, because one was not what the index knows.
template <int kHeads>
__device__ __forceinline__ void report(const DecodeParams& p, const MergeBuffers<kHeads>& buffers, int sequence,
                                       int64_t pair, int kv_len, int32_t exact_rows, float tau, bool changed) {
  const int lane = threadIdx.x & 31, group = p.batch.num_q_heads / p.batch.num_kv_heads;
  const BlockSums sums = cluster_sums<kHeads>(buffers, p.splits, lane % kHeads, [](int, float) {});
  if (p.batch.lse != nullptr && lane < group)
    p.batch.lse[pair * group + lane] = kv_len > 0 ? (sums.max + log2f(sums.sum)) * kLn2 : -INFINITY;
  if (p.records == nullptr) return;
  float mass = lane < group ? 1 - sums.sampled / sums.sum : 0,
        variance = lane < group ? sums.variance / (sums.sum * sums.sum) : 0;
#pragma unroll
  for (int step = 1; step < 8; step *= 2) {
    mass += shuffle_xor(mass, step);
    variance += shuffle_xor(variance, step);
  }
  if (lane != 0) return;
  int32_t counts[kCounts] = {};
  for (int s = 0; s < p.splits; ++s) {
    for (int i = 0; i < kCounts; ++i) counts[i] += buffers.block_counts[s][i];
  }
  const SequenceState state = p.index.states[sequence];
  StepRecord record{};
  record.kv_len = kv_len;
  record.segments = state.full_segments + state.provisional_segments;
  record.clusters = state.full_segments * p.index.geometry.full_clusters +
                    state.provisional_segments * p.index.geometry.provisional_clusters;
  record.tau = tau;
  record.beta = buffers.beta;
  record.dense = changed ? DenseReason::kRowChanged : DenseReason::kNone;
  record.tokens_exact = changed ? kv_len : counts[kForCertain] + exact_rows;
  record.certain_mass = changed ? 1 : mass / group;
  if (!changed) {
    record.tokens_selected = counts[kSelected] - counts[kLeftOut];
    record.tokens_sampled = counts[kSampled];
    record.clusters_refined = counts[kRefinedClusters];
    record.tokens_refined = counts[kRefinedRows];
    record.mass_variance = variance / group;
  }
  p.records[pair] = record;
}

}  // namespace tactic::cuda
