// select_fit and select_topk: clusters by falling score of each query head, how many tokens of that order are read
// (arXiv 2502.12216, section 4, or a budget), and the list of rows that the group's heads want together. Correct and
// capturable, not fused: dense.cu then reads the list.
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <cub/device/device_segmented_radix_sort.cuh>

#include "cuda/launch.h"
#include "cuda/merge.cuh"

namespace tactic::cuda {

namespace {

constexpr int kRankThreads = 256, kRankWarps = kRankThreads / 32;
constexpr int kListThreads = 256;
constexpr uint32_t kNoCluster = 0xFFFFFFFFu;  // sorts behind every score

/// As a whole number that rises when the score falls.
__device__ __forceinline__ uint32_t falling(float dot) {
  const uint32_t bits = __float_as_uint(dot + 0.0f);  // one zero
  return (bits >> 31) != 0 ? bits : ~(bits | 0x80000000u);
}

// keys and numbers [pair, head, cluster]; a warp a cluster. Nothing is taken yet.
template <int kDim>
__global__ void __launch_bounds__(kRankThreads) rank_kernel(const __grid_constant__ RankParams p) {
  __shared__ float q[kMaxGroup * kDim];
  const int pair = blockIdx.y, heads = p.batch.num_kv_heads, group = p.batch.num_q_heads / heads;
  const int sequence = pair / heads, lane = threadIdx.x & 31;
  const IndexGeometry& g = p.index.geometry;
  for (int i = threadIdx.x; i < group * kDim; i += kRankThreads)
    q[i] = load_query(p.batch.q, p.batch.q_dtype, static_cast<int64_t>(pair) * group * kDim + i) * p.batch.sm_scale;
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x == 0) p.probed[pair] = p.changed[pair] = 0;
  if (blockIdx.x == 0 && threadIdx.x <= group)
    p.offsets[pair * group + threadIdx.x] = (pair * group + threadIdx.x) * g.max_clusters;
  const SequenceState state = usable_state(g, p.index.states[sequence], p.batch.kv_lens[sequence]);
  for (int c = blockIdx.x * kRankWarps + threadIdx.x / 32; c < g.max_clusters; c += gridDim.x * kRankWarps) {
    const ClusterPlace place(g, state, c);
    const int64_t at = static_cast<int64_t>(pair) * g.max_clusters + c;
    const TileView tile = tile_of(p.index, pair, c);
    const bool exists = place.slot >= 0 && (tile.place(c) & 0xFFFFu) > 0;
    float dots[kMaxGroup] = {};
    for (int d = lane; d < kDim && exists; d += 32) {
      const float x = tile.centroid(c, d);
#pragma unroll
      for (int h = 0; h < kMaxGroup; ++h) {
        if (h < group) dots[h] += q[h * kDim + d] * x;
      }
    }
#pragma unroll
    for (int h = 0; h < kMaxGroup; ++h) {
      if (h >= group) break;
      dots[h] = warp_sum(dots[h]);
      if (lane != 0) continue;
      const int64_t to = (static_cast<int64_t>(pair) * group + h) * g.max_clusters + c;
      p.keys[to] = exists ? falling(dots[h]) : kNoCluster;
      p.numbers[to] = c;
    }
    if (lane == 0) p.taken[at] = 0;
  }
}

// 1 + 1/2 + ... + 1/x, to 1e-9 from x = 8 on.
__device__ double harmonic(int32_t x) {
  const double r = 1.0 / x;
  return 0.57721566490153286 - log(r) + r / 2 - r * r / 12 + r * r * r * r / 120;
}

// max(0, a / x + b), a >= 0, for x > begin.
struct Tail {
  int32_t begin = 0;
  double a = 0, b = 0;

  __device__ double sum_to(int32_t x) const {
    if (b < 0) x = static_cast<int32_t>(fmin(static_cast<double>(x), floor(-a / b)));
    return x <= begin ? 0.0 : a * (harmonic(x) - harmonic(begin)) + b * (x - begin);
  }
};

// How many tokens of its order one query head reads, and what that means for each cluster: one block.
template <DType kDType, int kDim>
class HeadChoice {
 public:
  using Scan = cub::BlockScan<int32_t, kRankThreads>;
  using Reduce = cub::BlockReduce<double, kRankThreads>;
  struct Shared {
    float q[kDim];
    union {
      typename Scan::TempStorage scan;
      typename Reduce::TempStorage reduce;
    };
    double value;
    int32_t count;
  };

  __device__ HeadChoice(const RankParams& params, Shared& shared)
      : p(params),
        s(shared),
        g(params.index.geometry),
        heads(params.batch.num_kv_heads),
        group(params.batch.num_q_heads / heads),
        pair(blockIdx.x / group),
        sequence(pair / heads),
        first(static_cast<int64_t>(blockIdx.x) * g.max_clusters),
        first_cluster(static_cast<int64_t>(pair) * g.max_clusters),
        members(params.index.members + static_cast<int64_t>(pair) * g.max_rows),
        state(usable_state(g, params.index.states[sequence], params.batch.kv_lens[sequence])) {
    const DecodeBatch& b = p.batch;
    const int head = pair % heads;
    pages = pages_of(b, sequence);
    k = rows_of(b.k, pages, sequence, head);
    for (int d = threadIdx.x; d < kDim; d += kRankThreads) {
      s.q[d] = load_query(b.q, b.q_dtype, static_cast<int64_t>(blockIdx.x) * kDim + d) * b.sm_scale *
               head_scale<kDType>(b.k, head);
    }
    __syncthreads();
  }

  __device__ void run() {
    count_tokens();
    const int32_t wanted = p.target_mass > 0 ? wanted_by_fit() : min(p.budget, n);
    for (int r = threadIdx.x; r < ranks; r += kRankThreads) {
      const int32_t before = p.before[first + r];
      if (before < wanted) atomicMax(&p.taken[first_cluster + p.order[first + r]], min(size_at(r), wanted - before));
    }
  }

 private:
  __device__ int32_t size_at(int32_t rank) const { return place_of(p.order[first + rank]) & 0xFFFFu; }
  __device__ uint32_t place_of(int32_t c) const { return tile_of(p.index, pair, c).place(c); }

  // before[r]: tokens of the clusters ahead of rank r. n: all of them; ranks: clusters that have any.
  __device__ void count_tokens() {
    n = ranks = 0;
    for (int begin = 0; begin < g.max_clusters; begin += kRankThreads) {
      const int r = begin + static_cast<int>(threadIdx.x);
      const bool exists = r < g.max_clusters && p.sorted_keys[first + r] != kNoCluster;
      const int32_t size = exists ? size_at(r) : 0;
      int32_t before, sum;
      Scan(s.scan).ExclusiveSum(size, before, sum);
      if (exists) p.before[first + r] = n + before;
      n += sum;
      const int32_t found = __syncthreads_count(exists);
      ranks += found;
      if (found < kRankThreads) break;  // those that are none stand last
    }
    __syncthreads();
  }

  // Score of a row, natural log; one warp.
  __device__ float score(int32_t row) const {
    const std::byte* data = k + row_offset(p.batch.k, pages, row);
    float dot = 0, x[8];
    for (int chunk = threadIdx.x & 31; chunk < kDim / 8; chunk += 32) {
      load_floats<kDType>(data, chunk, x);
#pragma unroll
      for (int j = 0; j < 8; ++j) dot += s.q[8 * chunk + j] * x[j];
    }
    return warp_sum(dot);
  }

  // The row of token i in the order.
  __device__ int32_t token(int32_t i) const {
    int32_t low = 0, high = ranks;
    while (high - low > 1) {
      const int32_t middle = (low + high) / 2;
      (p.before[first + middle] <= i ? low : high) = middle;
    }
    const int32_t c = p.order[first + low];
    const int32_t first_row = ClusterPlace(g, state, c).first_row;
    const int32_t member = (place_of(c) >> 16) + i - p.before[first + low];
    return first_row + members[first_row + member];
  }

  template <class Op>
  __device__ double reduce(double x, Op op) {
    const double result = Reduce(s.reduce).Reduce(x, op);
    if (threadIdx.x == 0) s.value = result;
    __syncthreads();
    const double all = s.value;
    __syncthreads();
    return all;
  }
  static __device__ double greater(double a, double b) { return a > b || isnan(a) ? a : b; }  // NaN stays
  static __device__ double sum(double a, double b) { return a + b; }

  // Softmax over the rows read anyway: its maximum, and the sum relative to that.
  __device__ double2 read_exact() {
    const int warp = threadIdx.x / 32;
    double most = -INFINITY, total = 0;  // of this warp
    const auto add = [&](int32_t row) {
      const double x = score(row), top = greater(x, most);
      total = total * exp(most - top) + exp(x - top);
      most = top;
    };
    const ExactRows anyway(g, state, min(p.batch.kv_lens[sequence], p.max_rows));
    for (int i = warp; i < anyway.count; i += kRankWarps) add(anyway.row(i));
    for (int segment = 0; segment < state.full_segments + state.provisional_segments; ++segment) {
      const SegmentPlace place(g, state, segment);
      const int32_t number = p.index.num_not_finite[static_cast<int64_t>(pair) * g.all_segments + place.slot];
      for (int i = warp; i < number; i += kRankWarps)
        add(place.first_row + members[place.first_row + place.num_rows - number + i]);
    }
    const double top = reduce(most, greater);
    const bool first_lane = (threadIdx.x & 31) == 0;
    return {top, reduce(first_lane && total > 0 ? total * exp(most - top) : 0, sum)};
  }

  // Scores of the first `peak` tokens of the order and of two windows; returns the largest.
  __device__ double probe(int32_t peak, int32_t near, int32_t far, int32_t width, float* probes) {
    const int warp = threadIdx.x / 32;
    double most = -INFINITY;
    const auto keep = [&](float* to, int32_t row) {
      const float x = score(row);
      if ((threadIdx.x & 31) == 0) *to = x;
      most = greater(x, most);
    };
    for (int i = warp; i < peak; i += kRankWarps) keep(probes + i, token(i));
    for (int i = warp; i < 2 * width && peak < n; i += kRankWarps)
      keep(probes + peak + i, token(i < width ? near + i : far + i - width));
    return reduce(most, greater);
  }

  __device__ double sum_weights(float* scores, int32_t count, double max) {
    double total = 0;
    for (int i = threadIdx.x; i < count; i += kRankThreads) {
      scores[i] = static_cast<float>(exp(scores[i] - max));
      total += scores[i];
    }
    return reduce(total, sum);
  }

  __device__ int32_t wanted_by_fit() {
    if (p.target_mass >= 1 || n == 0) return n;
    const int32_t peak = n < 256 ? n : max(16, n / 50), width = max(8, n / 100);
    const int32_t near = n / 10 - width / 2;
    const auto far = static_cast<int32_t>(static_cast<int64_t>(n) * 6 / 10 - width / 2);
    float* probes = p.probes + static_cast<int64_t>(blockIdx.x) * p.max_probes;
    if (threadIdx.x == 0) atomicAdd(p.probed + pair, peak + (peak < n ? 2 * width : 0));
    const double2 exact = read_exact();
    const double max = greater(exact.x, probe(peak, near, far, width, probes));
    if (!isfinite(max)) return n;
    const double certain = exact.y > 0 ? exact.y * exp(exact.x - max) : 0, top = sum_weights(probes, peak, max);
    Tail tail;
    tail.begin = peak;
    if (peak < n) {
      const double middle = (width + 1.0) / 2, x1 = near + middle, x2 = far + middle;
      const double y1 = sum_weights(probes + peak, width, max) / width,
                   y2 = sum_weights(probes + peak + width, width, max) / width;
      tail.a = y2 > y1 ? 0 : (y1 - y2) / (1 / x1 - 1 / x2);
      tail.b = y2 > y1 ? (y1 + y2) / 2 : y1 - tail.a / x1;
    }
    if (threadIdx.x < 32) {
      const int32_t wanted = reach(certain, p.target_mass * (certain + top + tail.sum_to(n)), probes, tail);
      if (threadIdx.x == 0) s.count = wanted;
    }
    __syncthreads();
    return s.count;
  }

  // The least number of tokens with which `mass` reaches the target; one warp.
  __device__ int32_t reach(double mass, double target, const float* weights, const Tail& tail) const {
    const int lane = threadIdx.x & 31;
    if (mass >= target) return 0;
    for (int32_t begin = 0; begin < tail.begin; begin += 32) {
      double sum = begin + lane < tail.begin ? weights[begin + lane] : 0;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const double other = __shfl_up_sync(kAllLanes, sum, step);
        if (lane >= step) sum += other;
      }
      const uint32_t enough = __ballot_sync(kAllLanes, mass + sum >= target);
      if (enough != 0) return min(begin + __ffs(enough), tail.begin);
      mass += shuffle(sum, 31);
    }
    int32_t low = tail.begin, high = n;  // the target lies in (low, high]
    while (high - low > 1) {
      const int32_t middle = low + (high - low) / 2;
      (mass + tail.sum_to(middle) < target ? low : high) = middle;
    }
    return high;
  }

  const RankParams& p;
  Shared& s;
  const IndexGeometry& g;
  const int heads, group, pair, sequence;
  const int64_t first, first_cluster;
  const uint16_t* members;
  const SequenceState state;
  const int32_t* pages;
  const std::byte* k;
  int32_t n = 0, ranks = 0;
};

template <DType kDType, int kDim>
__global__ void __launch_bounds__(kRankThreads) choose_kernel(const __grid_constant__ RankParams params) {
  __shared__ typename HeadChoice<kDType, kDim>::Shared shared;
  HeadChoice<kDType, kDim>(params, shared).run();
}

// rows [pair]: those read anyway, then what is taken of the clusters in turn. A block lists, and checks, its share of
// the clusters; the first one also lists the rows read anyway, the last one knows how many there are in all.
__global__ void __launch_bounds__(kListThreads) list_kernel(const __grid_constant__ RankParams p) {
  using Scan = cub::BlockScan<int32_t, kListThreads>;
  using Reduce = cub::BlockReduce<int32_t, kListThreads>;
  __shared__ union {
    typename Scan::TempStorage scan;
    typename Reduce::TempStorage reduce;
  } storage;
  __shared__ int32_t ahead;
  const int pair = blockIdx.y, heads = p.batch.num_kv_heads, sequence = pair / heads, head = pair % heads;
  const int lane = threadIdx.x & 31;
  const IndexGeometry& g = p.index.geometry;
  const int32_t kv_len = p.batch.kv_lens[sequence];
  const SequenceState state = usable_state(g, p.index.states[sequence], kv_len);
  const uint16_t* members = p.index.members + static_cast<int64_t>(pair) * g.max_rows;
  int32_t* rows = p.rows + static_cast<int64_t>(pair) * p.max_rows;
  const ExactRows anyway(g, state, min(kv_len, p.max_rows));
  const bool is_first = blockIdx.x == 0, is_last = blockIdx.x == gridDim.x - 1;
  for (int i = threadIdx.x; i < anyway.count && is_first; i += kListThreads) rows[i] = anyway.row(i);
  int32_t count = anyway.count;
  const int32_t segments = p.index.any_not_finite[sequence] != 0 ? state.full_segments + state.provisional_segments : 0;
  for (int segment = 0; segment < segments; ++segment) {
    const SegmentPlace place(g, state, segment);
    const int32_t number = p.index.num_not_finite[static_cast<int64_t>(pair) * g.all_segments + place.slot];
    for (int i = threadIdx.x; i < number && is_first; i += kListThreads)
      rows[count + i] = place.first_row + members[place.first_row + place.num_rows - number + i];
    count += number;
  }
  const int32_t exact = count;

  const int32_t clusters = num_clusters(g, state), share = (clusters + gridDim.x - 1) / gridDim.x;
  const int32_t begin = min(clusters, static_cast<int32_t>(blockIdx.x) * share), end = min(clusters, begin + share);
  const int32_t* taken = p.taken + static_cast<int64_t>(pair) * g.max_clusters;
  int32_t of_others = 0;
  for (int i = threadIdx.x; i < begin; i += kListThreads) of_others += taken[cluster_number(g, state, i)];
  of_others = Reduce(storage.reduce).Sum(of_others);
  if (threadIdx.x == 0) ahead = of_others;
  __syncthreads();
  count += ahead;
  const int32_t* pages = pages_of(p.batch, sequence);
  const std::byte *k = rows_of(p.batch.k, pages, sequence, head), *v = rows_of(p.batch.v, pages, sequence, head);
  const uint8_t* checks = p.index.row_checks + static_cast<int64_t>(pair) * g.max_rows;
  bool changed = false;
  for (int32_t first = begin; first < end; first += kListThreads) {
    const int32_t i = first + static_cast<int32_t>(threadIdx.x), c = cluster_number(g, state, i);
    const int32_t size = i < end ? taken[c] : 0;
    int32_t before, sum;
    Scan(storage.scan).ExclusiveSum(size, before, sum);
    const int32_t first_row = size > 0 ? ClusterPlace(g, state, c).first_row : 0;
    const int32_t member = size > 0 ? static_cast<int32_t>(tile_of(p.index, pair, c).place(c) >> 16) : 0;
    // The lanes share the rows of the warp's clusters.
    const int32_t of_warp = shuffle(before, 0), all = shuffle(before + size, 31) - of_warp;
    before -= of_warp;
    for (int32_t row_begin = 0; row_begin < all; row_begin += 32) {
      const int32_t at = row_begin + lane;
      int from = 0;  // the last cluster that does not begin behind it
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        if (shuffle(before, from + step) <= at) from += step;
      }
      const int32_t segment_row = shuffle(first_row, from), inside = at - shuffle(before, from) + shuffle(member, from);
      if (at >= all) continue;
      const int32_t row = segment_row + __ldg(members + segment_row + inside);
      rows[count + of_warp + at] = row;
      if (p.check_rows) {
        changed |= __ldg(checks + row) != (check_row(k + row_offset(p.batch.k, pages, row), p.row_bytes, row) |
                                           check_row(v + row_offset(p.batch.v, pages, row), p.row_bytes, row) << 4);
      }
    }
    count += sum;
    __syncthreads();
  }
  if (__syncthreads_or(changed) != 0 && threadIdx.x == 0) p.changed[pair] = 1;
  if (!is_last || threadIdx.x != 0) return;
  p.counts[pair] = count;
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

size_t rank_sort_bytes(int32_t segments, int32_t max_clusters) {
  size_t bytes = 0;
  check(cub::DeviceSegmentedRadixSort::SortPairs(
            nullptr, bytes, static_cast<const uint32_t*>(nullptr), static_cast<uint32_t*>(nullptr),
            static_cast<const int32_t*>(nullptr), static_cast<int32_t*>(nullptr), segments * max_clusters, segments,
            static_cast<const int32_t*>(nullptr), static_cast<const int32_t*>(nullptr)),
        "ranking");
  return bytes;
}

void launch_rank(const RankParams& params, cudaStream_t stream) {
  const int32_t pairs = params.batch.num_sequences * params.batch.num_kv_heads,
                segments = params.batch.num_sequences * params.batch.num_q_heads,
                clusters = params.index.geometry.max_clusters;
  dispatch(params.batch, [&]<DType kDType, int kDim, int kHeads>() {
    const dim3 grid(static_cast<unsigned>(std::min(64, (clusters + kRankWarps - 1) / kRankWarps)),
                    static_cast<unsigned>(pairs));
    rank_kernel<kDim><<<grid, kRankThreads, 0, stream>>>(params);
    check(cudaGetLastError(), "rank");
    size_t bytes = params.sort_bytes;
    check(cub::DeviceSegmentedRadixSort::SortPairs(params.sort_memory, bytes, params.keys, params.sorted_keys,
                                                   params.numbers, params.order, segments * clusters, segments,
                                                   params.offsets, params.offsets + 1, 0, 32, stream),
          "ranking");
    choose_kernel<kDType, kDim><<<static_cast<unsigned>(segments), kRankThreads, 0, stream>>>(params);
    check(cudaGetLastError(), "choose");
    list_kernel<<<dim3(static_cast<unsigned>(params.splits), static_cast<unsigned>(pairs)), kListThreads, 0, stream>>>(
        params);
    check(cudaGetLastError(), "list");
  });
}

}  // namespace tactic::cuda
