// What a sparse step says of itself: the logarithms of its sums, and its record.
#pragma once

#include "cuda/followers.cuh"
#include "cuda/measure.cuh"
#include "cuda/read_on.cuh"
#include "cuda/segments.h"

namespace tactic::cuda {

/// One warp of one block of the cluster, after all have sent their sums. pair: (sequence, KV head). dense: why every
/// row was read, if so. measures: where the draw measures itself (then the head's calibration learns what it usually
/// says), else nullptr; followers: what is known of heads then. verified: what a step that reads on has
/// measured itself, else nullptr.
template <int kHeads>
__device__ __forceinline__ void report(const DecodeParams& p, const MergeBuffers<kHeads>& buffers, int sequence,
                                       int64_t pair, int kv_len, int32_t exact_rows, float tau, DenseReason dense,
                                       const MeasureBuffers* measures, const FollowerBuffers& followers,
                                       const VerifiedMass* verified) {
  constexpr auto kUsualRate = static_cast<float>(DrawnVariance::kUsualRate);
  const bool all = dense != DenseReason::kNone;
  const int lane = threadIdx.x & 31, group = p.batch.num_q_heads / p.batch.num_kv_heads;
  const auto count = [&](Count what) {
    int32_t total = 0;
    for (int s = 0; s < p.splits; ++s) total += buffers.block_counts[s][what];
    return total;
  };
  const BlockSums sums = cluster_sums<kHeads>(buffers, p.splits, lane % kHeads, [](int, float) {});
  if (p.batch.lse != nullptr && lane < group)
    p.batch.lse[pair * group + lane] = kv_len > 0 ? (sums.max + log2f(sums.sum)) * kLn2 : -INFINITY;
  if (p.records == nullptr && verified == nullptr) return;  // blocks have sent no counts then
  float mass = 1, variance = 0;
  if (sums.sum > 0) {
    mass = 1 - sums.sampled / sums.sum;
    variance = mass * mass * sums.variance / (sums.sum * sums.sum);
  }
  float relative = 0;
  if (verified != nullptr) {
    mass = verified->mass.mass;
    variance = verified->mass.variance;
    relative = p.batch.learn && !all ? verified->drawn.relative : 0.0f;
  } else if (measures != nullptr && lane < group && !all) {
    DrawSums draw;
    for (int s = 0; s < p.splits; ++s) draw.add(measures->of_blocks[s][lane]);
    const float unit = exp2_fast(sums.max - followers.estimate(lane));
    const MeasuredMass found =
        measure(draw, (sums.sum - sums.sampled) * unit, sums.variance * unit * unit,
                draw.clusters == static_cast<float>(count(kRefinedClusters)),
                tau * rsqrtf(sqrtf(followers.besides[lane])), p.index.calibration[pair].usual_variance[lane]);
    mass = found.mass;
    variance = found.variance;
    relative = found.relative;
  }
  if (lane < group && relative > 0) {
    float& usual = p.index.calibration[pair].usual_variance[lane];
    usual += (usual > 0 ? kUsualRate : 1.0f) * (relative - usual);
  }
  if (p.records == nullptr) return;
  if (lane >= group) mass = variance = 0;
#pragma unroll
  for (int step = 1; step < 8; step *= 2) {
    mass += shuffle_xor(mass, step);
    variance += shuffle_xor(variance, step);
  }
  if (lane != 0) return;
  const SequenceState state = dense == DenseReason::kNoIndex ? SequenceState{} : p.index.states[sequence];
  StepRecord record{};
  record.kv_len = kv_len;
  record.segments = state.full_segments + state.provisional_segments;
  record.clusters = num_clusters(p.index.geometry, state);
  record.tau = tau;
  record.beta = buffers.beta;
  record.dense = dense;
  record.tokens_exact = all ? kv_len : count(kForCertain) + exact_rows;
  record.certain_mass = all ? 1 : mass / group;
  if (!all) {
    record.tokens_selected = count(kSelected) - count(kLeftOut);
    record.tokens_sampled = count(kSampled);
    record.clusters_refined = count(kRefinedClusters);
    record.tokens_refined = count(kRefinedRows);
    record.mass_std_error = sqrtf(variance / group);
  }
  p.records[pair] = record;
}

}  // namespace tactic::cuda
