// read_on: the rest of a step that promises a mass, as core's: what the drawn rows say of the clusters that were not
// read whole decides which of them are, until every head of the group surely has the mass. Blocks of a thread-block
// cluster decide alike, each from the sums of all, and mark clusters of their own. Nothing here is fast; drawn keys are
// read again in every round, so that their scores need no memory.
#pragma once

#include "core/read_on.h"
#include "cuda/followers.cuh"
#include "cuda/measure.cuh"

namespace tactic::cuda {

/// 1 - core's mass_bound, kSureness standard errors down: the share that may at most be unread.
__device__ __forceinline__ float rest_bound(const MeasuredMass& head) {
  const float rest = 1 - head.mass, error = sqrtf(head.variance), freedom = head.freedom;
  if (!(error > 0)) return rest;
  const float x = static_cast<float>(kSureness) * (8 * freedom + 3) / (8 * freedom + 1),
              t = sqrtf(freedom * expm1f(x * x / freedom)) * error;
  const float far = rest <= 0 ? t : t <= rest ? rest * expf(t / rest) : 2.718281828f * t;
  return fminf(far, 1.0f);
}

/// What rows in a row say of one query head: as core's DrawnVariance, neighbors being any that follow one another,
/// since few draws may be left. Weights are relative to the estimate of all weights.
struct alignas(16) RestSums {
  DrawSums draw;
  float first = 0, first_rest = 0, last = 0, last_rest = 0;  // weights drawn, and 1 - their probabilities
  float certain = 0;                                         // weight of the rows read for certain
  float independent = 0;                                     // variance, had the draws been independent
  float left = 0;                                            // clusters that were not read whole

  __device__ __forceinline__ void add(float weight, float rest) {
    RestSums next;
    next.draw.drawn = weight;
    next.draw.rows = 1;
    next.first = next.last = weight;
    next.first_rest = next.last_rest = rest;
    append(next);
  }
  __device__ __forceinline__ void append(const RestSums& next) {
    if (next.draw.rows > 0) {
      if (draw.rows > 0) {
        draw.add_pair(next.first, next.first_rest, last, last_rest);
      } else {
        first = next.first;
        first_rest = next.first_rest;
      }
      last = next.last;
      last_rest = next.last_rest;
    }
    draw.add(next.draw);
    certain += next.certain;
    independent += next.independent;
    left += next.left;
  }
};

/// What a step knows of its masses, of head lane.
struct VerifiedMass {
  MeasuredMass drawn;  // before it read on, for what the index learns
  MeasuredMass mass;   // of all it has read
};

/// Of a block. scratch: shared memory for partial outputs, which are not there yet.
template <DType kDType, int kDim, int kHeads>
struct ReadOn {
  const DecodeParams& p;
  const OwnSegments& own;
  const SelectTables& tables;
  MergeBuffers<kHeads>& buffers;
  const FollowerBuffers& followers;
  const SharedFragments<kDim>& fragments;
  const uint16_t* members;
  const std::byte* k;
  const int32_t* pages;
  const float* norms2;  // [kHeads] |q|^2
  int64_t pair;
  int group;
  float key_scale, tau;
  float* scratch;

  static constexpr int kBins = 256;
  using Histogram = uint32_t[kBins][kHeads];  // shares in units of 2^-31, exact in any order
  struct Scratch {
    Histogram of_block;  // after `other`, which other blocks may still read then
    union {
      Histogram other;
      RestSums of_warps[kWarps][kHeads];  // when nobody reads the histogram any more
    };
    union {
      Histogram total;                             // of all blocks
      float weights[kWarps][kHeads][16];           // of a tile of drawn rows
      float left_of_warps[kWarps][kMaxGroup + 1];  // estimated weights by head, and rows
    };
    float left[kMaxGroup + 1];  // of the block
    RestSums rest[2][kHeads];   // of the block, in turns
  };
  static_assert(sizeof(Scratch) <= kWarps * kHeads * value_stride(kDim) * sizeof(float));

  __device__ Scratch& memory() const { return *reinterpret_cast<Scratch*>(scratch); }
  __device__ uint32_t* read_on() const { return tables.read_on(own.count()); }
  __device__ bool is_refined(int32_t c) const { return (tables.refined[c / 32] >> (c & 31) & 1) != 0; }
  /// Whether a cluster has rows and is not read whole whatever was drawn from it.
  __device__ bool is_ranked(int32_t c) const {
    return tables.probabilities[c] < kReadOn && (tables.places[c] & 0xFFFFu) > 0;
  }
  /// As core's speaks().
  __device__ bool speaks(int32_t c, bool alone) const { return is_ranked(c) && !(alone && is_refined(c)); }

  /// All threads. read_marked(bits) reads clusters. refined: the lane's part, of head lane / 4, of the weights of rows
  /// in clusters that were read whole because of what was drawn from them.
  template <class ReadMarked>
  __device__ VerifiedMass run(const AttendState<kDim>& state, float refined, ReadMarked read_marked) const {
    const int lane = threadIdx.x & 31;
    const float allowed = fmaxf(1 - p.target_mass, 0.0f);
    expect_means();
    VerifiedMass known;
    bool read = false, alone = false;
    int turn = 0;
#pragma unroll 1
    while (true) {
      if (!alone && read) refined = weigh_refined();
      const MeasuredMass mass =
          share(state, measure_draw(alone), alone ? 0.0f : refined, alone || !read ? 0.0f : known.drawn.rows, turn);
      turn ^= 1;
      if (!alone) {
        known.mass = mass;
        if (read) break;
        known.drawn = mass;
        alone = true;
        continue;
      }
      const float rest = rest_bound(mass);
      const bool lacks = lane < group && rest > allowed;
      if (__any_sync(kAllLanes, lacks)) {
        mark(lacks, followers.estimate(lane % kMaxGroup) + log2_fast(mass.total), lacks ? 1 - allowed / rest : 0.0f);
        read_marked(read_on());
        __syncthreads();
        settle();
        read = true;
      } else if (read) {
        alone = false;
      } else {
        break;
      }
    }
    Mailbox::publish();  // nobody reads another's memory any more
    return known;
  }

 private:
  /// Exponents become those of mean weights.
  __device__ void expect_means() const {
    for (int32_t c = threadIdx.x; c < own.clusters(); c += kThreads) {
      const auto size = static_cast<float>(tables.places[c] & 0xFFFFu);
      if (!(size > 0)) continue;
      const OwnSegment segment = own.at(own.segment_of(c));
      const int32_t cluster = segment.cluster + c - segment.local_cluster;
      const float spread = tile_of(p.index, pair, cluster).facts(cluster).spread * p.batch.sm_scale * p.batch.sm_scale;
      for (int h = 0; h < group; ++h)
        tables.exponents[h * tables.stride + c] -= buffers.beta * kLog2E * growth(spread * norms2[h], size);
    }
    for (int i = threadIdx.x; i < own.clusters() / 32 + 1; i += kThreads) read_on()[i] = 0;
  }

  /// What was marked has been read.
  __device__ void settle() const {
    for (int32_t c = threadIdx.x; c < own.clusters(); c += kThreads) {
      if ((read_on()[c / 32] >> (c & 31) & 1) != 0) tables.probabilities[c] = kReadOn;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < own.clusters() / 32 + 1; i += kThreads) read_on()[i] = 0;
    __syncthreads();
  }

  /// What a warp's rows of the draw say, of head lane; the warps have one run of rows after the other.
  __device__ RestSums measure_draw(bool alone) const {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    RestSums sums;
    float(&weights)[kHeads][16] = memory().weights[warp];
    const int32_t rows = buffers.counts[kSelected], tiles = (rows + 15) / 16, each = (tiles + kWarps - 1) / kWarps;
#pragma unroll 1
    for (int32_t tile_number = warp * each; tile_number < min((warp + 1) * each, tiles); ++tile_number) {
      const int32_t i = 16 * tile_number + (lane & 15);
      const TakenRow taken = taken_row(tables, own, members, min(i, rows - 1));
      const bool drawn = i < rows && speaks(taken.local_cluster, alone) && !is_follower(followers, taken.row);
      const uint32_t all = __ballot_sync(kAllLanes, drawn) & 0xFFFFu;
      if (all == 0) continue;
      float scores[4];
      score_keys<kDType, kDim>(fragments, k, row_offset(p.batch.k, pages, taken.row), key_scale, scores);
      const float estimate = followers.estimate(g);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = row_in_tile(t, j);
        const float log_weight = shuffle(taken.log_weight, row);
        if (g < kHeads) weights[g][row] = exp2_fast(fminf(scores[j] + log_weight - estimate, 24.0f));
      }
      __syncwarp();
      for (uint32_t bits = all; bits != 0; bits &= bits - 1) {
        const int row = __ffs(bits) - 1;
        sums.add(weights[lane % kHeads][row], 1 - exp2_fast(-shuffle(taken.log_weight, row)));
      }
      __syncwarp();
    }
    for (int k_own = warp; k_own < own.count(); k_own += kWarps) {
      const OwnSegment segment = own.at(k_own);
      uint64_t width = 0;
      uint32_t clusters = 0, left = 0;
      for (int32_t c = segment.local_cluster + lane; c < segment.local_cluster + segment.num_clusters; c += 32) {
        if (!speaks(c, alone)) continue;
        width += static_cast<uint64_t>(tables.probabilities[c]) * (tables.places[c] & 0xFFFFu);
        ++clusters;
        left += speaks(c, true);
      }
      const float part = static_cast<float>(static_cast<uint32_t>(warp_sum(width))) * 0x1p-32f;
      sums.draw.count_variance += part * (1 - part);
      sums.draw.clusters += static_cast<float>(__reduce_add_sync(kAllLanes, clusters));
      sums.left += static_cast<float>(__reduce_add_sync(kAllLanes, left));
    }
    return sums;
  }

  /// The lane's part, of head lane / 4, of the weights of rows in refined clusters whose draws speak.
  __device__ float weigh_refined() const {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    DrawSums sums;
    int number = 0;
    for_marked(tables.refined, own.clusters() / 32 + 1, [&](int32_t c) {
      if (!speaks(c, false)) return;
      const ClusterMembers cluster(tables, own, members, c);
      for (int32_t at = 0; at < cluster.size; at += 16) {
        if (number++ % kWarps != warp) continue;
        const int32_t member = at + (lane & 15), row = cluster.row(member);
        const uint32_t inside = __ballot_sync(kAllLanes, member < cluster.size && !is_follower(followers, row));
        float scores[4];
        score_keys<kDType, kDim>(fragments, k, row_offset(p.batch.k, pages, row), key_scale, scores);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if ((inside >> row_in_tile(lane & 3, j) & 1) == 0) scores[j] = kLowest;
        }
        sums.add_refined(scores, followers.estimate(lane >> 2));
      }
    });
    return sums.refined;
  }

  /// Adds up what the warps of all blocks have read and what their draws say: the mass of head lane. whole: draws for
  /// which the usual variance is known, 0: as many as there are.
  __device__ MeasuredMass share(const AttendState<kDim>& state, RestSums sums, float refined, float whole,
                                int turn) const {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const float unit = exp2_fast(fminf(state.max - followers.estimate(lane >> 2), 64.0f));
    const auto of_head = [&](float x) {  // from lanes that each have a part of head lane / 4
      x += shuffle_xor(x, 1);
      x += shuffle_xor(x, 2);
      return shuffle(x, 4 * (lane % kMaxGroup));
    };
    sums.certain = of_head((state.sum - state.sampled_sum) * unit);
    sums.independent = of_head(state.sampled_variance * unit * unit);
    sums.draw.refined = of_head(refined);
    if (lane < kHeads) memory().of_warps[warp][lane] = sums;
    __syncthreads();
    if (threadIdx.x < kHeads) {
      RestSums block;
      for (int w = 0; w < kWarps; ++w) block.append(memory().of_warps[w][threadIdx.x]);
      memory().rest[turn][threadIdx.x] = block;
    }
    Mailbox::publish();
    const int h = lane % kHeads;
    RestSums all;
    for (int s = 0; s < p.splits; ++s) all.append(Mailbox::read(&memory().rest[turn][h], s));
    const float usual = (lane < group ? p.index.calibration[pair].usual_variance[lane] : 0.0f) *
                        (whole > 0 ? whole / fmaxf(all.draw.rows, 1.0f) : 1.0f);
    return measure(all.draw, all.certain, fmaxf(all.independent, 0.0f), all.left == 0,
                   tau * rsqrtf(sqrtf(followers.besides[h])), usual);
  }

  /// The estimated mean weight of a cluster's rows, of all weights, which it cannot exceed.
  __device__ float mean_weight(int h, int32_t c, float log_total) const {
    return exp2_fast(fminf(tables.exponents[h * tables.stride + c] - log_total, 0.0f));
  }

  /// Estimated weights of what is left in all blocks, of head lane; lane kMaxGroup: rows. log_totals: of all weights.
  __device__ float add_up_left(const float (&log_totals)[kHeads]) const {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    float weights[kHeads] = {}, rows = 0;
    for (int32_t c = threadIdx.x; c < own.clusters(); c += kThreads) {
      if (!speaks(c, true)) continue;
      const auto size = static_cast<float>(tables.places[c] & 0xFFFFu);
      rows += size;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) weights[h] += size * mean_weight(h, c, log_totals[h]);
    }
    float(&of_warps)[kWarps][kMaxGroup + 1] = memory().left_of_warps;
    rows = warp_sum(rows);
    if (lane == 0) of_warps[warp][kMaxGroup] = rows;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float sum = warp_sum(weights[h]);
      if (lane == 0) of_warps[warp][h] = sum;
    }
    __syncthreads();
    const int i = static_cast<int>(threadIdx.x);
    if (i < kHeads || i == kMaxGroup) {
      float sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += of_warps[w][i];
      memory().left[i] = sum;
    }
    Mailbox::publish();
    float left = 0;
    const int at = lane == kMaxGroup ? kMaxGroup : lane % kHeads;
    for (int s = 0; s < p.splits; ++s) left += Mailbox::read(&memory().left[at], s);
    return left;
  }

  /// All blocks' shares of the bins, each with those above it, and the last bin at which all heads have what they need.
  __device__ int32_t last_enough(const Histogram& bins, const uint32_t (&needs)[kHeads]) const {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    Histogram& total = memory().total;
    static_assert(kHeads % 4 == 0);
    for (int i = threadIdx.x; i < kBins * kHeads / 4; i += kThreads) {
      uint4 sum{};
      for (int s = 0; s < p.splits; ++s) {
        const uint4 part = Mailbox::read(reinterpret_cast<const uint4*>(bins) + i, s);
        sum = {sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w};
      }
      reinterpret_cast<uint4*>(total)[i] = sum;
    }
    __syncthreads();
    if (warp < kHeads) {
      constexpr int kEach = kBins / 32;
      uint32_t sum = 0;
      for (int i = kEach - 1; i >= 0; --i) total[kEach * lane + i][warp] = sum += total[kEach * lane + i][warp];
      uint32_t above = sum;  // of the lane and those after it
      for (int step = 1; step < 32; step *= 2) {
        const uint32_t other = __shfl_down_sync(kAllLanes, above, step);
        if (lane + step < 32) above += other;
      }
      for (int i = 0; i < kEach; ++i) total[kEach * lane + i][warp] += above - sum;
    }
    __syncthreads();
    int32_t last = 0;
    for (int first = 0; first < kBins; first += 32) {
      bool enough = true;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) enough = total[first + lane][h] >= needs[h] && enough;
      last += __popc(__ballot_sync(kAllLanes, enough));
    }
    return max(last - 1, 0);
  }

  /// 16 bits that grow with a row's worth, the upper eight by one from an eighth of an octave to the next. 2^-28, which
  /// is less than any row has when all have the same, and below: 0.
  __device__ static uint32_t key_of(float worth) {
    constexpr uint32_t kLeast = (127 - 28) << 23;
    const uint32_t bits = max(__float_as_uint(worth), kLeast);
    return min(bits - kLeast >> 12, 0xFFFFu);
  }

  /// Marks clusters by falling share per row until all heads that lack mass would have it; refined ones that rank among
  /// those speak no more. Of head lane: log2 of all weights, and the share of what is left that it lacks.
  __device__ void mark(bool lacks, float log_total, float lacking) const {
    float log_totals[kHeads], scales[kHeads];
    uint32_t needs[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) log_totals[h] = shuffle(log_total, h);
    const float left = add_up_left(log_totals), rows = shuffle(left, kMaxGroup);
    // A head whose estimates of all that is left vanish knows nothing of it: every row is worth the same then.
    if (!(left > 0)) log_total = kLowest;
    const float scale = lacks ? 1 / (left > 0 ? left : rows) : 0.0f;
    const uint32_t need = lacks ? max(1u, static_cast<uint32_t>(ceilf(lacking * 0x1p31f))) : 0u;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      log_totals[h] = shuffle(log_total, h);
      scales[h] = shuffle(scale, h);
      needs[h] = shuffle(need, h);
    }
    // A radix search for the largest limit of a row's worth from which on the shares suffice. A worth is
    // rounded alike each time (no product is part of a sum), so that the limit that was found marks a cluster.
    uint32_t limit = 0;
#pragma unroll 1
    for (int shift = 8;; shift -= 8) {
      Histogram& bins = shift > 0 ? memory().other : memory().of_block;
      const bool marks = shift < 0;
      for (int i = threadIdx.x; !marks && i < kBins * kHeads; i += kThreads) bins[i / kHeads][i % kHeads] = 0;
      __syncthreads();
      for (int32_t c = threadIdx.x; c < own.clusters(); c += kThreads) {
        if (!is_ranked(c) || (!marks && is_refined(c))) continue;
        float shares[kHeads], worth = 0;
#pragma unroll
        for (int h = 0; h < kHeads; ++h) worth += shares[h] = __fmul_rn(scales[h], mean_weight(h, c, log_totals[h]));
        const uint32_t key = key_of(worth);
        if (marks) {
          if (key < limit) continue;
          if (is_refined(c)) {
            tables.probabilities[c] = kReadOn;
          } else {
            atomicOr(&read_on()[c / 32], 1u << (c & 31));
          }
        } else if (shift > 0 || (key ^ limit) < kBins) {
          const float size = static_cast<float>(tables.places[c] & 0xFFFFu) * 0x1p31f;
#pragma unroll
          for (int h = 0; h < kHeads; ++h)
            atomicAdd(&bins[key >> shift & (kBins - 1)][h], static_cast<uint32_t>(size * shares[h]));
        }
      }
      if (marks) break;
      Mailbox::publish();
      const int32_t bin = last_enough(bins, needs);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) needs[h] -= bin + 1 < kBins ? min(needs[h], memory().total[bin + 1][h]) : 0;
      limit |= static_cast<uint32_t>(bin) << shift;
      __syncthreads();
    }
    __syncthreads();
  }
};

}  // namespace tactic::cuda
