// What select_fit and select_topk share: clusters by falling score of each query head, and the list of rows that the
// group's heads want together. dense.cu then reads the list.
#include "cuda/rank.cuh"

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "cuda/launch.h"
#include "cuda/merge.cuh"

namespace tactic::cuda {

namespace {

constexpr int kRankThreads = 256, kRankWarps = kRankThreads / 32;
constexpr int kOrderThreads = 1024;
constexpr int kBins = 4 * kOrderThreads;
constexpr int kSmallBin = 64;  // clusters whose order is found by comparing each with each
constexpr int kListThreads = 512;

/// As a whole number that rises when the score falls, and back.
__device__ __forceinline__ uint32_t falling(float dot) {
  const uint32_t bits = __float_as_uint(dot + 0.0f);  // one zero
  return (bits >> 31) != 0 ? bits : ~(bits | 0x80000000u);
}
__device__ __forceinline__ float score_of(uint32_t key) {
  return __uint_as_float((key >> 31) != 0 ? key : ~key & 0x7FFFFFFFu);
}

// dots [pair, head, cluster] and places [pair, cluster]; a warp a tile, two lanes a cluster. Nothing is taken yet.
template <int kDim, int kHeads>
__global__ void __launch_bounds__(kRankThreads) rank_kernel(const __grid_constant__ RankParams p) {
  __shared__ __align__(16) float q[kHeads * kDim];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int pair = blockIdx.y, heads = p.batch.num_kv_heads, group = p.batch.num_q_heads / heads;
  const int sequence = pair / heads, lane = threadIdx.x & 31, in_tile = lane % kTileClusters;
  const IndexGeometry& g = p.index.geometry;
  for (int i = threadIdx.x; i < kHeads * kDim; i += kRankThreads) {
    const int64_t at = static_cast<int64_t>(pair) * group * kDim + i;
    q[i] = i < group * kDim ? load_query(p.batch.q, p.batch.q_dtype, at) * p.batch.sm_scale : 0.0f;
  }
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x == 0) p.probed[pair] = p.changed[pair] = 0;
  const SequenceState state = usable_state(g, p.index.states[sequence], p.batch.kv_lens[sequence]);
  const int tiles = num_clusters(g, state) / kTileClusters;
  for (int t = blockIdx.x * kRankWarps + threadIdx.x / 32; t < tiles; t += gridDim.x * kRankWarps) {
    const TileView tile = tile_of(p.index, pair, cluster_number(g, state, t * kTileClusters));
    float dots[kHeads] = {}, mean_dots[kHeads] = {};
#pragma unroll
    for (int chunk = lane / kTileClusters; chunk < kDim / 16; chunk += 2) {
      const auto codes = *reinterpret_cast<const int4*>(tile.data + code_at(tile.code_bytes, in_tile, 16 * chunk));
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int32_t word = (&codes.x)[w];
        const float x[4] = {static_cast<float>(static_cast<int8_t>(word)),
                            static_cast<float>(static_cast<int8_t>(word >> 8)),
                            static_cast<float>(static_cast<int8_t>(word >> 16)), static_cast<float>(word >> 24)};
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          const float4 y = *reinterpret_cast<const float4*>(q + h * kDim + 16 * chunk + 4 * w);
          dots[h] += y.x * x[0] + y.y * x[1] + y.z * x[2] + y.w * x[3];
        }
      }
    }
    for (int d = lane; d < kDim; d += 32) {
      const float mean = tile.mean(d);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) mean_dots[h] += q[h * kDim + d] * mean;
    }
    const float scale = tile.facts(in_tile).scale;
    const int64_t at = static_cast<int64_t>(pair) * g.max_clusters + t * kTileClusters + in_tile;
    if (lane < kTileClusters) {
      p.places[at] = tile.place(in_tile);
      p.taken[at] = 0;
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float dot = warp_sum(mean_dots[h]) + scale * (dots[h] + shuffle_xor(dots[h], kTileClusters));
      if (lane < kTileClusters && h < group)
        p.dots[(static_cast<int64_t>(pair) * group + h) * g.max_clusters + t * kTileClusters + in_tile] = dot;
    }
  }
}

/// Which of kBins a score falls into, rising as scores fall: each step of this is monotonic, rounded or not. The bins
/// are narrow around the mean and wide where few scores are. What is not finite makes all of them one.
struct Bins {
  float mean, inverse_deviation;

  __device__ __forceinline__ int of(float dot) const {
    const float z = (mean - dot) * inverse_deviation, share = 1 - 1 / (1 + fabsf(z));
    const int beside = min(static_cast<int>(share * (kBins / 2)), kBins / 2 - 1);
    return z < 0 ? kBins / 2 - 1 - beside : kBins / 2 + beside;
  }
};

/// Sorts in place by one block, however many there are: bitonic, all runs ascending, so that what lacks behind the end
/// never moves.
__device__ void sort_block(uint64_t* x, int32_t count) {
  const auto pass = [&](int32_t mask) {
    for (int32_t i = threadIdx.x; i < count; i += kOrderThreads) {
      const int32_t other = i ^ mask;
      if (other <= i || other >= count || x[i] <= x[other]) continue;
      const uint64_t kept = x[i];
      x[i] = x[other];
      x[other] = kept;
    }
    __syncthreads();
  };
  for (int32_t width = 2; width / 2 < count; width *= 2) {
    pass(width - 1);
    for (int32_t step = width / 4; step > 0; step /= 2) pass(step);
  }
}

// order and before of a query head, by one block: clusters go to bins of falling scores, and then to their places
// within these. Of topk, also what is taken.
__global__ void __launch_bounds__(kOrderThreads) order_kernel(const __grid_constant__ RankParams p) {
  using Scan = cub::BlockScan<int32_t, kOrderThreads>;
  __shared__ typename Scan::TempStorage storage;
  __shared__ int32_t ends[kBins];  // where the bins begin, later end
  __shared__ double moments[kOrderThreads / 32][3];
  constexpr int kPerThread = kBins / kOrderThreads;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const RankedHead head(p, blockIdx.x);
  const int thread = threadIdx.x;
  const float* dots = p.dots + head.first;
  uint64_t* entries = p.entries + head.first;
  int32_t *order = p.order + head.first, *before = p.before + head.first;
  // fn(cluster, score) of those that have members. What it does must not keep the next loads from being on their way.
  const auto for_clusters = [&](auto fn) {
#pragma unroll 4
    for (int32_t i = thread; i < head.clusters; i += kOrderThreads) {
      const float dot = dots[i];
      if (head.size_of(i) > 0) fn(i, dot);
    }
  };

  double sums[3] = {};
  for_clusters([&](int32_t, double x) {
    sums[0] += 1;
    sums[1] += x;
    sums[2] += x * x;
  });
#pragma unroll
  for (int j = 0; j < 3; ++j) {
    sums[j] = warp_sum(sums[j]);
    if (thread % 32 == 0) moments[thread / 32][j] = sums[j];
  }
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) ends[kPerThread * thread + j] = 0;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 3; ++j) sums[j] = warp_sum(moments[thread % 32][j]);
  const auto ranks = static_cast<int32_t>(sums[0]);
  const double mean = sums[1] / sums[0], variance = sums[2] / sums[0] - mean * mean;
  const Bins bins{static_cast<float>(mean), variance > 0 ? static_cast<float>(1 / sqrt(variance)) : 0.0f};

  for_clusters([&](int32_t, float dot) { atomicAdd(&ends[bins.of(dot)], 1); });
  __syncthreads();
  int32_t counts[kPerThread], begins[kPerThread];
  bool any_large = false;
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    counts[j] = ends[kPerThread * thread + j];
    any_large |= counts[j] > kSmallBin;
  }
  Scan(storage).ExclusiveSum(counts, begins);
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) ends[kPerThread * thread + j] = begins[j];
  any_large = __syncthreads_or(any_large) != 0;
  for_clusters([&](int32_t i, float dot) {
    // Of equal ones the lower number comes first.
    entries[atomicAdd(&ends[bins.of(dot)], 1)] = uint64_t{falling(dot)} << 32 | static_cast<uint32_t>(i);
  });
  __syncthreads();
  const auto begin_of = [&](int bin) { return bin > 0 ? ends[bin - 1] : 0; };
  const auto put = [&](int32_t rank, uint64_t entry) {
    order[rank] = static_cast<int32_t>(entry);
    before[rank] = head.size_of(static_cast<int32_t>(entry));
  };
  for (int32_t i = thread; i < ranks; i += kOrderThreads) {
    const uint64_t entry = entries[i];
    const int bin = bins.of(score_of(static_cast<uint32_t>(entry >> 32)));
    const int32_t begin = begin_of(bin), end = ends[bin];
    if (end - begin > kSmallBin) continue;
    int32_t rank = begin;
    for (int32_t j = begin; j < end; ++j) rank += entries[j] < entry;
    put(rank, entry);
  }
  for (int bin = 0; bin < kBins && any_large; ++bin) {
    const int32_t begin = begin_of(bin), count = ends[bin] - begin;
    if (count <= kSmallBin) continue;
    __syncthreads();
    sort_block(entries + begin, count);
    for (int32_t i = thread; i < count; i += kOrderThreads) put(begin + i, entries[begin + i]);
  }
  __syncthreads();

  const int32_t share = (ranks + kOrderThreads - 1) / kOrderThreads, begin = min(ranks, thread * share),
                end = min(ranks, begin + share);
  int32_t tokens = 0, all;
  for (int32_t r = begin; r < end; ++r) tokens += before[r];
  Scan(storage).ExclusiveSum(tokens, tokens, all);
  for (int32_t r = begin; r < end; ++r) {
    const int32_t size = before[r];
    before[r] = tokens;
    tokens += size;
  }
  if (thread == 0) p.totals[blockIdx.x] = {all, ranks};
  if (p.target_mass > 0) return;
  __syncthreads();
  head.take(p.budget, ranks, kOrderThreads);
}

// rows [pair]: those read anyway, then what is taken of the clusters. A block lists what is taken of every gridDim.x-th
// cluster, as neighbouring ones tend to be taken together; the first one also lists the rows read anyway, the last one
// knows how many there are in all.
__global__ void __launch_bounds__(kListThreads) list_kernel(const __grid_constant__ RankParams p) {
  using Scan = cub::BlockScan<int32_t, kListThreads>;
  using Reduce = cub::BlockReduce<int32_t, kListThreads>;
  __shared__ union {
    typename Scan::TempStorage scan;
    typename Reduce::TempStorage reduce;
  } storage;
  __shared__ int32_t ahead, begins[kListThreads], segment_rows[kListThreads], first_members[kListThreads];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int pair = blockIdx.y, heads = p.batch.num_kv_heads, sequence = pair / heads;
  const int thread = threadIdx.x, block = blockIdx.x, blocks = gridDim.x;
  const IndexGeometry& g = p.index.geometry;
  const int32_t kv_len = p.batch.kv_lens[sequence];
  const SequenceState state = usable_state(g, p.index.states[sequence], kv_len);
  const uint16_t* members = p.index.members + static_cast<int64_t>(pair) * g.max_rows;
  int32_t* rows = p.rows + static_cast<int64_t>(pair) * p.max_rows;
  const ExactRows anyway(g, state, min(kv_len, p.max_rows));
  for (int i = thread; i < anyway.count && block == 0; i += kListThreads) rows[i] = anyway.row(i);
  int32_t count = anyway.count;
  const int32_t segments = p.index.any_not_finite[sequence] != 0 ? state.full_segments + state.provisional_segments : 0;
  for (int segment = 0; segment < segments; ++segment) {
    const SegmentPlace place(g, state, segment);
    const int32_t number = p.index.num_not_finite[static_cast<int64_t>(pair) * g.all_segments + place.slot];
    for (int i = thread; i < number && block == 0; i += kListThreads)
      rows[count + i] = place.first_row + members[place.first_row + place.num_rows - number + i];
    count += number;
  }
  const int32_t exact = count;

  const int32_t clusters = num_clusters(g, state);
  const int32_t* taken = p.taken + static_cast<int64_t>(pair) * g.max_clusters;
  const uint32_t* places = p.places + static_cast<int64_t>(pair) * g.max_clusters;
  int32_t of_others = 0;
  for (int32_t i = thread; i < clusters; i += kListThreads) of_others += i % blocks < block ? taken[i] : 0;
  of_others = Reduce(storage.reduce).Sum(of_others);
  if (thread == 0) ahead = of_others;
  __syncthreads();
  count += ahead;
  for (int32_t first = block; first < clusters; first += blocks * kListThreads) {
    const int32_t i = first + blocks * thread, size = i < clusters ? taken[i] : 0;
    int32_t sum;
    Scan(storage.scan).ExclusiveSum(size, begins[thread], sum);
    if (size > 0) {
      segment_rows[thread] = ClusterPlace(g, state, cluster_number(g, state, i)).first_row;
      first_members[thread] = static_cast<int32_t>(places[i] >> 16);
    }
    __syncthreads();
#pragma unroll 4
    for (int32_t at = thread; at < sum; at += kListThreads) {
      int from = 0;  // the last cluster that does not begin behind it
#pragma unroll
      for (int step = kListThreads / 2; step > 0; step /= 2) from += begins[from + step] <= at ? step : 0;
      const int32_t segment_row = segment_rows[from];
      rows[count + at] = segment_row + __ldg(members + segment_row + first_members[from] + at - begins[from]);
    }
    count += sum;
    __syncthreads();
  }
  if (block != blocks - 1 || thread != 0) return;
  p.counts[pair] = count;
  p.exact_counts[pair] = exact;
  if (p.records == nullptr) return;
  StepRecord record{};
  record.kv_len = kv_len;
  record.tokens_exact = exact;
  record.tokens_selected = count - exact;
  record.tokens_probed = p.probed[pair];
  record.segments = state.full_segments + state.provisional_segments;
  record.clusters = clusters;
  record.certain_mass = 1;
  record.dense = state == p.index.states[sequence] ? DenseReason::kNone : DenseReason::kNoIndex;
  p.records[pair] = record;
}

}  // namespace

void launch_rank(const RankParams& params, const DeviceFacts& device, cudaStream_t stream) {
  const DecodeBatch& b = params.batch;
  const auto pairs = static_cast<unsigned>(b.num_sequences * b.num_kv_heads);
  dispatch_shape(b, [&]<int kDim, int kHeads>() {
    const dim3 grid(4 * static_cast<unsigned>(params.splits), pairs);
    launch_dependent(rank_kernel<kDim, kHeads>, params, grid, kRankThreads, device, stream, "rank");
  });
  const auto heads = static_cast<unsigned>(b.num_sequences * b.num_q_heads);
  launch_dependent(order_kernel, params, heads, kOrderThreads, device, stream, "order");
}

void launch_list(const RankParams& params, const DeviceFacts& device, cudaStream_t stream) {
  const dim3 grid(2 * static_cast<unsigned>(params.splits),
                  static_cast<unsigned>(params.batch.num_sequences * params.batch.num_kv_heads));
  launch_dependent(list_kernel, params, grid, kListThreads, device, stream, "list");
}

}  // namespace tactic::cuda
