// One block's part of a sparse decode step: score, select_sample, attend, refine, merge. A thread-block cluster has one
// sequence and KV head; its blocks own its segments in turn and exchange softmax states and partial outputs through
// shared memory.
#pragma once

#include "cuda/mean_keys.cuh"
#include "cuda/merge.cuh"
#include "cuda/select_sample.cuh"

namespace tactic::cuda {

/// kChecked: rows are compared with their check values.
template <DType kDType, int kDim, int kHeads, bool kChecked>
class DecodeBlock {
 public:
  __device__ DecodeBlock(const DecodeParams& params, std::byte* shared)
      : p(params),
        rank(static_cast<int>(blockIdx.x) % params.splits),
        warp(threadIdx.x >> 5),
        lane(threadIdx.x & 31),
        sequence(static_cast<int>(blockIdx.x) / params.splits / params.batch.num_kv_heads),
        head(static_cast<int>(blockIdx.x) / params.splits % params.batch.num_kv_heads),
        group(params.batch.num_q_heads / params.batch.num_kv_heads),
        state_of_sequence(params.index.states[sequence]),
        own(params.index.geometry, state_of_sequence, rank, params.splits),
        buffers(*reinterpret_cast<MergeBuffers<kHeads>*>(shared)),
        quantized(*reinterpret_cast<QuantizedQueries<kDim, kHeads>*>(shared + sizeof(MergeBuffers<kHeads>))),
        q(reinterpret_cast<float*>(&quantized + 1)),
        values(q + kHeads * kDim),
        from_blocks(values + kWarps * kHeads * kValueStride),
        tables(params.workspace != nullptr
                   ? params.workspace + blockIdx.x * params.block_workspace_bytes
                   : reinterpret_cast<std::byte*>(from_blocks + kHeads * kDim + kMaxSplits * kHeads * 4),
               params.max_own_clusters, params.max_own_segments, kHeads) {
    const DecodeBatch& b = p.batch;
    pages = b.page_tables == nullptr ? nullptr : b.page_tables + static_cast<int64_t>(sequence) * b.max_pages;
    k = static_cast<const std::byte*>(b.k.data) + (pages == nullptr ? sequence * b.k.sequence_stride_bytes : 0) +
        head * b.k.head_stride_bytes;
    v = static_cast<const std::byte*>(b.v.data) + (pages == nullptr ? sequence * b.v.sequence_stride_bytes : 0) +
        head * b.v.head_stride_bytes;
    row_of_head = static_cast<int64_t>(sequence) * b.num_kv_heads + head;
    const IndexGeometry& g = p.index.geometry;
    members = p.index.members + row_of_head * g.max_rows;
    scale = b.sm_scale * kLog2E;
    key_scale = scale * head_scale<kDType>(b.k, head);
    value_scale = head_scale<kDType>(b.v, head);
  }

  __device__ void run() {
    BlockCluster::arrive();
    const int tiles = own.clusters() / 16;
    // What the kernel before this one writes must be waited for; the index was last changed by a copy, which is done.
    CentroidTile<kDim> now, next;
    const int score_warps = num_score_warps(own, p.splits);
    if (warp < score_warps && warp < tiles) load_tile(warp, now);
    if (warp < score_warps && warp + score_warps < tiles) load_tile(warp + score_warps, next);
    MeanKeys<kDim, kHeads> means(p.index, own, row_of_head, warp, score_warps);
    if (warp < score_warps) {
      means.load();
    } else {
      prefetch_outliers(warp - score_warps, kWarps - score_warps);
    }
    means.prefetch_all();
    wait_for_previous_kernel();
    load_queries();
    __syncthreads();
    score_and_attend_exact(score_warps, now, next, means);
    float shifts[kHeads];
    const float limit = exchange_estimates(warp < score_warps, shifts);
    let_next_kernel_start();
    select(shifts);
    const bool heavy = attend_selected(limit);
    raise_block_maximum();
    if (__syncthreads_or(heavy) != 0) {
      refine();
      raise_block_maximum();
      __syncthreads();
    }
    send_output();
    BlockCluster::sync();
    if constexpr (kChecked) {
      changed = any_changed();
      if (changed) start_again();
    }
    write_output();
  }

 private:
  static constexpr int kValueStride = value_stride(kDim);

  __device__ void load_tile(int tile, CentroidTile<kDim>& out) const {
    const IndexGeometry& g = p.index.geometry;
    const int64_t first_cluster = row_of_head * g.max_clusters;
    const OwnSegment segment = own.at(own.segment_of(tile * 16));
    load_centroids<kDim>(p.index.codes + first_cluster * g.code_bytes, p.index.facts + first_cluster,
                         p.index.places + first_cluster, segment.cluster + tile * 16 - segment.local_cluster, out);
  }
  __device__ void load_queries() {
    kv_len = p.batch.kv_lens[sequence];
    const int64_t first = (static_cast<int64_t>(sequence) * p.batch.num_q_heads + head * group) * kDim;
    for (int i = threadIdx.x; i < group * kDim; i += kThreads) q[i] = load_query(p.batch.q, p.batch.q_dtype, first + i);
    if (threadIdx.x < kCounts) buffers.counts[threadIdx.x] = 0;
    if (threadIdx.x == kCounts) buffers.found_changed = 0;
    if (threadIdx.x == kThreads - 1) {
      const HeadCalibration& known = p.index.calibration[row_of_head];
      buffers.beta = p.beta > 0 ? p.beta : known.beta;
      buffers.variance_ratio = p.tau > 0 ? 1.0f : known.variance_ratio;
    }
    reset_maxima();
  }
  __device__ void reset_maxima() {
    if (threadIdx.x < kHeads) buffers.maxima[threadIdx.x] = ordered(__float_as_int(kLowest));
  }

  __device__ void score_and_attend_exact(int score_warps, CentroidTile<kDim>& now, CentroidTile<kDim>& next,
                                         MeanKeys<kDim, kHeads>& means) {
    const int tiles = own.clusters() / 16;
    // Fragments are made late: registers are short while tiles of centroids are on their way.
    if (warp >= score_warps) {
      make_query_fragments<Chunk<kDType>::kBf16, kDim>(q, group, fragments);
      attend_exact(warp - score_warps, kWarps - score_warps);
      return;
    }
    for (int h = warp; h < kHeads; h += score_warps)
      quantize_query<kDim, kHeads>(h < group ? q + h * kDim : nullptr, h, quantized);
    means.score(q, group, scale, tables.mean_dots);
    asm volatile("bar.sync 1, %0;" ::"r"(score_warps * 32) : "memory");
    const float weight = beta();
    CentroidQuery<kDim, kHeads> query;
    load_centroid_query<kDim, kHeads>(quantized, p.batch.sm_scale, query);
    const auto score = [&](int tile, const CentroidTile<kDim>& loaded) {
      score_tile<kDim, kHeads>(loaded, query, tables.mean_dots + own.segment_of(tile * 16) * kHeads, weight,
                               tables.exponents + tile * 16, tables.stride, tables.places + tile * 16, estimates);
    };
    for (int tile = warp; tile < tiles; tile += 2 * score_warps) {
      score(tile, now);
      if (tile + 2 * score_warps < tiles) load_tile(tile + 2 * score_warps, now);
      if (tile + score_warps >= tiles) break;
      score(tile + score_warps, next);
      if (tile + 3 * score_warps < tiles) load_tile(tile + 3 * score_warps, next);
    }
    make_query_fragments<Chunk<kDType>::kBf16, kDim>(q, group, fragments);
  }
  __device__ float beta() const { return buffers.beta; }
  __device__ float tau() const { return p.tau > 0 ? p.tau : tau_for_error(p.target_error, buffers.variance_ratio); }
  __device__ RowTile row_tile(int32_t row, float log_weight) const {
    return {row_offset(p.batch.k, pages, row), row_offset(p.batch.v, pages, row), log_weight};
  }

  __device__ ExactRows exact_rows() const { return {p.index.geometry, state_of_sequence, kv_len}; }
  // Rows shared among the blocks and `warps` of each.
  __device__ void attend_shared(int number, int warps, const ExactRows& rows) {
    for (int tile = rank + p.splits * number; tile * 16 < rows.count; tile += p.splits * warps) {
      const int32_t i = tile * 16 + (lane & 15);
      attend_tile<kDType, kDim, false>(state, k, v,
                                       row_tile(rows.row(min(i, rows.count - 1)), i < rows.count ? 0.0f : kLowest),
                                       fragments, key_scale, 0, [] {});
    }
  }
  // Outliers are rows of the index, which no kernel before this one changes: they come to L2 ahead of the queries.
  __device__ void prefetch_outliers(int number, int warps) const {
    if (!p.index.geometry.has_outliers || pages != nullptr) return;
    const uint16_t* num_outliers = p.index.num_outliers + row_of_head * p.index.geometry.all_segments;
    for (int k_own = number; k_own < own.count(); k_own += warps) {
      const OwnSegment segment = own.at(k_own);
      const int32_t n = __ldg(num_outliers + segment.slot);
      if ((lane & 15) >= n) continue;
      prefetch_row(
          row_tile(segment.first_row + __ldg(members + segment.first_row + segment.num_rows - n + (lane & 15)), 0));
    }
  }
  // Two lanes a row, each a half.
  __device__ void prefetch_row(const RowTile& tile) const {
    constexpr int kBytes = kDType == DType::kF8E4M3 ? kDim : 2 * kDim;
    const int half = (lane >> 4) * 128;
    if (half < kBytes) {
      prefetch(k + tile.k_offset + half);
      prefetch(v + tile.v_offset + half);
    }
  }
  // What is read anyway: those that no segment holds, and the outliers of the own segments.
  __device__ void attend_exact(int number, int warps) {
    attend_shared(number, warps, exact_rows());
    const uint16_t* num_outliers = p.index.num_outliers + row_of_head * p.index.geometry.all_segments;
    for (int k_own = number; k_own < own.count(); k_own += warps) {
      const OwnSegment segment = own.at(k_own);
      const int32_t n = __ldg(num_outliers + segment.slot);
      if (lane == 0 && n > 0) atomicAdd(&buffers.counts[kOutliers], n);
      for (int first = 0; first < n; first += 16) {
        const int32_t i = first + (lane & 15);
        const int32_t row =
            segment.first_row + __ldg(members + segment.first_row + segment.num_rows - n + min(i, n - 1));
        attend_tile<kDType, kDim, false>(state, k, v, row_tile(row, i < n ? 0.0f : kLowest), fragments, key_scale, 0,
                                         [] {});
      }
    }
  }

  // The state of what this warp attended to, by head, as the buffers want it.
  __device__ void put_state(float2* heads) const {
    const int g = lane >> 2, t = lane & 3;
    float sum = state.sum;
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    if (t == 0 && g < kHeads) heads[g] = {state.max, sum};
  }

  // shifts[h]: log2 of the estimated sum of all weights of head h, over tau and sqrt(group). Returns, for head g of
  // lane (g, t), log2 of the weight from which on a sampled row refines its cluster.
  __device__ float exchange_estimates(bool scored, float (&shifts)[kHeads]) {
    if (scored) {
#pragma unroll
      for (int set = 0; set < kHeads / 4; ++set) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
          const float max = shuffle_xor(estimates[set].max, step), sum = shuffle_xor(estimates[set].sum, step);
          estimates[set].add(max, sum);
        }
        if (lane < 4) buffers.warp_states[warp][4 * set + lane] = {estimates[set].max, estimates[set].sum};
      }
    } else {
      put_state(buffers.warp_states[warp]);
    }
    __syncthreads();
    BlockCluster::wait();  // all blocks of the cluster run, so that their memory may be written
    share_states(buffers, rank, p.splits);
    BlockCluster::sync();
    const RunningSum total = fold_states<kHeads>(buffers.block_states, p.splits);
    const float normalizer = total.max + log2_fast(total.sum);
    const float rows = tau();
    const float shift = normalizer - log2_fast(rows) + 0.5f * log2_fast(static_cast<float>(group));
#pragma unroll
    for (int h = 0; h < kHeads; ++h) shifts[h] = shuffle(shift, h);
    if (p.facts != nullptr && rank == 0 && warp == 0) {
      if (lane < kHeads) p.facts[row_of_head].shifts[lane] = shift;
      if (lane == 0) {
        p.facts[row_of_head].tau = rows;
        p.facts[row_of_head].beta = beta();
      }
    }
    const int g = lane >> 2;
    const float limit = log2_fast(fmaxf(p.refine, 8.0f / rows)) + shuffle(normalizer, g % kHeads);
    return g < group && p.refine < 1 ? limit : -kLowest;
  }

  __device__ void select(const float (&shifts)[kHeads]) {
    const uint64_t stream_id =
        p.batch.stream_ids != nullptr ? p.batch.stream_ids[sequence] : static_cast<uint64_t>(sequence);
    uint64_t key = p.seed;
    for (const uint64_t part : {stream_id, static_cast<uint64_t>(p.batch.layer), static_cast<uint64_t>(head),
                                static_cast<uint64_t>(kv_len - 1)}) {
      key = key * 0xD6E8FEB86659FD93u + part + 1;
    }
    uint32_t sampled = 0;  // by this lane
    for (int k_own = warp; k_own < own.count(); k_own += kWarps) {
      const OwnSegment segment = own.at(k_own);
      const int32_t taken = select_segment<kHeads>(
          tables, segment, members, segment_offset(hash64(key), segment.first_row), group, shifts, sampled);
      if (lane == 0) tables.segment_counts[k_own] = taken;
    }
    if (p.records != nullptr) {
      sampled = __reduce_add_sync(kAllLanes, sampled);
      if (lane == 0) atomicAdd(&buffers.counts[kSampled], static_cast<int32_t>(sampled));
    }
    for (int i = threadIdx.x; i < own.clusters() / 32 + 1; i += kThreads) tables.refined[i] = 0;
    __syncthreads();
    if (warp == 0) {
      const int32_t taken = count_taken(tables, own.count());
      if (lane == 0) buffers.counts[kSelected] = taken;
    }
    __syncthreads();
  }

  // Returns whether this warp found a sampled row that is too heavy, whose cluster it marked.
  __device__ bool attend_selected(float limit) {
    const int32_t rows = buffers.counts[kSelected];
    bool found = false;
    const auto take = [&](int tile) { return taken_row(tables, own, members, min(tile * 16 + (lane & 15), rows - 1)); };
    const auto tile_of = [&](int tile, const TakenRow& taken) {
      return row_tile(taken.row, tile * 16 + (lane & 15) < rows ? taken.log_weight : kLowest);
    };
    int tile = kWarps - 1 - warp;
    if (tile * 16 >= rows) return false;
    uint32_t mismatches = 0;
    TakenRow taken = take(tile), next{};
    RowTile now = tile_of(tile, taken), then{};
    for (; tile * 16 < rows; tile += kWarps) {
      // While a tile is on its way, the next one is looked up and asked for.
      const auto meanwhile = [&] {
        if constexpr (kChecked)
          mismatches |= mismatch<kDType, kDim>(p.index.row_checks + row_of_head * p.index.geometry.max_rows, taken.row,
                                               k, v, now);
        if ((tile + kWarps) * 16 >= rows) return;
        next = take(tile + kWarps);
        then = tile_of(tile + kWarps, next);
        prefetch_row(then);
      };
      const uint32_t heavy = attend_tile<kDType, kDim, true>(state, k, v, now, fragments, key_scale, limit, meanwhile);
      const uint32_t all = __reduce_or_sync(kAllLanes, heavy);
      if (all != 0) {
        found = true;
        if (lane < 16 && (all >> lane & 1) != 0)
          atomicOr(&tables.refined[taken.local_cluster / 32], 1u << (taken.local_cluster & 31));
      }
      taken = next;
      now = then;
    }
    if (mismatches != 0) buffers.found_changed = 1;
    return found;
  }

  __device__ bool any_changed() const {
    int32_t any = 0;
    for (int s = 0; s < p.splits; ++s) any |= buffers.changed[s];
    return any != 0;
  }
  // A changed row was read, so the index cannot be trusted: every row is read instead.
  __device__ void start_again() {
    BlockCluster::sync();  // all have looked before anything is written anew
    state = {};
    reset_maxima();
    __syncthreads();
    attend_shared(warp, kWarps, {p.index.geometry, SequenceState{}, kv_len});
    raise_block_maximum();
    __syncthreads();
    send_output();
    BlockCluster::sync();
  }

  // Clusters that are marked are read whole. Their tiles are shared among the warps.
  __device__ void refine() {
    const int32_t words = own.clusters() / 32 + 1;
    int number = 0;
    for (int32_t first = 0; first < words; first += 32) {
      const uint32_t word = first + lane < words ? tables.refined[first + lane] : 0;
      for (uint32_t lanes = __ballot_sync(kAllLanes, word != 0); lanes != 0; lanes &= lanes - 1) {
        const int from = __ffs(lanes) - 1;
        for (uint32_t bits = shuffle(word, from); bits != 0; bits &= bits - 1) {
          const int32_t c = (first + from) * 32 + __ffs(bits) - 1;
          if (threadIdx.x == 0) ++buffers.counts[kRefinedClusters];
          for (int32_t at = 0; at < static_cast<int32_t>(tables.places[c] & 0xFFFFu); at += 16) {
            if (number++ % kWarps == warp) read_rest(c, at);
          }
        }
      }
    }
  }

  // Of the 16 members from `at` on, adds those that were not taken and lowers those that were to the weight of certain
  // rows.
  __device__ void read_rest(int32_t c, int32_t at) {
    const OwnSegment segment = own.at(own.segment_of(c));
    const int32_t size = tables.places[c] & 0xFFFFu, first = segment.first_row + (tables.places[c] >> 16);
    const float log_weight = log2_inverse(tables.probabilities[c]);
    const int32_t member = at + (lane & 15);
    const bool inside = member < size, taken = inside && is_taken(tables.begins[c], tables.probabilities[c], member);
    const uint32_t added = __ballot_sync(kAllLanes, inside && !taken) & 0xFFFFu;
    const uint32_t drawn = __ballot_sync(kAllLanes, taken) & 0xFFFFu;
    if (lane == 0) {
      atomicAdd(&buffers.counts[kRefinedRows], __popc(added));
      atomicSub(&buffers.counts[kSampled], __popc(drawn));
    }
    const RowTile tile = row_tile(segment.first_row + __ldg(members + first + min(member, size - 1)), 0);
    attend_rest<kDType, kDim>(state, k, v, tile, inside, taken, log_weight, fragments, key_scale);
  }
  __device__ void raise_block_maximum() {
    const int g = lane >> 2;
    if ((lane & 3) == 0 && g < kHeads) atomicMax(&buffers.maxima[g], ordered(__float_as_int(state.max)));
  }

  // The block's output relative to its own maximum: each block of the cluster gets its slice of it.
  __device__ void send_output() {
    const int g = lane >> 2;
    const float maximum = __int_as_float(ordered(buffers.maxima[g % kHeads]));
    store_warp<kDim, kHeads>(state, maximum, values + warp * kHeads * kValueStride, buffers.warp_sums[warp]);
    __syncthreads();
    const int total = group * kDim, slice = slice_size();
    for (int i = 2 * threadIdx.x; i < total; i += 2 * kThreads) {
      float2 sum{};
      const float* from = values + i / kDim * kValueStride + i % kDim;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float2 x = *reinterpret_cast<const float2*>(from + w * kHeads * kValueStride);
        sum.x += x.x;
        sum.y += x.y;
      }
      const int to = i / slice;
      *reinterpret_cast<float2*>(BlockCluster::in_block(from_blocks + rank * slice + i - to * slice, to)) = sum;
    }
    // The last warps have no outputs to sum.
    for (int i = kThreads - 1 - threadIdx.x; i < kHeads * p.splits; i += kThreads) {
      const int h = i % kHeads;
      BlockSums sums{__int_as_float(ordered(buffers.maxima[h])), 0, 0, 0};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        sums.sum += buffers.warp_sums[w][h].sum;
        sums.sampled += buffers.warp_sums[w][h].sampled;
        sums.variance += buffers.warp_sums[w][h].variance;
      }
      *BlockCluster::in_block(&buffers.block_sums[rank][h], i / kHeads) = sums;
    }
    if (kChecked && threadIdx.x < p.splits)
      *BlockCluster::in_block(&buffers.changed[rank], threadIdx.x) = buffers.found_changed;
    if (p.records != nullptr && threadIdx.x < kCounts) {
      *BlockCluster::in_block(&buffers.block_counts[rank][threadIdx.x], 0) = buffers.counts[threadIdx.x];
    }
  }
  // Outputs that a block of the cluster writes; an even number, as they are summed in pairs.
  __device__ int slice_size() const { return (group * kDim / p.splits + 1) & ~1; }

  __device__ BlockSums sums_of(int h, float (&factors)[kMaxSplits]) const {
    return cluster_sums<kHeads>(buffers, p.splits, h, factors);
  }
  __device__ void write_output() {
    const int total = group * kDim, slice = slice_size();
    const int64_t first = (static_cast<int64_t>(sequence) * p.batch.num_q_heads + head * group);
    for (int i = threadIdx.x; i < slice && rank * slice + i < total; i += kThreads) {
      const int at = rank * slice + i;
      float factors[kMaxSplits];
      const BlockSums sums = sums_of(at / kDim, factors);
      float value = 0;
#pragma unroll
      for (int s = 0; s < kMaxSplits; ++s) {
        if (s < p.splits) value += factors[s] * from_blocks[s * slice + i];
      }
      store_output(p.batch.out, p.batch.q_dtype, first * kDim + at,
                   kv_len > 0 ? value_scale * __fdividef(value, sums.sum) : 0.0f);
    }
    if (rank == 0 && warp == kWarps - 1) report(first);
  }

  __device__ void report(int64_t first_head) {
    float factors[kMaxSplits];
    const BlockSums sums = sums_of(lane % kHeads, factors);
    if (p.batch.lse != nullptr && lane < group)
      p.batch.lse[first_head + lane] = kv_len > 0 ? (sums.max + log2f(sums.sum)) * kLn2 : -INFINITY;
    if (p.records == nullptr && p.facts == nullptr) return;
    float mass = lane < group ? 1 - sums.sampled / sums.sum : 0,
          variance = lane < group ? sums.variance / (sums.sum * sums.sum) : 0;
#pragma unroll
    for (int step = 1; step < 8; step *= 2) {
      mass += shuffle_xor(mass, step);
      variance += shuffle_xor(variance, step);
    }
    if (lane != 0) return;
    if (p.facts != nullptr) p.facts[row_of_head].measured_variance = variance / group;
    if (p.records == nullptr) return;
    int32_t counts[kCounts] = {};
    for (int s = 0; s < p.splits; ++s) {
      for (int i = 0; i < kCounts; ++i) counts[i] += buffers.block_counts[s][i];
    }
    StepRecord record{};
    record.kv_len = kv_len;
    record.segments = state_of_sequence.full_segments + state_of_sequence.provisional_segments;
    record.clusters = state_of_sequence.full_segments * p.index.geometry.full_clusters +
                      state_of_sequence.provisional_segments * p.index.geometry.provisional_clusters;
    record.tau = tau();
    record.beta = beta();
    record.dense = changed ? DenseReason::kRowChanged : DenseReason::kNone;
    record.tokens_exact = changed ? kv_len : counts[kOutliers] + exact_rows().count;
    record.certain_mass = changed ? 1 : mass / group;
    if (!changed) {
      record.tokens_selected = counts[kSelected];
      record.tokens_sampled = counts[kSampled];
      record.clusters_refined = counts[kRefinedClusters];
      record.tokens_refined = counts[kRefinedRows];
      record.mass_variance = variance / group;
    }
    p.records[row_of_head] = record;
  }

  const DecodeParams& p;
  const int rank, warp, lane, sequence, head, group;
  int kv_len = 0;
  bool changed = false;
  const SequenceState state_of_sequence;
  const OwnSegments own;
  MergeBuffers<kHeads>& buffers;
  QuantizedQueries<kDim, kHeads>& quantized;
  float* const q;            // [kHeads, kDim]
  float* const values;       // [kWarps, kHeads, kValueStride]
  float* const from_blocks;  // [splits, slice]
  const SelectTables tables;
  const int32_t* pages;
  const std::byte *k, *v;
  const uint16_t* members;
  int64_t row_of_head;
  float scale, key_scale, value_scale;  // of scores and of outputs; key_scale for the stored numbers
  QueryFragments<kDim> fragments;
  AttendState<kDim> state;
  RunningSum estimates[kHeads / 4];
};

}  // namespace tactic::cuda
