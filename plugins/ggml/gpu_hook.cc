#include "gpu_hook.h"

#include <cstring>
#include <exception>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

#include "log.h"
#include "shared.h"

namespace tactic::plugin {

namespace {

using Compute = decltype(ggml_backend_i::graph_compute);
using Free = decltype(ggml_backend_i::free);
using Init = decltype(ggml_backend_device_i::init_backend);

struct Hooked {
  Compute compute;  // the backend's own
  Free free;
  std::unique_ptr<GpuAttention> attention;
  GpuGraph found;  // in the graph before, looked at with these options
  std::shared_ptr<const PluginOptions> options;
  std::vector<std::unique_ptr<ggml_tensor>> marks;  // one for each part of a graph
  int32_t recordings = 0;
  std::string told;  // why steps were left to the host
};

struct Hooks {
  std::mutex mutex;
  // No backend may be freed while one records: ggml's own lock for that knows its own recordings alone.
  std::mutex recording;
  std::unordered_map<ggml_backend_dev_t, Init> devices;  // with their own functions
  std::unordered_map<ggml_backend_t, std::unique_ptr<Hooked>> backends;
  MakeGpuAttention make = nullptr;
};

Hooks& hooks() {
  static auto* instance = new Hooks;  // outlives static destruction of the host
  return *instance;
}

Hooked* hooked(ggml_backend_t backend) {
  const std::lock_guard lock(hooks().mutex);
  const auto at = hooks().backends.find(backend);
  return at != hooks().backends.end() ? at->second.get() : nullptr;
}

/// The backend's own computation of parts of a graph.
class Parts {
 public:
  Parts(Hooked& h, ggml_backend_t backend, ggml_cgraph* graph, bool recorded)
      : h_(h), backend_(backend), graph_(graph), recorded_(recorded) {}

  /// The nodes from where the last part ended.
  ggml_status compute_to(int end) {
    const int begin = std::exchange(done_, end);
    if (begin >= end) return GGML_STATUS_SUCCESS;
    ggml_cgraph part = ggml_graph_view(graph_, begin, end);
    if (!recorded_) return h_.compute(backend_, &part);
    // A graph that the CUDA backend knows it would record itself, which it cannot while it is recorded. One that begins
    // with a node that never looks the same is new to it.
    std::vector<ggml_tensor*> nodes = {next_mark()};
    nodes.insert(nodes.end(), part.nodes, part.nodes + part.n_nodes);
    part.nodes = nodes.data();
    ++part.n_nodes;
    return h_.compute(backend_, &part);
  }
  void skip(int nodes) { done_ += nodes; }

 private:
  ggml_tensor* next_mark() {
    if (marks_ == h_.marks.size()) h_.marks.push_back(std::make_unique<ggml_tensor>());
    ggml_tensor* mark = h_.marks[marks_++].get();
    mark->op_params[0] = h_.recordings;  // of an operation that does nothing, on no elements
    return mark;
  }

  Hooked& h_;
  ggml_backend_t backend_;
  ggml_cgraph* graph_;
  bool recorded_;
  int done_ = 0;
  size_t marks_ = 0;
};

ggml_status compute_cut(Hooked& h, ggml_backend_t backend, ggml_cgraph* graph, const GpuGraph& found,
                        const std::vector<size_t>& taken) {
  Parts parts(h, backend, graph, false);
  for (const size_t i : taken) {
    const GpuGraph::Node& node = found.decode[i];
    const ggml_status status = parts.compute_to(node.at);
    if (status != GGML_STATUS_SUCCESS) return status;
    try {
      h.attention->attend(node);
      parts.skip(1);
    } catch (const std::exception& error) {
      log_error("%s is left to llama.cpp: %s", node.match.out->name, error.what());
    }
  }
  return parts.compute_to(ggml_graph_n_nodes(graph));
}

/// Whether the graph can be replayed. Nothing is computed.
bool record(Hooked& h, ggml_backend_t backend, ggml_cgraph* graph, const GpuGraph& found,
            const std::vector<size_t>& taken) {
  const std::lock_guard lock(hooks().recording);
  try {
    h.attention->record();
  } catch (const std::exception& error) {
    log_error("steps are not recorded: %s", error.what());
    return false;
  }
  bool whole = true;
  try {
    ++h.recordings;
    Parts parts(h, backend, graph, true);
    for (const size_t i : taken) {
      whole = whole && parts.compute_to(found.decode[i].at) == GGML_STATUS_SUCCESS;
      h.attention->attend(found.decode[i]);
      parts.skip(1);
    }
    whole = whole && parts.compute_to(ggml_graph_n_nodes(graph)) == GGML_STATUS_SUCCESS;
  } catch (const std::exception& error) {
    log_error("steps are not recorded: %s", error.what());
    whole = false;
  }
  return h.attention->recorded(whole);
}

ggml_status compute_hooked(ggml_backend_t backend, ggml_cgraph* graph) {
  Hooked& h = *hooked(backend);
  const GpuGraph& found = h.found;
  std::vector<size_t> taken;
  try {
    std::shared_ptr<const PluginOptions> options = shared().options();
    if (graph->uid == 0 || graph->uid != h.found.uid || options != h.options) h.found = look_at(graph, *options);
    h.options = std::move(options);
    taken = h.attention->begin(found, h.options);
  } catch (const std::exception& error) {
    if (h.told != error.what()) log_error("steps are left to llama.cpp: %s", error.what());
    h.told = error.what();
    taken.clear();
  }
  if (taken.empty()) return h.compute(backend, graph);
  ggml_status status = GGML_STATUS_SUCCESS;
  try {
    const GpuAttention::Way way = h.attention->way(found, taken);
    const bool replay = way == GpuAttention::Way::kReplay ||
                        (way == GpuAttention::Way::kRecord && record(h, backend, graph, found, taken));
    if (replay) h.attention->replay();
    else status = compute_cut(h, backend, graph, found, taken);
    h.attention->end();
  } catch (const std::exception& error) {
    log_error("%s", error.what());
    return GGML_STATUS_FAILED;
  }
  return status;
}

void free_hooked(ggml_backend_t backend) {
  std::unique_ptr<Hooked> h;
  {
    const std::lock_guard lock(hooks().mutex);
    const auto at = hooks().backends.find(backend);
    h = std::move(at->second);
    hooks().backends.erase(at);
  }
  h->attention.reset();
  const std::lock_guard lock(hooks().recording);
  h->free(backend);
}

ggml_backend_t init_hooked(ggml_backend_dev_t device, const char* params) {
  Init init;
  {
    const std::lock_guard lock(hooks().mutex);
    init = hooks().devices.at(device);
  }
  ggml_backend_t backend = init(device, params);
  if (backend == nullptr) return nullptr;
  try {
    auto h = std::make_unique<Hooked>(
        Hooked{backend->iface.graph_compute, backend->iface.free, hooks().make(backend), {}, {}, {}, 0, {}});
    const std::lock_guard lock(hooks().mutex);
    hooks().backends[backend] = std::move(h);
  } catch (const std::exception& error) {
    log_error("%s is left to llama.cpp: %s", ggml_backend_dev_name(device), error.what());
    return backend;
  }
  backend->iface.graph_compute = compute_hooked;
  backend->iface.free = free_hooked;
  return backend;
}

}  // namespace

void hook_gpus(const char* registry, MakeGpuAttention make) {
  const std::lock_guard lock(hooks().mutex);
  hooks().make = make;
  for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
    ggml_backend_dev_t device = ggml_backend_dev_get(i);
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(device);
    if (reg == nullptr || std::strcmp(ggml_backend_reg_name(reg), registry) != 0) continue;
    if (device->iface.init_backend == init_hooked) continue;
    hooks().devices[device] = device->iface.init_backend;
    device->iface.init_backend = init_hooked;
  }
}

void flush_gpus() {
  const std::lock_guard lock(hooks().mutex);
  for (const auto& [backend, h] : hooks().backends) {
    try {
      h->attention->flush();
    } catch (const std::exception& error) {
      log_error("%s: %s", ggml_backend_name(backend), error.what());
    }
  }
}

void gpu_memory(int64_t& index_bytes, int64_t& kv_bytes) {
  const std::lock_guard lock(hooks().mutex);
  for (const auto& [backend, h] : hooks().backends) h->attention->memory(index_bytes, kv_bytes);
}

}  // namespace tactic::plugin
