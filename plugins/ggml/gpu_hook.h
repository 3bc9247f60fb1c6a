// Sparse decode on a GPU whose backend is the host's own: llama.cpp's CUDA devices stay the devices that they are, but
// the backends they make pass us each graph before they compute it. Attention that we take is cut out of the graph, the
// parts before and after it are the backend's.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "ggml-backend-impl.h"
#include "gpu_graph.h"

namespace tactic::plugin {

/// Attention on one backend's device. Used by one thread at a time.
class GpuAttention {
 public:
  virtual ~GpuAttention() = default;

  /// Before any part of a graph is computed. Returns which of its decode nodes are taken, as places in `graph.decode`,
  /// rising. May throw: none are.
  virtual std::vector<size_t> begin(const GpuGraph& graph, const std::shared_ptr<const PluginOptions>& options) = 0;
  /// Computes a node that was taken, after what the backend was given before and before what it is given next. May
  /// throw: the backend computes it.
  virtual void attend(const GpuGraph::Node& node) = 0;
  /// After the last part.
  virtual void end() = 0;

  /// How a graph is computed of which nodes were taken. A graph that comes again is recorded whole, with what the
  /// backend does for its parts, and is launched at once from then on: cuts cost next to nothing there.
  enum class Way : uint8_t { kCut, kRecord, kReplay };
  virtual Way way(const GpuGraph& graph, const std::vector<size_t>& taken) = 0;
  /// What the backend and attend() are given is recorded instead of computed, until recorded().
  virtual void record() = 0;
  /// `whole`: all of it was given. Returns whether replay() can compute it.
  virtual bool recorded(bool whole) = 0;
  virtual void replay() = 0;

  /// What steps read so far goes to the statistics. Waits for the device.
  virtual void flush() = 0;
  /// Adds the bytes of all indexes, and of the K and V rows that they describe.
  virtual void memory(int64_t& index_bytes, int64_t& kv_bytes) const = 0;
};

using MakeGpuAttention = std::unique_ptr<GpuAttention> (*)(ggml_backend_t backend);

/// From now on backends of devices whose registry is called `registry` ("CUDA") are served. Those that exist stay as
/// they are.
void hook_gpus(const char* registry, MakeGpuAttention make);

/// Of all served backends. Only while none of them computes.
void flush_gpus();
void gpu_memory(int64_t& index_bytes, int64_t& kv_bytes);

}  // namespace tactic::plugin
