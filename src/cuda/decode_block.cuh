// One block's part of a sparse decode step: score, select_sample, attend, refine, read_on, merge. A thread-block
// cluster has one sequence and KV head; its blocks own its segments in turn and exchange softmax states and partial
// outputs through shared memory.
#pragma once

#include "cuda/followers.cuh"
#include "cuda/learn.cuh"
#include "cuda/merge.cuh"
#include "cuda/read_on.cuh"
#include "cuda/report.cuh"
#include "cuda/row_checks.cuh"
#include "cuda/select_sample.cuh"
#include "cuda/sinks.cuh"
#include "cuda/staging.cuh"

namespace tactic::cuda {

template <DType kDType, int kDim, int kHeads, StepKind kKind>
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
        not_finite(params.index.any_not_finite[sequence] != 0),
        buffers(*reinterpret_cast<MergeBuffers<kHeads>*>(shared)),
        followers(*reinterpret_cast<FollowerBuffers*>(shared + sizeof(MergeBuffers<kHeads>))),
        found(*reinterpret_cast<LearnBuffers*>(&followers + 1)),
        measures(*reinterpret_cast<MeasureBuffers*>(&found + 1)),
        quantized(*reinterpret_cast<QuantizedQueries<kDim, kHeads>*>(&measures + 1)),
        fragments{reinterpret_cast<uint4*>(&quantized + 1)},
        from_blocks(reinterpret_cast<float*>(&quantized + 1) + QueryFragments<kDim>::kLoads * 32 * 4),
        values(from_blocks + kHeads * kDim + kMaxSplits * kHeads * 4),
        tables(params.workspace != nullptr ? params.workspace + blockIdx.x * params.block_workspace_bytes
                                           : shared + fixed_bytes(kDim, kHeads, params.stages),
               params.max_own_clusters, kHeads) {
    pages = pages_of(p.batch, sequence);
    k = rows_of(p.batch.k, pages, sequence, head);
    v = rows_of(p.batch.v, pages, sequence, head);
    row_of_head = static_cast<int64_t>(sequence) * p.batch.num_kv_heads + head;
    members = p.index.members + row_of_head * p.index.geometry.max_rows;
  }

  __device__ void run() {
    if (threadIdx.x == 0) {
      Mailbox::open(&buffers.mailboxes[0], state_bytes<kHeads>(p.splits));
      Mailbox::open(&buffers.mailboxes[1], slices().bytes());
    }
    __syncwarp();
    Mailbox::arrive();
    // What the kernel before this one writes must be waited for; the index was last changed by a copy, which is done.
    const int score_warps = num_score_warps(own, p.splits);
    TileRing<kDim> ring(reinterpret_cast<CentroidTile<kDim>*>(values) + warp * p.stages, buffers.staged[warp],
                        p.stages);
    if (warp < score_warps) {
      for (int i = 0; i < p.stages; ++i) ring.ask(tile(warp + i * score_warps));
    }
    prefetch_queries(p.batch, p.index, group, kDim, sequence, row_of_head);
    Mailbox::wait();
    wait_for_previous_kernel();
    load_queries();
    __syncthreads();
    if (warp < score_warps) score(ring, score_warps);
    float limit = 0;
    // One loop, so that its instructions, which take longer to come than to run, come once.
#pragma unroll 1
    for (Phase phase = why_dense() == DenseReason::kNoIndex ? Phase::kAll : Phase::kExact;;) {
      const bool heavy = attend(phase, score_warps, limit);
      if (phase == Phase::kExact) {
        float shifts[kHeads], besides[kHeads];
        limit = exchange_estimates(warp < score_warps, shifts, besides);
        let_next_kernel_start();
        select(shifts, besides);
        phase = Phase::kSelected;
        continue;
      }
      raise_block_maximum();
      if (__syncthreads_or(heavy) != 0) {
        read_marked<false>(tables.refined);
        raise_block_maximum();
        __syncthreads();
      }
      if (kVerified && phase != Phase::kAll) read_on();
      send_output();
      Mailbox::receive(&buffers.mailboxes[1], changed);
      if (!kChecked || phase == Phase::kAll || !any_changed(buffers, p.splits)) break;
      start_again();
      phase = Phase::kAll;
    }
    write_output();
    if constexpr (kLearns) {
      if (why_dense() != DenseReason::kNone || !p.batch.learn || !learns_at(kv_len, p.batch.layer)) return;
      learn<kDType, kDim, kHeads>(
          p, {p, own, tables, members, k, pages, row_of_head, head_scale<kDType>(p.batch.k, head), group}, buffers,
          found, values, rank, tau(), [&] {
            if constexpr (kVerified) return verified.drawn.independent;
            const BlockSums sums = cluster_sums<kHeads>(buffers, p.splits, lane % kHeads, [](int, float) {});
            return sums.variance / (sums.sum * sums.sum);
          });
    }
  }

 private:
  static constexpr bool kVerified = kKind == StepKind::kVerified, kLearns = kVerified || kKind == StepKind::kLearning,
                        kChecked = kKind != StepKind::kPlain;
  static constexpr int32_t kOfFollower = -1;  // in place of a row's cluster

  /// What is read: rows that no segment holds, or no cluster; rows that select took; every row.
  enum class Phase { kExact, kSelected, kAll };

  // Where a tile of the block's clusters lies in the index; nullptr beyond the last.
  __device__ const std::byte* tile(int number) const {
    const int32_t first = number * kTileClusters;
    if (first >= own.clusters()) return nullptr;
    const OwnSegment segment = own.at(own.segment_of(first));
    return tile_of(p.index, row_of_head, segment.cluster + first - segment.local_cluster).data;
  }
  // Quantized and as fragments, a warp a head.
  __device__ void load_queries() {
    kv_len = p.batch.kv_lens[sequence];
    key_scale = p.batch.sm_scale * kLog2E * head_scale<kDType>(p.batch.k, head);
    value_scale = head_scale<kDType>(p.batch.v, head);
    if (warp < kMaxGroup) {
      const int64_t first = (static_cast<int64_t>(sequence) * p.batch.num_q_heads + head * group + warp) * kDim;
      quantize_query<Chunk<kDType>::kBf16, kDim, kHeads>(
          [&](int d) { return warp < group ? load_query(p.batch.q, p.batch.q_dtype, first + d) : 0.0f; }, warp,
          quantized, fragments);
    } else if (kLearns && warp == kMaxGroup) {
      take_over(followers, p.index, state_of_sequence, row_of_head, rank, p.splits, p.batch.learn);
      add_likely(followers, p.batch, p.index, state_of_sequence, sequence, row_of_head, rank, p.splits);
    } else if (warp == kWarps - 1) {
      if (lane < kCounts) buffers.counts[lane] = 0;
      if (lane == kCounts) buffers.found_changed = 0;
      if (lane == 31) recall(buffers, p, sequence, row_of_head);
    }
    reset_maxima();
  }
  __device__ void reset_maxima() {
    if (threadIdx.x < kHeads) buffers.maxima[threadIdx.x] = ordered(__float_as_int(kLowest));
  }

  __device__ void score(TileRing<kDim>& ring, int score_warps) {
    const float weight = beta();
    CentroidQuery<kDim, kHeads> query;
    load_centroid_query<kDim, kHeads>(quantized, p.batch.sm_scale, query);
#pragma unroll 1
    for (int number = warp; number * kTileClusters < own.clusters(); number += score_warps) {
      const int c = number * kTileClusters;
      score_tile<kDim, kHeads>(ring.take(), query, weight, tables.exponents + c, tables.stride, tables.places + c,
                               estimates, [&] {
                                 __syncwarp();
                                 ring.ask(tile(number + p.stages * score_warps));
                               });
    }
  }
  // Where somebody asks: at batch 1 it takes 3 us, instructions that run once.
  __device__ bool measures_draw() const { return kLearns && !kVerified && p.batch.learn && p.records != nullptr; }
  __device__ float beta() const { return buffers.beta; }
  __device__ float tau() const {
    const float asked = p.tau > 0 ? p.tau : tau_for_error(p.target_error, buffers.variance_ratio);
    return fmaxf(1.0f, asked * buffers.tau_factor);
  }
  __device__ RowTile row_tile(int32_t row, float log_weight) const {
    return {row_offset(p.batch.k, pages, row), row_offset(p.batch.v, pages, row), log_weight};
  }

  __device__ ExactRows exact_rows(Phase phase = Phase::kExact) const {
    return {p.index.geometry, phase == Phase::kAll ? SequenceState{} : state_of_sequence, kv_len};
  }
  // Rows from kv_len on are hidden: an index that holds any of them is of no use.
  __device__ DenseReason why_dense() const {
    if (kv_len < exact_rows().indexed) return DenseReason::kNoIndex;
    return changed ? DenseReason::kRowChanged : DenseReason::kNone;
  }
  // Where a warp is among the tiles of 16 rows that it reads in a phase: at a tile of a list, then at rows of own
  // segments that are not finite and, as if of one more, followers. Few registers, live while rows are on their way.
  struct Cursor {
    int tile;
    int k_own = -1, at = -16, rows = 0;
  };
  // A warp's place among those that read in a phase, and their number.
  __device__ int reader(Phase phase, int score_warps) const {
    return phase == Phase::kExact ? warp - score_warps : phase == Phase::kSelected ? kWarps - 1 - warp : warp;
  }
  __device__ int num_readers(Phase phase, int score_warps) const {
    return phase == Phase::kExact ? kWarps - score_warps : kWarps;
  }
  // Exact rows are shared among the blocks, selected ones are the block's own.
  __device__ int num_listed(Phase phase) const {
    return phase == Phase::kSelected ? buffers.counts[kSelected] : exact_rows(phase).count;
  }
  __device__ bool advance(Phase phase, int score_warps, Cursor& c) {
    const int readers = num_readers(phase, score_warps);
    c.tile += phase == Phase::kSelected ? readers : p.splits * readers;
    if (c.tile * 16 < num_listed(phase)) return true;
    if (phase != Phase::kExact || !(kLearns || not_finite)) return false;
    c.at += 16;
    while (c.at >= c.rows) {
      c.k_own += c.k_own < 0 ? 1 + reader(phase, score_warps) : readers;
      if (c.k_own >= own.count() + kLearns) return false;
      c.at = 0;
      c.rows = always_read(c.k_own);
      if (lane == 0 && c.rows > 0) atomicAdd(&buffers.counts[kForCertain], c.rows);
    }
    return true;
  }
  // Rows of an own segment that are not finite, or followers.
  __device__ int32_t always_read(int k_own) const {
    if (kLearns && k_own == own.count()) return followers.count;
    if (!not_finite) return 0;
    return __ldg(p.index.num_not_finite + row_of_head * p.index.geometry.all_segments + own.at(k_own).slot);
  }
  // The row of lane & 15; log weight kLowest: none.
  __device__ TakenRow row_at(Phase phase, const Cursor& c) const {
    const int32_t i = c.tile * 16 + (lane & 15);
    if (phase == Phase::kSelected) {
      const int32_t rows = buffers.counts[kSelected];
      TakenRow taken = taken_row(tables, own, members, min(i, rows - 1));
      if (i >= rows) {
        taken.log_weight = kLowest;
      } else if (kLearns && is_follower(followers, taken.row)) {
        leave_out(taken);
      }
      return taken;
    }
    const ExactRows rows = exact_rows(phase);
    if (c.tile * 16 < rows.count) return {0, rows.row(min(i, rows.count - 1)), i < rows.count ? 0.0f : kLowest};
    const int32_t number = c.at + (lane & 15), place = min(number, c.rows - 1);
    const float log_weight = number < c.rows ? 0.0f : kLowest;
    if (kLearns && c.k_own == own.count()) return {kOfFollower, followers.rows[place], log_weight};
    const OwnSegment segment = own.at(c.k_own);
    return {0, segment.first_row + __ldg(members + segment.first_row + segment.num_rows - c.rows + place), log_weight};
  }
  // A row that was read for certain already.
  __device__ void leave_out(TakenRow& taken) const {
    if (p.records != nullptr && lane < 16) {
      atomicAdd(&buffers.counts[kLeftOut], 1);
      if (taken.log_weight > 0) atomicSub(&buffers.counts[kSampled], 1);
    }
    taken.log_weight = kLowest;
  }
  __device__ const uint8_t* row_checks() const { return p.index.row_checks + row_of_head * p.index.geometry.max_rows; }

  // shifts[h]: log2 of the estimated sum of all weights of head h, over tau, sqrt(group) and the head's sink_factor,
  // whose inverse square is besides[h]. Returns, for head g of lane (g, t), log2 of the weight from which on a sampled
  // row refines its cluster.
  __device__ float exchange_estimates(bool scored, float (&shifts)[kHeads], float (&besides)[kHeads]) {
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
      store_state<kDim, kHeads>(state, buffers.warp_states[warp]);
    }
    __syncthreads();
    share_states(buffers, rank, p.splits);
    if (rank == 0 && warp == 1) share_sinks(buffers, from_blocks, exact_rows().sinks, p.splits);
    Mailbox::receive(&buffers.mailboxes[0], 0);
    const RunningSum total = fold_states<kHeads>(buffers.block_states, p.splits);
    const float normalizer = total.max + log2_fast(total.sum);
    const float rows = tau();
    const float beside = weight_beside_sinks(buffers.sinks[lane % kHeads], normalizer);
    const float shift = normalizer - log2_fast(rows) + 0.5f * log2_fast(static_cast<float>(group) * beside);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      shifts[h] = shuffle(shift, h);
      besides[h] = shuffle(beside, h);
    }
    const int g = lane >> 2;
    const float all = shuffle(normalizer, g % kHeads);
    const float beside_g = shuffle(beside, g % kHeads);
    if (kLearns && warp == 0 && (lane & 3) == 0) {
      followers.floors[g] = all + kHeavyLog2;
      followers.besides[g] = beside_g;
    }
    return g < group && p.refine < 1 ? all + log2_fast(fmaxf(p.refine, 8.0f / rows)) + 0.5f * log2_fast(beside_g)
                                     : -kLowest;
  }

  __device__ void select(const float (&shifts)[kHeads], const float (&besides)[kHeads]) {
    const uint64_t stream_id = p.batch.stream_ids != nullptr ? p.batch.stream_ids[sequence] : 0;
    const uint64_t random = step_random(p.seed, stream_id, p.batch.layer, head, kv_len - 1);
    uint32_t sampled = 0;  // by this lane
    Foreseen foreseen;
    for (int k_own = warp; k_own < own.count(); k_own += kWarps) {
      const OwnSegment segment = own.at(k_own);
      const int32_t taken =
          select_segment<kHeads, kLearns>(tables, segment, members, segment_offset(random, segment.first_row), group,
                                          shifts, besides, sampled, foreseen);
      if (lane == 0) tables.segment_counts[k_own] = taken;
    }
    if constexpr (kLearns) {
      const float variance = warp_sum(foreseen.variance);
      if (lane == 0) found.of_warps[warp].variance = variance;
      if (measures_draw()) draw.foresee(foreseen);
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
  __device__ bool attend(Phase phase, int score_warps, float limit) {
    if (phase == Phase::kExact && warp < score_warps) return false;
    Cursor at;
    at.tile = reader(phase, score_warps) - num_readers(phase, score_warps);
    if (phase != Phase::kSelected) at.tile = rank + p.splits * at.tile;
    bool found = false, more = advance(phase, score_warps, at);
    bool has_sinks = phase == Phase::kExact && rank == 0 && warp == score_warps;  // in its first tile
    TakenRow taken{}, next{};
    if (more) taken = row_at(phase, at);
#pragma unroll 1
    while (more) {
      const RowTile now = row_tile(taken.row, taken.log_weight);
      // While a tile is on its way, the next one is looked up and asked for.
      const auto meanwhile = [&] {
        if constexpr (kChecked) {
          if (phase == Phase::kSelected && (!kLearns || p.check_rows) &&
              row_changed<kDType, kDim>(row_checks(), taken.row, k, v, now) != 0)
            buffers.found_changed = 1;
        }
        more = advance(phase, score_warps, at);
        if (!more) return;
        next = row_at(phase, at);
        prefetch_tile<kDType, kDim>(k, v, row_tile(next.row, 0));
        if (kChecked && phase == Phase::kSelected) prefetch(row_checks() + next.row);
      };
      const auto scored = [&](const float(&scores)[4], const float(&log_weights)[4]) {
        if (has_sinks) leave_scores<kHeads>(scores, from_blocks);
        has_sinks = false;
        if constexpr (!kLearns) return;
        note(followers, taken.row | (taken.log_weight > 0 ? kSurprise : 0), scores, group,
             taken.local_cluster == kOfFollower, state.max - 1);
        if (phase == Phase::kSelected && measures_draw())
          draw.add_rows(scores, log_weights, followers.estimate(lane >> 2));
      };
      const uint32_t heavy =
          attend_tile<kDType, kDim>(state, k, v, now, fragments, key_scale, limit, meanwhile, scored);
      const uint32_t all = __reduce_or_sync(kAllLanes, heavy);
      if (all != 0) {
        found = true;
        if (lane < 16 && (all >> lane & 1) != 0)
          atomicOr(&tables.refined[taken.local_cluster / 32], 1u << (taken.local_cluster & 31));
      }
      taken = next;
    }
    return found;
  }

  // A changed row was read, so the index cannot be trusted: every row is to be read instead.
  __device__ void start_again() {
    __syncthreads();  // those who sent have read the maxima
    changed = true;
    state = {};
    reset_maxima();
    if (threadIdx.x == 0) Mailbox::open_again(&buffers.mailboxes[1], slices().bytes());
    Mailbox::synchronize();  // all have looked before anything is sent anew
  }

  // Clusters that are marked are read whole, for their mass (kOn) or for what was drawn; warps share their tiles.
  template <bool kOn>
  __device__ void read_marked(const uint32_t* marked) {
    int number = 0;
    for_marked(marked, own.clusters() / 32 + 1, [&](int32_t c) {
      if (!kOn && threadIdx.x == 0) ++buffers.counts[kRefinedClusters];
      for (int32_t at = 0; at < static_cast<int32_t>(tables.places[c] & 0xFFFFu); at += 16) {
        if (number++ % kWarps == warp) read_rest<kOn>(c, at);
      }
    });
    // Apart, since read_rest has no register left for it (where reading on has spilled them anyway it looks itself).
    if (kChecked && !kVerified && (!kLearns || p.check_rows) &&
        marked_rows_changed<kDType, kDim>(marked, p.batch, tables, own, members, row_checks(), pages, k, v))
      buffers.found_changed = 1;
  }

  // Of the 16 members from `at` on, adds those not taken, makes those taken certain. (ClusterMembers: larger code.)
  template <bool kOn>
  __device__ void read_rest(int32_t c, int32_t at) {
    const OwnSegment segment = own.at(own.segment_of(c));
    const int32_t size = tables.places[c] & 0xFFFFu, first = segment.first_row + (tables.places[c] >> 16);
    const float log_weight = log2_inverse(tables.probabilities[c]);
    const int32_t member = at + (lane & 15), row = segment.first_row + __ldg(members + first + min(member, size - 1));
    const bool inside = member < size && !(kLearns && is_follower(followers, row)),
               taken = inside && is_taken(tables.begins[c], tables.probabilities[c], member);
    const uint32_t added = __ballot_sync(kAllLanes, inside && !taken) & 0xFFFFu,
                   drawn = __ballot_sync(kAllLanes, taken) & 0xFFFFu;
    if (lane == 0) {
      atomicAdd(&buffers.counts[kRefinedRows], __popc(added));
      atomicSub(&buffers.counts[kSampled], __popc(drawn));
    }
    const RowTile tile = row_tile(row, 0);
    if (kVerified && p.check_rows && row_changed<kDType, kDim>(row_checks(), row, k, v, tile) != 0)
      buffers.found_changed = 1;
    attend_rest<kDType, kDim>(state, k, v, tile, inside, taken, log_weight, fragments, key_scale,
                              [&](const float(&scores)[4]) {
                                if constexpr (!kLearns) return;
                                note(followers, row | kSurprise, scores, group);
                                if (!kOn && (kVerified || measures_draw()))
                                  draw.add_refined(scores, followers.estimate(lane >> 2));
                              });
  }
  // Until every head has the mass that is asked for.
  __device__ void read_on() {
    const ReadOn<kDType, kDim, kHeads> rest{p,           own,     tables,    buffers, followers,
                                            fragments,   members, k,         pages,   quantized.norm2,
                                            row_of_head, group,   key_scale, tau(),   values};
    verified = rest.run(state, draw.refined, [&](const uint32_t* marked) { read_marked<true>(marked); });
    raise_block_maximum();
    __syncthreads();
  }
  __device__ void raise_block_maximum() {
    const int g = lane >> 2;
    if ((lane & 3) == 0 && g < kHeads) atomicMax(&buffers.maxima[g], ordered(__float_as_int(state.max)));
  }

  __device__ OutputSlices<kDim, kHeads, kChecked> slices() const {
    return {group, rank, p.splits, p.records != nullptr, measures_draw() ? kDrawBytes : 0};
  }
  // The block's output relative to its own maximum.
  __device__ void send_output() {
    const float maximum = __int_as_float(ordered(buffers.maxima[(lane >> 2) % kHeads]));
    store_warp<kDim, kHeads>(state, maximum, values + warp * kHeads * value_stride(kDim), buffers.warp_sums[warp]);
    if (measures_draw()) store_draw(measures, draw);
    __syncthreads();
    if (measures_draw()) send_draw(measures, rank, &buffers.mailboxes[1]);
    slices().send(buffers, values, from_blocks);
  }

  __device__ void write_output() {
    const int total = group * kDim, slice = slices().size();
    const int64_t first = (static_cast<int64_t>(sequence) * p.batch.num_q_heads + head * group);
    for (int i = threadIdx.x; i < slice && rank * slice + i < total; i += kThreads) {
      const int at = rank * slice + i;
      float value = 0;
      const BlockSums sums = cluster_sums<kHeads>(
          buffers, p.splits, at / kDim, [&](int s, float factor) { value += factor * from_blocks[s * slice + i]; });
      store_output(p.batch.out, p.batch.q_dtype, first * kDim + at,
                   kv_len > 0 ? value_scale * __fdividef(value, sums.sum) : 0.0f);
    }
    if (kLearns && p.batch.learn && warp == kWarps - 2) {
      const BlockSums sums = cluster_sums<kHeads>(buffers, p.splits, lane % kHeads, [](int, float) {});
      const float limit = changed ? -kLowest : sums.max + log2_fast(sums.sum) + kHeavyLog2;
      const int64_t names = row_of_head * kMaxSplits + rank;  // by this block
      name_followers(followers, limit, p.index, state_of_sequence, row_of_head, p.splits, p.index.followers[names]);
      name_heavy(followers, limit, own, p.index.heavy[names]);
    }
    if (rank == 0 && warp == kWarps - 1)
      report<kHeads>(p, buffers, sequence, row_of_head, kv_len, exact_rows().count, tau(), why_dense(),
                     measures_draw() ? &measures : nullptr, followers, kVerified ? &verified : nullptr);
  }

  const DecodeParams& p;
  const int rank, warp, lane, sequence, head, group;
  int kv_len = 0;
  bool changed = false;
  const SequenceState state_of_sequence;
  const OwnSegments own;
  const bool not_finite;  // the sequence may have rows that are
  MergeBuffers<kHeads>& buffers;
  FollowerBuffers& followers;
  LearnBuffers& found;
  MeasureBuffers& measures;
  QuantizedQueries<kDim, kHeads>& quantized;
  const SharedFragments<kDim> fragments;
  float* const from_blocks;  // [splits, slice]
  float* const values;  // tiles of centroids while they are scored, at the end [kWarps, kHeads, value_stride(kDim)]
  const SelectTables tables;
  const int32_t* pages;
  const std::byte *k, *v;
  const uint16_t* members;
  int64_t row_of_head;
  float key_scale, value_scale;  // of scores and outputs of the stored numbers
  AttendState<kDim> state;
  DrawSums draw;          // kLearns
  VerifiedMass verified;  // kVerified
  RunningSum estimates[kHeads / 4];
};

}  // namespace tactic::cuda
