// What several baselines share.
#pragma once

#include <array>

#include "baselines/baseline.h"

namespace tactic::eval {

/// The rows that a method chooses from: all but the first sinks and those from `end` on, which are read exactly.
struct Range {
  int64_t begin = 0, end = 0;
  int64_t size() const { return end - begin; }
};

/// [sinks, kv_len - recent), for methods that keep up with every new row.
Range open_rows(const BaselineSpec& spec, int64_t kv_len);
/// The same at the end of the prompt: an index over these is built once, later rows are read exactly.
Range prompt_rows(const BaselineSpec& spec, const Layer& layer);

/// Which rows are read, per KV head.
class Marks {
 public:
  /// All rows outside `open` are marked.
  Marks(const Step& step, Range open);
  void set(int32_t kv_head, int64_t row) { marked_[static_cast<size_t>(kv_head)][static_cast<size_t>(row)] = 1; }
  bool test(int32_t kv_head, int64_t row) const {
    return marked_[static_cast<size_t>(kv_head)][static_cast<size_t>(row)] != 0;
  }
  /// Marked rows in ascending order, all certain. Forgets what was in `out`.
  void write(Choice& out) const;

 private:
  std::vector<std::vector<uint8_t>> marked_;
};

/// Numbers 0 .. values.size() - 1 of the `count` largest values, largest first; equal ones in order.
std::vector<int32_t> largest(std::span<const float> values, int64_t count);

/// A partition of rows with the mean key of each part.
struct Clusters {
  int32_t head_dim = 0;
  std::vector<float> centroids;               // [size, head_dim]
  std::vector<std::vector<int32_t>> members;  // [size]

  int64_t size() const { return static_cast<int64_t>(members.size()); }
  std::vector<float> dots(const float* q) const;
};

/// Clusterings of one layer by (KV head, first row, end, cluster size, iterations, segment).
class ClusterCache {
 public:
  using Key = std::array<int64_t, 6>;
  std::map<Key, Clusters> found;
};

/// k-means over the keys of rows [range) in runs of at most `segment` rows; clusters that stay empty are left out.
Clusters cluster_keys(const Layer& layer, int32_t kv_head, Range range, int64_t cluster_tokens, int32_t iterations,
                      int64_t segment);
/// Runs of neighbors.
Clusters cluster_positions(const Layer& layer, int32_t kv_head, Range range, int64_t cluster_tokens);

std::unique_ptr<Baseline> make_oracle(const BaselineSpec& spec, const Layer& layer);
std::unique_ptr<Baseline> make_recent(const BaselineSpec& spec, const Layer& layer);
std::unique_ptr<Baseline> make_clusters(const BaselineSpec& spec, const Layer& layer);
std::unique_ptr<Baseline> make_quest(const BaselineSpec& spec, const Layer& layer);
std::unique_ptr<Baseline> make_eviction(const BaselineSpec& spec, const Layer& layer);
std::unique_ptr<Baseline> make_magicpig(const BaselineSpec& spec, const Layer& layer);
std::unique_ptr<Baseline> make_retroinfer(const BaselineSpec& spec, const Layer& layer);
std::unique_ptr<Baseline> make_vattention(const BaselineSpec& spec, const Layer& layer);

}  // namespace tactic::eval
