// What a graph that is to run on a GPU does to caches. Looks at shapes alone, never at data, so it needs no GPU.
#pragma once

#include <cstdint>
#include <set>
#include <vector>

#include "ggml-impl.h"
#include "match.h"

namespace tactic::plugin {

struct GpuGraph {
  /// Attention of one row per stream, of a shape that the kernels are for, over a cache to which the same graph writes
  /// one row per stream.
  struct Node {
    int at;  // place in the graph
    AttentionMatch match;
    CacheGeometry cache;
    const ggml_tensor* cells;  // [streams] i64: where the step's rows go
    int32_t layer;
  };
  std::vector<Node> decode;
  /// Memory of tensors of which the graph writes a part in any other way.
  std::set<const void*> rewritten;
  uint64_t uid = 0;       // graphs of one number are the same, that of the graph before it too; 0: unknown
  bool may_wait = false;  // an operation may wait for the device, so that the graph cannot be recorded
};

GpuGraph look_at(ggml_cgraph* graph, const PluginOptions& options);

/// What steps have shown of one stream of a cache: whether a step goes on from the one before.
class GpuPassage {
 public:
  enum class Step {
    kGoesOn,  // the rows of the step before and one more, and no graph has written others
    kLonger,  // some rows more: the ones that were there may have changed
    kBegins,  // another text, or this one taken back
  };
  /// A step sees kv_len rows and writes the last of them; `rows` and `rows_before` are the same for the same rows, with
  /// and without that one.
  Step step(int32_t kv_len, uint32_t rows, uint32_t rows_before);
  /// Step after step begins anew (two texts in turn, a window that moves), so that no index is worth being made.
  bool restless() const { return begun_ > kManyBegun; }
  /// A graph has written rows that are not the step's under way.
  void doubt() { doubtful_ = true; }
  /// DecodeQuery::tau_factor of the step under way.
  float tau_factor() const;

 private:
  static constexpr int32_t kManyBegun = 8;
  int32_t kv_len_ = 0, begun_ = 0;  // steps that began, one after the other
  uint32_t rows_ = 0;
  uint64_t steps_ = 0;  // since the passage began
  bool doubtful_ = true;
};

}  // namespace tactic::plugin
