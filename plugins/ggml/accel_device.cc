#include "accel_device.h"

#include <exception>
#include <mutex>
#include <set>
#include <string>

#include "accel_backend.h"
#include "log.h"
#include "match.h"
#include "shared.h"

namespace tactic::plugin {

namespace {

// Prefill attention is not ours, but its tensors say how the cache is laid out before the first cells are written.
void note_geometry(const ggml_tensor* op, const PluginOptions& options) {
  const std::optional<AttentionMatch> match = readable_attention(op);
  const ggml_tensor* cache = match ? match->k->view_src : nullptr;
  if (cache == nullptr || cache->data == nullptr || cache->buffer == nullptr ||
      !ggml_backend_buffer_is_host(cache->buffer))
    return;
  if (shared().watch.layer_of(*match, options.index) != nullptr && !views_filled_cache(op))
    shared().watch.note_empty(*match);
}

// Says once what keeps attention over a cache with the host. As an error, since llama.cpp shows no less by default.
void note_unsupported(const ggml_tensor* op) {
  if (op->src[1]->view_src == nullptr || op->src[0]->ne[1] > kMaxRows) return;
  const std::string what = unsupported(op);
  if (what.empty()) return;
  static std::mutex mutex;
  static std::set<std::string> said;
  const std::lock_guard lock(mutex);
  if (said.insert(what).second) log_error("%s is not supported: such attention is left to llama.cpp", what.c_str());
}

AccelBackend* self(ggml_backend_t backend) { return static_cast<AccelBackend*>(backend->context); }

const char* backend_name(ggml_backend_t) { return "TACTIC"; }

void backend_free(ggml_backend_t backend) {
  shared().watch.forget(self(backend));
  delete self(backend);
  delete backend;
}

ggml_status backend_compute(ggml_backend_t backend, ggml_cgraph* graph) {
  try {
    return self(backend)->compute(graph);
  } catch (const std::exception& error) {
    log_error("%s", error.what());
  } catch (...) {
    log_error("unknown error");
  }
  return GGML_STATUS_FAILED;
}

const char* device_name(ggml_backend_dev_t) { return "TACTIC"; }
const char* device_description(ggml_backend_dev_t) {
#ifdef TACTIC_PLUGIN_CUDA
  return "Tactic sparse decode attention on the CPU and CUDA devices, on without --device";
#else
  return "Tactic sparse decode attention on the CPU, on without --device";
#endif
}
void device_memory(ggml_backend_dev_t, size_t* free, size_t* total) { *free = *total = 0; }
enum ggml_backend_dev_type device_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_ACCEL; }

// Tensors mapped from a file are host memory like any other. Older versions of ggml have no such field and do not ask.
template <class Caps>
void allow_mmap(Caps& caps) {
  if constexpr (requires { caps.mmap_support; }) caps.mmap_support = true;
}

void device_props(ggml_backend_dev_t device, ggml_backend_dev_props* props) {
  *props = {};
  props->name = device_name(device);
  props->description = device_description(device);
  props->type = device_type(device);
  allow_mmap(props->caps);
}

ggml_guid_t backend_guid() {
  static ggml_guid guid = {0x74, 0x61, 0x63, 0x74, 0x69, 0x63, 0x2d, 0x61,
                           0x63, 0x63, 0x65, 0x6c, 0x2d, 0x63, 0x70, 0x75};
  return &guid;
}

ggml_backend_t device_init(ggml_backend_dev_t device, const char*) try {
  auto context = std::make_unique<AccelBackend>();
  auto* backend = new ggml_backend{};
  backend->guid = backend_guid();
  backend->iface.get_name = backend_name;
  backend->iface.free = backend_free;
  backend->iface.graph_compute = backend_compute;
  backend->device = device;
  backend->context = context.release();
  return backend;
} catch (const std::exception& error) {
  log_error("no backend: %s", error.what());
  return nullptr;
}

// The CPU's own buffer type object: the scheduler compares pointers. With a GPU it becomes that GPU's pinned host type.
ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t) {
  for (const enum ggml_backend_dev_type type : {GGML_BACKEND_DEVICE_TYPE_GPU, GGML_BACKEND_DEVICE_TYPE_IGPU}) {
    ggml_backend_dev_t gpu = ggml_backend_dev_by_type(type);
    ggml_backend_buffer_type_t host = gpu != nullptr ? ggml_backend_dev_host_buffer_type(gpu) : nullptr;
    if (host != nullptr) return host;
  }
  ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  return cpu != nullptr ? ggml_backend_dev_buffer_type(cpu) : nullptr;
}

bool device_supports_op(ggml_backend_dev_t, const ggml_tensor* op) {
  switch (op->op) {
    case GGML_OP_NONE:
    case GGML_OP_RESHAPE:
    case GGML_OP_VIEW:
    case GGML_OP_PERMUTE:
    case GGML_OP_TRANSPOSE: return true;
    case GGML_OP_SET_ROWS: return shared().options()->enabled && match_write(op);
    case GGML_OP_FLASH_ATTN_EXT: {
      const std::shared_ptr<const PluginOptions> options = shared().options();
      if (options->enabled && options->decode.select != Select::kDense) {
        try {
          note_geometry(op, *options);
          note_unsupported(op);
        } catch (const std::exception& error) {  // whether it can be computed does not depend on what is noted
          log_error("%s: %s", op->name, error.what());
        }
      }
      return takes_attention(op, *options);
    }
    default: return false;
  }
}

bool device_supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t type) {
  return ggml_backend_buft_is_host(type);
}

}  // namespace

ggml_backend_dev_t accel_device(ggml_backend_reg_t reg) {
  static ggml_backend_device device = [&] {
    ggml_backend_device d{};
    d.iface.get_name = device_name;
    d.iface.get_description = device_description;
    d.iface.get_memory = device_memory;
    d.iface.get_type = device_type;
    d.iface.get_props = device_props;
    d.iface.init_backend = device_init;
    d.iface.get_buffer_type = device_buffer_type;
    d.iface.supports_op = device_supports_op;
    d.iface.supports_buft = device_supports_buft;
    d.reg = reg;
    return d;
  }();
  return &device;
}

void set_num_threads(ggml_backend_t backend, int num_threads) { self(backend)->num_threads = num_threads; }

}  // namespace tactic::plugin
