// A query head's clusters in the order of their scores, as rank.cu leaves them and select_fit.cu reads them.
#pragma once

#include "cuda/segments.h"

namespace tactic::cuda {

/// `number`: of the query head among those of all pairs.
struct RankedHead {
  const RankParams& p;
  int pair, sequence;
  SequenceState state;
  int32_t clusters;
  int64_t first;          // of the head's clusters
  int64_t first_of_pair;  // and of its pair's

  __device__ RankedHead(const RankParams& params, int number)
      : p(params),
        pair(number / (params.batch.num_q_heads / params.batch.num_kv_heads)),
        sequence(pair / params.batch.num_kv_heads),
        state(usable_state(params.index.geometry, params.index.states[sequence], params.batch.kv_lens[sequence])),
        clusters(num_clusters(params.index.geometry, state)),
        first(static_cast<int64_t>(number) * params.index.geometry.max_clusters),
        first_of_pair(static_cast<int64_t>(pair) * params.index.geometry.max_clusters) {}

  __device__ __forceinline__ int32_t size_of(int32_t cluster) const {
    return static_cast<int32_t>(p.places[first_of_pair + cluster] & 0xFFFFu);
  }
  /// The first `wanted` tokens of the order are read. By one block.
  __device__ void take(int32_t wanted, int32_t ranks, int threads) const {
    for (int32_t r = static_cast<int32_t>(threadIdx.x); r < ranks; r += threads) {
      const int32_t before = p.before[first + r];
      if (before >= wanted) break;
      const int32_t c = p.order[first + r];
      atomicMax(p.taken + first_of_pair + c, min(size_of(c), wanted - before));
    }
  }
};

}  // namespace tactic::cuda
