// cluster: k-means over the keys of a segment and KV head, one block each: the same initial keys, outliers and tie
// rules as on the CPU. Sums are taken in a fixed order, so that the same rows give the same bits.
#include "cuda/centroid_tile.h"
#include "cuda/cluster_memory.cuh"
#include "cuda/launch.h"
#include "cuda/rows.cuh"

namespace tactic::cuda {

namespace {

template <DType kDType, int kDim, int kDims>
class SegmentClustering {
 public:
  __device__ SegmentClustering(const ClusterParams& params, std::byte* memory)
      : p(params),
        s(*reinterpret_cast<ClusterShared<kDim, kDims>*>(memory)),
        head(blockIdx.y),
        number(params.first_segment + static_cast<int>(blockIdx.x)),
        num_rows(params.provisional ? params.index.geometry.provisional_tokens : params.index.geometry.segment_tokens),
        first_row(params.provisional ? params.full_segments * params.index.geometry.segment_tokens + number * num_rows
                                     : number * num_rows),
        slot(params.provisional ? params.index.geometry.max_segments + number : number),
        scratch(params.scratch + static_cast<int64_t>(blockIdx.y * gridDim.x + blockIdx.x) * params.scratch_floats,
                num_rows, params.num_clusters, kDim) {
    const DecodeBatch& b = p.batch;
    pages = pages_of(b, p.sequence);
    k = rows_of(b.k, pages, p.sequence, head);
    v = rows_of(b.v, pages, p.sequence, head);
    row_of_head = static_cast<int64_t>(p.sequence) * b.num_kv_heads + head;
    k_scale = head_scale<kDType>(b.k, head);
  }

  __device__ void run() {
    norms();
    choose_rows();
    mean();
    start();
    for (int round = 0; round < p.iterations; ++round) {
      assign();
      sort();
      update();
    }
    assign();
    sort();
    store();
  }

 private:
  // Eight elements of a key of the segment.
  __device__ void decode_key(int32_t row, int chunk, float (&x)[8]) const {
    load_floats<kDType>(key(row), chunk, x);
    if constexpr (kDType == DType::kF8E4M3) {
#pragma unroll
      for (float& e : x) e *= k_scale;
    }
  }
  __device__ const std::byte* key(int32_t row) const { return k + row_offset(p.batch.k, pages, first_row + row); }
  __device__ const std::byte* value(int32_t row) const { return v + row_offset(p.batch.v, pages, first_row + row); }

  __device__ void norms() {
    for (int row = threadIdx.x; row < num_rows; row += kClusterThreads) {
      float k2 = 0, v2 = 0, x[8];
      for (int chunk = 0; chunk < kDim / 8; ++chunk) {
        decode_key(row, chunk, x);
        for (const float e : x) k2 += e * e;
        load_floats<kDType>(value(row), chunk, x);
        for (const float e : x) v2 += e * e;
      }
      const bool finite = isfinite(k2) && isfinite(v2);
      scratch.k_norms2[row] = finite ? k2 : INFINITY;
      scratch.v_norms2[row] = finite ? v2 : INFINITY;
      // nearest: marks until the rows are chosen. 1: not finite, 2: sinks, which are in no segment, 4 and 8: outliers.
      scratch.nearest[row] = finite ? 0 : 1;
      if (first_row + row < p.index.geometry.sink_tokens) scratch.nearest[row] = 2;
    }
    __syncthreads();
  }

  // Index of the extreme value among rows [0, n) for which value() is finite; ties: the lower. -1: none.
  template <class Value>
  __device__ int32_t least(int32_t n, Value value) {
    float best = INFINITY;
    int32_t at = -1;
    for (int i = threadIdx.x; i < n; i += kClusterThreads) {
      const float x = value(i);
      if (x < best) best = x, at = i;
    }
    s.reduce[threadIdx.x] = best;
    s.reduce_index[threadIdx.x] = at;
    __syncthreads();
    for (int step = kClusterThreads / 2; step > 0; step /= 2) {
      if (threadIdx.x < step) {
        const float other = s.reduce[threadIdx.x + step];
        const int32_t other_at = s.reduce_index[threadIdx.x + step];
        if (other < s.reduce[threadIdx.x] ||
            (other == s.reduce[threadIdx.x] &&
             static_cast<uint32_t>(other_at) < static_cast<uint32_t>(s.reduce_index[threadIdx.x]))) {
          s.reduce[threadIdx.x] = other;
          s.reduce_index[threadIdx.x] = other_at;
        }
      }
      __syncthreads();
    }
    const int32_t found = s.reduce_index[0];
    __syncthreads();
    return found;
  }

  __device__ void choose_rows() {
    for (const float* norms2 : {scratch.k_norms2, scratch.v_norms2}) {
      for (int i = 0; i < p.num_outliers; ++i) {
        // Marked ones of this pass count again for neither; those of the other list may be found anew, as on the CPU.
        const int32_t bit = norms2 == scratch.k_norms2 ? 4 : 8;
        const int32_t at =
            least(num_rows, [&](int row) { return (scratch.nearest[row] & (bit | 2)) == 0 ? norms2[row] : INFINITY; });
        if (at < 0) break;
        if (threadIdx.x == 0) scratch.nearest[at] |= bit;
        __syncthreads();
      }
    }
    // Kept rows, outliers and rows that are not finite, ascending, by one warp.
    uint16_t* members = p.index.members + row_of_head * p.index.geometry.max_rows + first_row;
    if (threadIdx.x < 32) {
      int32_t kept = 0, outliers = 0, unclustered = 0;
      for (int pass = 0; pass < 2; ++pass) {
        int32_t outliers_before = 0, unclustered_before = 0;
        for (int base = 0; base < num_rows; base += 32) {
          const int row = base + threadIdx.x;
          const int mark = row < num_rows ? scratch.nearest[row] : 2;
          const bool is_sink = (mark & 2) != 0, is_unclustered = !is_sink && (mark & 1) != 0,
                     is_outlier = !is_sink && !is_unclustered && mark != 0;
          const uint32_t keeps = __ballot_sync(kAllLanes, mark == 0), outs = __ballot_sync(kAllLanes, is_outlier),
                         rest = __ballot_sync(kAllLanes, is_unclustered);
          const uint32_t below = (1u << threadIdx.x) - 1;
          if (pass == 0) {
            if (mark == 0) scratch.rows[kept + __popc(keeps & below)] = row;
            kept += __popc(keeps);
            outliers += __popc(outs);
            unclustered += __popc(rest);
          } else {
            if (is_outlier) members[kept + outliers_before + __popc(outs & below)] = static_cast<uint16_t>(row);
            if (is_unclustered)
              members[num_rows - unclustered + unclustered_before + __popc(rest & below)] = static_cast<uint16_t>(row);
            outliers_before += __popc(outs);
            unclustered_before += __popc(rest);
          }
        }
      }
      if (threadIdx.x == 0) {
        s.num_kept = kept;
        s.num_outliers = outliers;
        s.num_not_finite = unclustered;
      }
    }
    __syncthreads();
    n = s.num_kept;
    num_means = p.num_clusters - s.num_outliers;
  }

  __device__ void mean() {
    // Each thread sums every 256 / chunks-th row of its chunk of eight dimensions; then the parts, in order.
    constexpr int kChunks = kDim / 8, kLanes = kClusterThreads / 32;
    float* parts = &s.x[0][0];  // [kLanes, kDim]
    const int lane = threadIdx.x / 32;
    for (int chunk = threadIdx.x % 32; chunk < kChunks; chunk += 32) {
      float sum[8] = {}, x[8];
      for (int i = lane; i < n; i += kLanes) {
        decode_key(scratch.rows[i], chunk, x);
        for (int j = 0; j < 8; ++j) sum[j] += x[j];
      }
      for (int j = 0; j < 8; ++j) parts[lane * kDim + chunk * 8 + j] = sum[j];
    }
    __syncthreads();
    for (int d = threadIdx.x; d < kDim; d += kClusterThreads) {
      float sum = 0;
      for (int i = 0; i < kLanes; ++i) sum += parts[i * kDim + d];
      s.mean[d] = n > 0 ? sum / static_cast<float>(n) : 0;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      float largest = 0;
      for (int d = threadIdx.x; d < kDim; d += 32) largest = fmaxf(largest, fabsf(s.mean[d]));
#pragma unroll
      for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, shuffle_xor(largest, step));
      for (int c = 0; c < padded_clusters(); c += kTileClusters) {
        const TileView tile = tile_of(p.index, row_of_head, first_cluster() + c);
        for (int d = threadIdx.x; d < kDim; d += 32) tile.set_mean(d, s.mean[d], largest);
      }
    }
    for (int i = threadIdx.x; i < n; i += kClusterThreads) {
      float norm2 = 0, x[8];
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        decode_key(scratch.rows[i], chunk, x);
        for (int j = 0; j < 8; ++j) norm2 += (x[j] - s.mean[chunk * 8 + j]) * (x[j] - s.mean[chunk * 8 + j]);
      }
      scratch.k_norms2[i] = norm2;
    }
    __syncthreads();
  }

  __device__ void copy_row(int32_t c, int32_t kept) {
    float x[8];
    for (int chunk = threadIdx.x; chunk < kDim / 8; chunk += kClusterThreads) {
      decode_key(scratch.rows[kept], chunk, x);
      for (int j = 0; j < 8; ++j) scratch.centroids[c * kDim + chunk * 8 + j] = x[j] - s.mean[chunk * 8 + j];
    }
  }

  __device__ void start() {
    const uint64_t seed = p.seed + static_cast<uint64_t>(first_row) * 31 + static_cast<uint64_t>(head);
    for (int i = threadIdx.x; i < num_means * (kDim / 8); i += kClusterThreads) {
      const int c = i / (kDim / 8), chunk = i % (kDim / 8);
      const double u = static_cast<double>(hash64(seed ^ hash64(static_cast<uint64_t>(c))) >> 11) * 0x1p-53;
      const auto row = static_cast<int64_t>((c + u) * static_cast<double>(n) / num_means);
      float x[8] = {};
      if (n > 0) decode_key(scratch.rows[min(static_cast<int64_t>(n - 1), row)], chunk, x);
      for (int j = 0; j < 8; ++j)
        scratch.centroids[c * kDim + chunk * 8 + j] = n > 0 ? x[j] - s.mean[chunk * 8 + j] : 0;
    }
    __syncthreads();
  }

  // Tiles of clusters from c0 on and of kept rows from i0 on, in dimensions from d0 on.
  __device__ void load_centroids(int c0, int d0) {
    for (int i = threadIdx.x; i < kClusterTile * kDims; i += kClusterThreads) {
      const int c = i / kDims, d = i % kDims;
      s.c[d][c] = c0 + c < num_means ? scratch.centroids[static_cast<int64_t>(c0 + c) * kDim + d0 + d] : 0;
    }
  }
  __device__ void load_keys(int i0, int d0) {
    for (int i = threadIdx.x; i < kRowTile * (kDims / 8); i += kClusterThreads) {
      const int row = i % kRowTile, chunk = i / kRowTile;
      float x[8] = {};
      if (i0 + row < n) decode_key(scratch.rows[i0 + row], d0 / 8 + chunk, x);
      for (int j = 0; j < 8; ++j) s.x[chunk * 8 + j][row] = x[j] - s.mean[d0 + chunk * 8 + j];
    }
  }
  // A warp a centroid, of those from c0 on.
  __device__ void centroid_norms(int c0) {
    const int lane = threadIdx.x % 32;
    for (int c = threadIdx.x / 32; c < kClusterTile; c += kClusterThreads / 32) {
      float norm2 = 0;
      for (int d = lane; d < kDim && c0 + c < num_means; d += 32) {
        const float x = scratch.centroids[static_cast<int64_t>(c0 + c) * kDim + d];
        norm2 += x * x;
      }
      norm2 = warp_sum(norm2);
      if (lane == 0) s.c_norms2[c] = c0 + c < num_means ? norm2 : INFINITY;
    }
  }

  // nearest[i], and v_norms2[i] = |c|^2 - 2 x.c of it.
  __device__ void assign() {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    for (int c0 = 0; c0 < num_means; c0 += kClusterTile) {
      centroid_norms(c0);
      for (int i0 = 0; i0 < n; i0 += kRowTile) {
        float dots[4][8] = {};
        for (int d0 = 0; d0 < kDim; d0 += kDims) {
          __syncthreads();
          if (i0 == 0 || kDims < kDim) load_centroids(c0, d0);
          load_keys(i0, d0);
          __syncthreads();
#pragma unroll 8
          for (int d = 0; d < kDims; ++d) {
            const float4 x = *reinterpret_cast<const float4*>(&s.x[d][ty * 4]);
            const float4 a = *reinterpret_cast<const float4*>(&s.c[d][tx * 4]),
                         b = *reinterpret_cast<const float4*>(&s.c[d][64 + tx * 4]);
            const float xs[4] = {x.x, x.y, x.z, x.w}, cs[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
            for (int r = 0; r < 4; ++r) {
#pragma unroll
              for (int c = 0; c < 8; ++c) dots[r][c] += xs[r] * cs[c];
            }
          }
        }
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float best = INFINITY;
          int32_t at = 0;
#pragma unroll
          for (int c = 0; c < 8; ++c) {
            const int local = (c / 4) * 64 + tx * 4 + c % 4;
            const float distance = s.c_norms2[local] - 2 * dots[r][c];
            if (distance < best) best = distance, at = c0 + local;
          }
#pragma unroll
          for (int step = 1; step < 16; step *= 2) {
            const float other = shuffle_xor(best, step);
            const int32_t other_at = shuffle_xor(at, step);
            if (other < best || (other == best && other_at < at)) best = other, at = other_at;
          }
          const int i = i0 + ty * 4 + r;
          if (tx == 0 && i < n && (c0 == 0 || best < scratch.v_norms2[i])) {
            scratch.v_norms2[i] = best;
            scratch.nearest[i] = at;
          }
        }
      }
      __syncthreads();
    }
  }

  // Kept rows cluster by cluster, ascending inside: thread t counts and places clusters t, t + 256, ...
  __device__ void sort() {
    for (int c = threadIdx.x; c <= num_means; c += kClusterThreads) scratch.starts[c] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kClusterThreads) atomicAdd(&scratch.starts[scratch.nearest[i] + 1], 1);
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int c = 0; c < num_means; ++c) scratch.starts[c + 1] += scratch.starts[c];
    }
    __syncthreads();
    // One warp a cluster: ballots over all rows keep the order.
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int c = warp; c < num_means; c += kClusterThreads / 32) {
      int32_t at = scratch.starts[c];
      const int32_t end = scratch.starts[c + 1];
      for (int base = 0; base < n && at < end; base += 32) {
        const bool mine = base + lane < n && scratch.nearest[base + lane] == c;
        const uint32_t all = __ballot_sync(kAllLanes, mine);
        if (mine) scratch.order[at + __popc(all & ((1u << lane) - 1))] = base + lane;
        at += __popc(all);
      }
    }
    __syncthreads();
  }

  __device__ void update() {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int c = warp; c < num_means; c += kClusterThreads / 32) {
      const int32_t begin = scratch.starts[c], end = scratch.starts[c + 1];
      if (begin == end) continue;
      for (int chunk = lane; chunk < kDim / 8; chunk += 32) {
        float sum[8] = {}, x[8];
        for (int i = begin; i < end; ++i) {
          decode_key(scratch.rows[scratch.order[i]], chunk, x);
          for (int j = 0; j < 8; ++j) sum[j] += x[j] - s.mean[chunk * 8 + j];
        }
        for (int j = 0; j < 8; ++j)
          scratch.centroids[static_cast<int64_t>(c) * kDim + chunk * 8 + j] = sum[j] / static_cast<float>(end - begin);
      }
    }
    __syncthreads();
    for (int c = 0; c < num_means; ++c) {  // empty ones start anew at the rows farthest from their centroids
      if (scratch.starts[c] != scratch.starts[c + 1]) continue;
      const int32_t far = least(n, [&](int i) { return -(scratch.k_norms2[i] + scratch.v_norms2[i]); });
      if (far < 0) break;
      copy_row(c, far);
      if (threadIdx.x == 0) scratch.v_norms2[far] = -INFINITY;  // used once
      __syncthreads();
    }
  }

  __device__ void store() {
    const IndexView& index = p.index;
    const IndexGeometry& g = index.geometry;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint16_t* members = index.members + row_of_head * g.max_rows + first_row;
    for (int c = warp; c < padded_clusters(); c += kClusterThreads / 32) {
      const bool is_mean = c < num_means, is_outlier = !is_mean && c < p.num_clusters;
      const int32_t begin = is_mean      ? scratch.starts[c]
                            : is_outlier ? n + c - num_means
                                         : 0,
                    size = is_mean      ? scratch.starts[c + 1] - begin
                           : is_outlier ? 1
                                        : 0;
      float* centroid = scratch.centroids + static_cast<int64_t>(c) * kDim;
      const auto row_of = [&](int32_t i) { return is_outlier ? members[i] : scratch.rows[scratch.order[i]]; };
      for (int chunk = lane; chunk < kDim / 8 && is_outlier; chunk += 32) {
        float x[8];
        decode_key(members[begin], chunk, x);
        for (int j = 0; j < 8; ++j) centroid[chunk * 8 + j] = x[j] - s.mean[chunk * 8 + j];
      }
      __syncwarp();
      float largest = 0;
      for (int d = lane; d < kDim && size > 0; d += 32) largest = fmaxf(largest, fabsf(centroid[d]));
#pragma unroll
      for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, shuffle_xor(largest, step));
      const float scale = largest / 127;
      const TileView tile = tile_of(index, row_of_head, first_cluster() + c);
      for (int d = lane; d < g.code_bytes; d += 32)
        tile.code(c, d) = d < kDim && scale > 0 ? static_cast<int8_t>(rintf(centroid[d] / scale)) : 0;
      __syncwarp();
      float spread = 0;
      for (int chunk = lane; chunk < kDim / 8; chunk += 32) {
        float x[8];
        for (int i = begin; i < begin + size; ++i) {
          decode_key(row_of(i), chunk, x);
          for (int j = 0; j < 8; ++j) {
            const float off = x[j] - s.mean[chunk * 8 + j] - scale * tile.code(c, chunk * 8 + j);
            spread += off * off;
          }
        }
      }
      spread = warp_sum(spread);
      if (lane == 0) {
        tile.facts(c) = {size > 0 ? scale : 0.0f, size > 0 ? spread / static_cast<float>(size) / kDim : 0.0f};
        tile.place(c) = static_cast<uint32_t>(begin) << 16 | static_cast<uint32_t>(size);
      }
      for (int i = begin + lane; i < begin + size && is_mean; i += 32) members[i] = static_cast<uint16_t>(row_of(i));
    }
    constexpr int kBytes = stored_bytes<kDType>(kDim);
    const int32_t sinks = max(0, min(g.sink_tokens - first_row, num_rows));
    for (int row = sinks + threadIdx.x; row < num_rows; row += kClusterThreads) {
      index.row_checks[row_of_head * g.max_rows + first_row + row] = static_cast<uint8_t>(
          check_row(key(row), kBytes, first_row + row) | check_row(value(row), kBytes, first_row + row) << 4);
    }
    if (threadIdx.x == 0) {
      index.num_not_finite[row_of_head * g.all_segments + slot] = static_cast<uint16_t>(s.num_not_finite);
      if (s.num_not_finite > 0) atomicOr(&index.any_not_finite[p.sequence], 1);
    }
  }

  __device__ int32_t padded_clusters() const {
    return p.provisional ? p.index.geometry.provisional_clusters : p.index.geometry.full_clusters;
  }
  // Of the segment, among the sequence's; a multiple of 16.
  __device__ int32_t first_cluster() const {
    return (p.provisional ? p.index.geometry.provisional_begin : 0) + number * padded_clusters();
  }

  const ClusterParams& p;
  ClusterShared<kDim, kDims>& s;
  const int head, number;
  const int32_t num_rows, first_row, slot;
  const Scratch scratch;
  const int32_t* pages;
  const std::byte *k, *v;
  int64_t row_of_head;
  float k_scale;                 // of what is stored
  int32_t n = 0, num_means = 0;  // rows and clusters of k-means
};

template <DType kDType, int kDim, int kDims>
__global__ void __launch_bounds__(kClusterThreads) cluster_kernel(const __grid_constant__ ClusterParams params) {
  extern __shared__ __align__(16) std::byte shared[];
  SegmentClustering<kDType, kDim, kDims>(params, shared).run();
}

}  // namespace

size_t cluster_shared_bytes(int32_t head_dim) {
  return head_dim == 64    ? sizeof(ClusterShared<64, small_dims(64)>)
         : head_dim == 80  ? sizeof(ClusterShared<80, small_dims(80)>)
         : head_dim == 96  ? sizeof(ClusterShared<96, small_dims(96)>)
         : head_dim == 128 ? sizeof(ClusterShared<128, small_dims(128)>)
                           : sizeof(ClusterShared<256, small_dims(256)>);
}

size_t cluster_scratch_bytes(int32_t rows, int32_t clusters, int32_t head_dim) {
  return (static_cast<size_t>(clusters) * head_dim + 5 * static_cast<size_t>(rows) + clusters + 1 + 31) / 32 * 128;
}

void launch_cluster(const ClusterParams& params, const DeviceFacts& device, cudaStream_t stream) {
  if (params.num_segments == 0) return;
  const auto launch = [&]<DType kDType, int kDim, int kDims>() {
    const auto kernel = cluster_kernel<kDType, kDim, kDims>;
    constexpr size_t kBytes = sizeof(ClusterShared<kDim, kDims>);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kBytes)),
          "shared memory of cluster");
    const dim3 grid(static_cast<unsigned>(params.num_segments), static_cast<unsigned>(params.batch.num_kv_heads));
    kernel<<<grid, kClusterThreads, kBytes, stream>>>(params);
    check(cudaGetLastError(), "cluster");
  };
  dispatch(params.batch, [&]<DType kDType, int kDim, int kHeads>() {
    if (sizeof(ClusterShared<kDim, kDim>) <= device.shared_bytes_per_block) {
      launch.template operator()<kDType, kDim, kDim>();
    } else {
      launch.template operator()<kDType, kDim, small_dims(kDim)>();
    }
  });
}

}  // namespace tactic::cuda
