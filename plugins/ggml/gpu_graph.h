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
    kGoesOn,  // one row more than the step before, and nothing was written otherwise
    kLonger,  // some rows more: the ones that were there may have changed
    kBegins,  // another text, or this one taken back
  };
  /// A step sees kv_len rows and writes the last of them.
  Step step(int32_t kv_len);
  /// Rows were written by other than the step that is under way.
  void doubt() { doubtful_ = true; }
  /// DecodeQuery::tau_factor of the step under way.
  float tau_factor() const;

 private:
  int32_t kv_len_ = 0;
  uint64_t steps_ = 0;  // since the passage began
  bool doubtful_ = true;
};

}  // namespace tactic::plugin
