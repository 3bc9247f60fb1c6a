// select_fit: how many tokens of a query head's order are read (arXiv 2502.12216, section 4). Keys at the order's
// beginning and in two windows are scored by several blocks, then one block fits the rest.
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "cuda/launch.h"
#include "cuda/merge.cuh"
#include "cuda/rank.cuh"

namespace tactic::cuda {

namespace {

constexpr int kProbeThreads = 256, kProbeWarps = kProbeThreads / 32;
constexpr int kChooseThreads = 512;

/// Which of n tokens in order are scored: the first `peak`, then `width` from `near` on and as many from `far` on.
struct Probes {
  int32_t peak, width, near, far;

  __device__ explicit Probes(int32_t n)
      : peak(n < 256 ? n : max(16, n / 50)),
        width(max(8, n / 100)),
        near(n / 10 - width / 2),
        far(static_cast<int32_t>(static_cast<int64_t>(n) * 6 / 10 - width / 2)),
        all_(peak == n) {}
  __device__ int32_t count() const { return all_ ? peak : peak + 2 * width; }
  __device__ int32_t token(int32_t i) const {
    return i < peak ? i : i < peak + width ? near + i - peak : far + i - peak - width;
  }

 private:
  bool all_;
};

__device__ bool is_fitted(const RankParams& p, int32_t num_tokens) { return p.target_mass < 1 && num_tokens > 0; }
__device__ float greater(float a, float b) { return a > b || isnan(a) ? a : b; }  // NaN stays

// probes [pair, head, max_probes]: scores, natural log. exact [pair, head, splits]: softmax of the rows that are read
// anyway, maximum and sum. Several blocks a head; a warp has 32 rows at a time.
template <DType kDType, int kDim>
__global__ void __launch_bounds__(kProbeThreads) probe_kernel(const __grid_constant__ RankParams p) {
  using Greatest = cub::BlockReduce<float, kProbeThreads>;
  using Sum = cub::BlockReduce<double, kProbeThreads>;
  __shared__ union {
    typename Greatest::TempStorage greatest;
    typename Sum::TempStorage sum;
  } storage;
  __shared__ float shared_top;
  constexpr int kChunks = kDim / 8, kLanes = kChunks <= 8 ? 8 : kChunks <= 16 ? 16 : 32, kAtOnce = 32 / kLanes;
  constexpr int kUnroll = kDim <= 64 ? 4 : 8;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int number = blockIdx.x, lane = threadIdx.x & 31, chunk = lane % kLanes;
  const RankedHead ranked(p, number);
  const OrderTotals totals = p.totals[number];
  if (!is_fitted(p, totals.tokens)) return;
  const IndexGeometry& g = p.index.geometry;
  const DecodeBatch& b = p.batch;
  const int head = ranked.pair % b.num_kv_heads;
  const int32_t* pages = pages_of(b, ranked.sequence);
  const std::byte* k = rows_of(b.k, pages, ranked.sequence, head);
  const uint16_t* members = p.index.members + static_cast<int64_t>(ranked.pair) * g.max_rows;
  float q[8] = {};
  for (int d = 0; d < 8 && chunk < kChunks; ++d) {
    q[d] = load_query(b.q, b.q_dtype, static_cast<int64_t>(number) * kDim + 8 * chunk + d) * b.sm_scale *
           head_scale<kDType>(b.k, head);
  }
  const Probes probes(totals.tokens);
  const auto row_of_token = [&](int32_t i) {
    const int32_t* before = p.before + ranked.first;
    int32_t low = 0, high = totals.clusters;
    while (high - low > 1) {
      const int32_t middle = (low + high) / 2;
      (before[middle] <= i ? low : high) = middle;
    }
    const int32_t c = p.order[ranked.first + low];
    const int32_t first_row = ClusterPlace(g, ranked.state, cluster_number(g, ranked.state, c)).first_row;
    return first_row + __ldg(members + first_row + (p.places[ranked.first_of_pair + c] >> 16) + i - before[low]);
  };
  // Of the lane's row.
  const auto score = [&](int32_t row) {
    const int64_t offset = row_offset(b.k, pages, row);
    float mine = 0;
#pragma unroll 1
    for (int begin = 0; begin < 32; begin += kAtOnce * kUnroll) {
      float dots[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const std::byte* data = k + shuffle(offset, begin + u * kAtOnce + lane / kLanes);
        float x[8] = {};
        if (kChunks == kLanes || chunk < kChunks) load_floats<kDType>(data, chunk, x);
        dots[u] = 0;
#pragma unroll
        for (int d = 0; d < 8; ++d) dots[u] += q[d] * x[d];
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int step = kLanes / 2; step > 0; step /= 2) dots[u] += shuffle_xor(dots[u], step);
        const int at = lane - begin - u * kAtOnce;
        const float found = shuffle(dots[u], (at & (kAtOnce - 1)) * kLanes);
        if (at >= 0 && at < kAtOnce) mine = found;
      }
    }
    return mine;
  };
  const int warp = static_cast<int>(blockIdx.y) * kProbeWarps + static_cast<int>(threadIdx.x) / 32,
            step = static_cast<int>(gridDim.y) * kProbeWarps * 32;
  float most = -INFINITY;  // of the rows read anyway that this lane had
  double total = 0;
  const auto add = [&](float x) {
    if (x == -INFINITY) return;  // no weight, and no difference to what is there
    const float top = greater(x, most);
    total = total * expf(most - top) + expf(x - top);
    most = top;
  };
  const ExactRows anyway(g, ranked.state, min(b.kv_lens[ranked.sequence], p.max_rows));
  const int32_t count = probes.count(), padded = (count + 31) / 32 * 32;
  for (int32_t begin = warp * 32; begin < padded + anyway.count; begin += step) {
    const int32_t i = begin + lane, j = i - padded;
    const bool probed = begin < padded;
    const float x =
        score(probed ? row_of_token(probes.token(min(i, count - 1))) : anyway.row(min(j, anyway.count - 1)));
    if (probed && i < count) p.probes[static_cast<int64_t>(number) * p.max_probes + i] = x;
    if (!probed && j < anyway.count) add(x);
  }
  const bool any = p.index.any_not_finite[ranked.sequence] != 0;
  const int32_t segments = any ? ranked.state.full_segments + ranked.state.provisional_segments : 0;
  for (int32_t segment = 0; segment < segments; ++segment) {
    const SegmentPlace place(g, ranked.state, segment);
    const int32_t rows = p.index.num_not_finite[static_cast<int64_t>(ranked.pair) * g.all_segments + place.slot];
    for (int32_t begin = warp * 32; begin < rows; begin += step) {
      const int32_t i = begin + lane, member = place.num_rows - rows + min(i, rows - 1);
      const float x = score(place.first_row + members[place.first_row + member]);
      if (i < rows) add(x);
    }
  }
  const float top = Greatest(storage.greatest).Reduce(most, greater);
  if (threadIdx.x == 0) shared_top = top;
  __syncthreads();
  total = Sum(storage.sum).Sum(total > 0 ? total * expf(most - shared_top) : 0);
  if (threadIdx.x == 0) p.exact[static_cast<int64_t>(number) * p.splits + blockIdx.y] = {top, total};
}

// 1 + 1/2 + ... + 1/x, to 1e-9 from x = 8 on.
__device__ double harmonic(int32_t x) {
  const double r = 1.0 / x;
  return 0.57721566490153286 - log(r) + r / 2 - r * r / 12 + r * r * r * r / 120;
}

// max(0, a / x + b), a >= 0, for x > begin.
struct Tail {
  int32_t begin;
  double a = 0, b = 0, harmonic_begin;

  __device__ explicit Tail(int32_t first) : begin(first), harmonic_begin(harmonic(first)) {}
  __device__ double sum_to(int32_t x) const {
    if (b < 0) x = static_cast<int32_t>(fmin(static_cast<double>(x), floor(-a / b)));
    return x <= begin ? 0.0 : a * (harmonic(x) - harmonic_begin) + b * (x - begin);
  }
};

/// Weights of what was scored: of the rows read anyway, the peak and the two windows.
struct Sums {
  double exact = 0, peak = 0, near = 0, far = 0;

  __device__ Sums operator+(const Sums& o) const {
    return {exact + o.exact, peak + o.peak, near + o.near, far + o.far};
  }
};

struct ChooseShared {
  union {
    typename cub::BlockReduce<float, kChooseThreads>::TempStorage greatest;
    typename cub::BlockReduce<Sums, kChooseThreads>::TempStorage sums;
    typename cub::BlockScan<double, kChooseThreads>::TempStorage scan;
  };
  float max;
  Sums all;
  int32_t wanted;
};

// How many tokens of its order one query head reads; the same for each thread of its block.
__device__ int32_t wanted_by_fit(const RankParams& p, int number, int pair, int32_t n, ChooseShared& shared) {
  const int thread = threadIdx.x;
  const Probes probes(n);
  const int32_t count = probes.count(), peak = probes.peak;
  const float* scores = p.probes + static_cast<int64_t>(number) * p.max_probes;
  const PartialSoftmax* exact = p.exact + static_cast<int64_t>(number) * p.splits;
  if (thread == 0) atomicAdd(p.probed + pair, count);
  float max = -INFINITY;
  for (int i = thread; i < p.splits; i += kChooseThreads) max = greater(exact[i].max, max);
  for (int i = thread; i < count; i += kChooseThreads) max = greater(scores[i], max);
  max = cub::BlockReduce<float, kChooseThreads>(shared.greatest).Reduce(max, greater);
  if (thread == 0) {
    shared.max = max;
    shared.wanted = n + 1;
  }
  __syncthreads();
  max = shared.max;
  if (!isfinite(max)) return n;
  const auto weight = [&](int32_t i) { return expf(scores[i] - max); };
  Sums sums;
  for (int i = thread; i < p.splits; i += kChooseThreads)
    sums.exact += exact[i].sum > 0 ? exact[i].sum * expf(exact[i].max - max) : 0;
  // Each thread has a run of the peak, which it walks through when the target lies there.
  const int32_t share = (peak + kChooseThreads - 1) / kChooseThreads, begin = min(peak, thread * share),
                end = min(peak, begin + share);
  for (int i = begin; i < end; ++i) sums.peak += weight(i);
  for (int i = peak + thread; i < count; i += kChooseThreads)
    (i < peak + probes.width ? sums.near : sums.far) += weight(i);
  const double own = sums.peak;
  sums = cub::BlockReduce<Sums, kChooseThreads>(shared.sums).Reduce(sums, [](const Sums& a, const Sums& b) {
    return a + b;
  });
  if (thread == 0) shared.all = sums;
  __syncthreads();
  sums = shared.all;
  Tail tail(peak);
  if (peak < count) {
    const double width = probes.width, middle = (width + 1) / 2, x1 = probes.near + middle, x2 = probes.far + middle;
    const double y1 = sums.near / width, y2 = sums.far / width;
    tail.a = y2 > y1 ? 0 : (y1 - y2) / (1 / x1 - 1 / x2);
    tail.b = y2 > y1 ? (y1 + y2) / 2 : y1 - tail.a / x1;
  }
  const double target = p.target_mass * (sums.exact + sums.peak + tail.sum_to(n));
  if (sums.exact >= target) return 0;
  double mass;
  cub::BlockScan<double, kChooseThreads>(shared.scan).ExclusiveSum(own, mass);
  mass += sums.exact;
  if (mass + own >= target) {
    int32_t i = begin;
    for (; i < end && mass < target; ++i) mass += weight(i);
    if (i > begin) atomicMin(&shared.wanted, i);
  }
  __syncthreads();
  if (shared.wanted <= n) return shared.wanted;
  int32_t low = peak, high = n;  // the target lies in (low, high]: each thread asks for one place in there
  while (high - low > 1) {
    const int32_t step = (high - low + kChooseThreads - 1) / kChooseThreads, x = low + (thread + 1) * step;
    const bool below = x < high && sums.exact + sums.peak + tail.sum_to(x) < target;
    low += __syncthreads_count(below) * step;
    high = min(high, low + step);
  }
  return high;
}

__global__ void __launch_bounds__(kChooseThreads) choose_kernel(const __grid_constant__ RankParams p) {
  __shared__ ChooseShared shared;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int number = blockIdx.x;
  const RankedHead head(p, number);
  const OrderTotals totals = p.totals[number];
  const int32_t wanted =
      is_fitted(p, totals.tokens) ? wanted_by_fit(p, number, head.pair, totals.tokens, shared) : totals.tokens;
  head.take(wanted, totals.clusters, kChooseThreads);
}

}  // namespace

void launch_fit(const RankParams& params, const DeviceFacts& device, cudaStream_t stream) {
  const auto heads = static_cast<unsigned>(params.batch.num_sequences * params.batch.num_q_heads);
  dispatch_type(params.batch, [&]<DType kDType>() {
    dispatch_dim(params.batch, [&]<int kDim>() {
      const dim3 grid(heads, static_cast<unsigned>(params.splits));
      launch_dependent(probe_kernel<kDType, kDim>, params, grid, kProbeThreads, device, stream, "probe");
    });
  });
  launch_dependent(choose_kernel, params, heads, kChooseThreads, device, stream, "choose");
}

}  // namespace tactic::cuda
