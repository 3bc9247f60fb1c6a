// Dense decode attention: every row, or every row of a list, exact up to rounding. The rows of a
// (sequence, KV head) are shared by several blocks; the last one to finish folds their partial outputs, always in the
// same order.
#include "cuda/launch.h"
#include "cuda/merge.cuh"
#include "cuda/row_checks.cuh"

namespace tactic::cuda {

namespace {

template <int kDim, int kHeads>
struct DenseShared {
  float q[kHeads * kDim];
  float values[kWarps * kHeads * value_stride(kDim)];
  float2 states[kWarps][kHeads];
  BlockSums sums[kWarps][kHeads];
  int last;
};

/// What is read: every row, those of a list, or those of a list each of which is looked at, whether it is the one that
/// was clustered.
enum class Reads { kAll, kList, kCheckedList };

template <DType kDType, int kDim, int kHeads, Reads kReads>
__global__ void __launch_bounds__(kThreads, 1) dense_kernel(const __grid_constant__ DenseParams p) {
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<DenseShared<kDim, kHeads>*>(memory);
  constexpr bool kListed = kReads != Reads::kAll, kChecked = kReads == Reads::kCheckedList;
  wait_for_previous_kernel();
  const DecodeBatch& b = p.batch;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, split = blockIdx.x % p.splits;
  const int64_t pair = blockIdx.x / p.splits;
  const int sequence = static_cast<int>(pair) / b.num_kv_heads, head = static_cast<int>(pair) % b.num_kv_heads;
  if (kReads == Reads::kAll && p.changed != nullptr && p.changed[pair] == 0) return;
  const int group = b.num_q_heads / b.num_kv_heads,
            kv_len = kListed ? __ldg(p.counts + pair) : __ldg(b.kv_lens + sequence);
  const int64_t first_head = static_cast<int64_t>(sequence) * b.num_q_heads + head * group;
  for (int i = threadIdx.x; i < group * kDim; i += kThreads)
    shared.q[i] = load_query(b.q, b.q_dtype, first_head * kDim + i);
  __syncthreads();
  QueryFragments<kDim> fragments;
  make_query_fragments<Chunk<kDType>::kBf16, kDim>(shared.q, group, fragments);
  const int32_t* pages = pages_of(b, sequence);
  const std::byte *k = rows_of(b.k, pages, sequence, head), *v = rows_of(b.v, pages, sequence, head);

  // A block has every splits-th run of 16 rows a warp: neighbouring blocks read neighbouring memory.
  AttendState<kDim> state;
  const float scale = b.sm_scale * kLog2E * head_scale<kDType>(b.k, head);
  const int tiles = (kv_len + 15) / 16, step = p.splits * kWarps;
  const int first_checked = kChecked ? __ldg(p.exact_counts + pair) : 0;
  const uint8_t* checks = p.row_checks + pair * p.max_checks;
  const auto row_at = [&](int tile) {
    const int at = min(tile * 16 + (lane & 15), kv_len - 1);
    return kListed ? __ldg(p.rows + pair * p.max_rows + at) : at;
  };
  const auto tile_of_rows = [&](int tile, int row) {
    return RowTile{row_offset(b.k, pages, row), row_offset(b.v, pages, row),
                   tile * 16 + (lane & 15) < kv_len ? 0.0f : kLowest};
  };
  bool changed = false;
  uint4 low[QueryFragments<kDim>::kLoads], high[QueryFragments<kDim>::kLoads], values[AttendState<kDim>::kParts][4];
  int tile = split * kWarps + warp;
  int row = 0;
  RowTile now{};
  if (tile < tiles) {
    row = row_at(tile);
    now = tile_of_rows(tile, row);
    load_keys<kDType, kDim>(k, now, low, high);
  }
  for (; tile < tiles; tile += step) {
    load_values<kDType, kDim>(v, now, values);
    if (kChecked && min(tile * 16 + (lane & 15), kv_len - 1) >= first_checked)
      changed |= row_changed<kDType, kDim>(checks, row, k, v, now) != 0;
    float x[4];
    score_rows<kDType, kDim, false>(fragments, low, high, scale, x);
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] += shuffle(now.log_weight, row_in_tile(lane & 3, j));
    if (tile + step < tiles) {
      row = row_at(tile + step);
      now = tile_of_rows(tile + step, row);
      load_keys<kDType, kDim>(k, now, low, high);
    }
    raise_max(state, x);
    float weights[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      weights[j] = exp2_fast(x[j] - state.max);
      state.sum += weights[j];
    }
    add_values<Chunk<kDType>::kBf16, kDim>(state, values, weights);
  }

  if (kChecked && changed) p.changed[pair] = 1;
  let_next_kernel_start();
  const int g = lane >> 2, t = lane & 3;
  if (t == 0 && g < kHeads) shared.states[warp][g] = {state.max, 0};
  __syncthreads();
  float maximum = kLowest;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, shared.states[w][g % kHeads].x);
  store_warp<kDim, kHeads>(state, maximum, shared.values + warp * kHeads * value_stride(kDim), shared.sums[warp]);
  __syncthreads();
  const int total = group * kDim;
  const int64_t slot = pair * p.splits + split;
  for (int i = threadIdx.x; i < total; i += kThreads) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.values[(w * kHeads + i / kDim) * value_stride(kDim) + i % kDim];
    p.partial_out[slot * total + i] = sum;
  }
  if (warp == 0 && t == 0 && g < group) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += shared.sums[w][g].sum;
    p.partial_state[(slot * group + g) * 2] = maximum;
    p.partial_state[(slot * group + g) * 2 + 1] = sum;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) shared.last = atomicAdd(p.arrived + pair, 1) == static_cast<uint32_t>(p.splits - 1);
  __syncthreads();
  if (shared.last == 0) return;
  __threadfence();
  if (threadIdx.x == 0) p.arrived[pair] = 0;
  if (!kListed && p.records != nullptr && threadIdx.x == 0) {
    StepRecord record{};
    if (p.changed != nullptr) record = p.records[pair];
    record.kv_len = record.tokens_exact = kv_len;
    record.tokens_selected = 0;
    record.certain_mass = 1;
    record.dense = p.changed != nullptr ? DenseReason::kRowChanged : DenseReason::kAsked;
    p.records[pair] = record;
  }
  for (int i = threadIdx.x; i < total; i += kThreads) {
    const int h = i / kDim;
    const float* states = p.partial_state + (pair * p.splits * group + h) * 2;
    float top = kLowest, sum = 0, value = 0;
#pragma unroll 8
    for (int s = 0; s < p.splits; ++s) top = fmaxf(top, __ldcg(states + s * group * 2));
#pragma unroll 8
    for (int s = 0; s < p.splits; ++s) {
      const float factor = exp2_fast(__ldcg(states + s * group * 2) - top);
      sum += factor * __ldcg(states + s * group * 2 + 1);
      value += factor * __ldcg(p.partial_out + (pair * p.splits + s) * total + i);
    }
    store_output(b.out, b.q_dtype, first_head * kDim + i,
                 kv_len > 0 ? head_scale<kDType>(b.v, head) * value / sum : 0.0f);
    if (b.lse != nullptr && i % kDim == 0) b.lse[first_head + h] = kv_len > 0 ? (top + log2f(sum)) * kLn2 : -INFINITY;
  }
}

template <DType kDType, int kDim, int kHeads>
void launch(const DenseParams& params, const DeviceFacts& device, cudaStream_t stream) {
  const auto kernel = params.rows == nullptr         ? dense_kernel<kDType, kDim, kHeads, Reads::kAll>
                      : params.row_checks == nullptr ? dense_kernel<kDType, kDim, kHeads, Reads::kList>
                                                     : dense_kernel<kDType, kDim, kHeads, Reads::kCheckedList>;
  launch_step(kernel, params, sizeof(DenseShared<kDim, kHeads>), 1, device, stream, "dense");
}

}  // namespace

void launch_dense(const DenseParams& params, const DeviceFacts& device, cudaStream_t stream) {
  dispatch(params.batch,
           [&]<DType kDType, int kDim, int kHeads>() { launch<kDType, kDim, kHeads>(params, device, stream); });
}

}  // namespace tactic::cuda
