// Clusters by falling score of one query head, sorted only where needed; and a KV head's clusters, each read up to some
// member. What select_topk and select_fit share.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#include "core/steps.h"

namespace tactic::cpu {

/// The order of a query head's readable tokens: by falling dot of their clusters (ties: lower number), then by member.
class Ranking {
 public:
  explicit Ranking(const ClusterScores& scores) : sizes_(scores.sizes.data()), num_clusters_(scores.num_clusters) {
    for (int32_t c = 0; c < num_clusters_; ++c) num_tokens_ += static_cast<int64_t>(sizes_[c]);
  }

  int64_t num_tokens() const { return num_tokens_; }

  /// Begins anew with the dots [num_clusters] of another query head.
  void rank(const float* dots) {
    keys_.clear();
    for (int32_t c = 0; c < num_clusters_; ++c) {
      if (sizes_[c] > 0) keys_.push_back(uint64_t{falling(dots[c])} << 32 | static_cast<uint32_t>(c));
    }
    cuts_.assign({{0, 0}, {keys_.size(), num_tokens_}});
  }

  /// fn(cluster, first member, members) for the tokens [begin, end) of the order, in order if `sorted`.
  template <class Fn>
  void visit(int64_t begin, int64_t end, bool sorted, Fn fn) {
    if (begin >= end) return;
    const Cut first = place(begin), last = place(end - 1);
    if (sorted && last.at > first.at) std::sort(key_at(first.at + 1), key_at(last.at));
    int64_t before = first.tokens;
    for (size_t i = first.at; i <= last.at; ++i) {
      const auto c = static_cast<int32_t>(keys_[i] & UINT32_MAX);
      const auto size = static_cast<int64_t>(sizes_[c]);
      const int64_t from = std::max(begin - before, int64_t{0}), to = std::min(end - before, size);
      fn(c, from, to - from);
      before += size;
    }
  }

 private:
  // Everything before `at` ranks above everything from `at` on, and holds this many tokens.
  struct Cut {
    size_t at;
    int64_t tokens;
  };

  // As a whole number that rises when the score falls.
  static uint32_t falling(float dot) {
    const auto bits = std::bit_cast<uint32_t>(dot + 0.0f);  // one zero
    return (bits >> 31) != 0 ? bits : ~(bits | 0x80000000u);
  }

  std::vector<uint64_t>::iterator key_at(size_t i) { return keys_.begin() + static_cast<std::ptrdiff_t>(i); }
  int64_t size_at(size_t i) const { return static_cast<int64_t>(sizes_[keys_[i] & UINT32_MAX]); }

  // Puts the cluster that holds a token of the order where sorting would put it; the cut before it.
  Cut place(int64_t token) {
    const auto next =
        std::upper_bound(cuts_.begin(), cuts_.end(), token, [](int64_t t, const Cut& cut) { return t < cut.tokens; });
    Cut low = *std::prev(next);
    size_t end = next->at;
    while (end - low.at > 1) {
      const size_t middle = low.at + (end - low.at) / 2;
      std::nth_element(key_at(low.at), key_at(middle), key_at(end));
      int64_t tokens = low.tokens;
      for (size_t i = low.at; i < middle; ++i) tokens += size_at(i);
      if (token < tokens) {
        end = middle;
      } else if (token < tokens + size_at(middle)) {
        low = {middle, tokens};
        end = middle + 1;
      } else {
        low = {middle + 1, tokens + size_at(middle)};
      }
    }
    for (const Cut& cut : {low, Cut{low.at + 1, low.tokens + size_at(low.at)}}) {
      const auto at = std::lower_bound(cuts_.begin(), cuts_.end(), cut.tokens,
                                       [](const Cut& other, int64_t t) { return other.tokens < t; });
      if (at == cuts_.end() || at->tokens != cut.tokens) cuts_.insert(at, cut);
    }
    return low;
  }

  const float* sizes_;
  int32_t num_clusters_;
  int64_t num_tokens_ = 0;
  std::vector<uint64_t> keys_;  // the score in the high half, the cluster in the low half
  std::vector<Cut> cuts_;       // ascending, both ends included
};

/// fn(row) for the readable members [first, first + count) of one cluster. `stored`: all its members, readable or not.
template <class Fn>
void for_members(const Segment& segment, const uint16_t* members, int64_t stored, const RowFilter& filter,
                 bool all_readable, int64_t first, int64_t count, Fn fn) {
  for (int64_t m = all_readable ? first : 0; m < stored && count > 0; ++m) {
    const int64_t row = segment.row_begin + members[m];
    if (!all_readable && (!filter.reads_indexed(row) || first-- > 0)) continue;
    fn(static_cast<int32_t>(row));
    --count;
  }
}

/// Selects the first taken[c] readable members of every cluster, by cluster number.
inline void take_members(const IndexState& index, int32_t head, const RowFilter& filter, const ClusterScores& scores,
                         const std::vector<int32_t>& taken, HeadSelection& out) {
  out.clear();
  int32_t base = 0;
  for (const Segment& segment : index.segments) {
    const HeadClusters& clusters = segment.heads[static_cast<size_t>(head)];
    const uint16_t* members = clusters.members.data();
    for (int32_t c = 0; c < segment.num_clusters; ++c) {
      const int32_t stored = clusters.sizes[static_cast<size_t>(c)], count = taken[static_cast<size_t>(base + c)];
      const bool all_readable = scores.sizes[static_cast<size_t>(base + c)] == static_cast<float>(stored);
      for_members(segment, members, stored, filter, all_readable, 0, count,
                  [&](int32_t row) { out.tokens.push_back(row); });
      out.clusters.resize(out.tokens.size(), base + c);
      members += stored;
    }
    base += padded_clusters(segment.num_clusters);
  }
  out.log_weights.assign(out.tokens.size(), 0.0f);
  out.num_certain = static_cast<int64_t>(out.tokens.size());
}

}  // namespace tactic::cpu
