#include "gpu_hook.h"

#include <cstring>
#include <exception>
#include <mutex>
#include <unordered_map>

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
};

struct Hooks {
  std::mutex mutex;
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

/// Nodes [begin, end) by the backend itself.
ggml_status compute_part(const Hooked& h, ggml_backend_t backend, ggml_cgraph* graph, int begin, int end) {
  if (begin >= end) return GGML_STATUS_SUCCESS;
  ggml_cgraph part = ggml_graph_view(graph, begin, end);
  return h.compute(backend, &part);
}

ggml_status compute_hooked(ggml_backend_t backend, ggml_cgraph* graph) {
  Hooked& h = *hooked(backend);
  GpuGraph found;
  std::vector<size_t> taken;
  try {
    const std::shared_ptr<const PluginOptions> options = shared().options();
    found = look_at(graph, *options);
    taken = h.attention->begin(found, options);
  } catch (const std::exception& error) {
    log_error("a step is left to llama.cpp: %s", error.what());
    taken.clear();
  }
  if (taken.empty()) return h.compute(backend, graph);
  int done = 0;
  for (const size_t i : taken) {
    const GpuGraph::Node& node = found.decode[i];
    const ggml_status status = compute_part(h, backend, graph, done, node.at);
    if (status != GGML_STATUS_SUCCESS) return status;
    done = node.at;
    try {
      h.attention->attend(node);
      done = node.at + 1;
    } catch (const std::exception& error) {
      log_error("%s is left to llama.cpp: %s", node.match.out->name, error.what());
    }
  }
  const ggml_status status = compute_part(h, backend, graph, done, ggml_graph_n_nodes(graph));
  try {
    h.attention->end();
  } catch (const std::exception& error) {
    log_error("%s", error.what());
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
    auto h = std::make_unique<Hooked>(Hooked{backend->iface.graph_compute, backend->iface.free, hooks().make(backend)});
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
  for (const auto& [backend, h] : hooks().backends) h->attention->flush();
}

void gpu_memory(int64_t& index_bytes, int64_t& kv_bytes) {
  const std::lock_guard lock(hooks().mutex);
  for (const auto& [backend, h] : hooks().backends) h->attention->memory(index_bytes, kv_bytes);
}

}  // namespace tactic::plugin
