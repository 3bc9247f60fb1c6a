// What ggml loads: the registry entry, the functions found by name, and the check that this ggml is one we can serve.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "accel_device.h"
#include "ggml-impl.h"
#include "gpu_hook.h"
#include "log.h"
#include "plugin_api.h"
#include "shared.h"
#ifdef TACTIC_PLUGIN_CUDA
#include "cuda_attention.h"
#endif

static_assert(GGML_BACKEND_API_VERSION == 2, "the plug-in is written for version 2 of ggml's backend interface");

namespace tactic::plugin {
namespace {

void take_options(const char* text) {
  const PluginOptions options = parse_options(text);
  shared().set_options(options);
  if (!options.faults.any()) return;
  static const bool warned = (log_warning("fault= takes a safeguard out, answers may be wrong; it is for tests"), true);
  (void)warned;  // once: a host may configure before every step
}

extern "C" int tactic_configure(const char* options, char* error, size_t error_size) {
  try {
    take_options(options != nullptr ? options : "");
    return 0;
  } catch (const std::exception& e) {
    if (error != nullptr && error_size > 0) std::snprintf(error, error_size, "%s", e.what());
    return -1;
  }
}

extern "C" void tactic_take_totals(tactic_totals* totals) {
  flush_gpus();
  *totals = shared().stats.take();
  shared().watch.memory(totals->index_memory_bytes, totals->kv_memory_bytes);
  gpu_memory(totals->index_memory_bytes, totals->kv_memory_bytes);
}

extern "C" size_t tactic_inspect(char* json, size_t size) {
  try {
    const std::string text = inspect_json();
    if (json != nullptr && size > 0) std::snprintf(json, size, "%s", text.c_str());
    return text.size() + 1;
  } catch (const std::exception& e) {
    log_error("%s", e.what());
    return 0;
  }
}

extern "C" void tactic_set_decoder(tactic_decode_fn decode, void* user) { shared().decoder.set(decode, user); }

const char* reg_name(ggml_backend_reg_t) { return "TACTIC"; }
size_t reg_device_count(ggml_backend_reg_t) { return 1; }
ggml_backend_dev_t reg_device(ggml_backend_reg_t reg, size_t) { return accel_device(reg); }

void* reg_proc_address(ggml_backend_reg_t, const char* name) {
  struct Entry {
    const char* name;
    void* function;
  };
  const Entry entries[] = {
      {"ggml_backend_set_n_threads", reinterpret_cast<void*>(&set_num_threads)},
      {"tactic_configure", reinterpret_cast<void*>(&tactic_configure)},
      {"tactic_take_totals", reinterpret_cast<void*>(&tactic_take_totals)},
      {"tactic_inspect", reinterpret_cast<void*>(&tactic_inspect)},
      {"tactic_set_decoder", reinterpret_cast<void*>(&tactic_set_decoder)},
  };
  for (const Entry& entry : entries) {
    if (std::strcmp(entry.name, name) == 0) return entry.function;
  }
  return nullptr;
}

// Fields behind the tables of functions lie elsewhere when a function has been added, with the interface's version the
// same. The host is asked for those of objects of ours, which stand in room to look further back in.
bool tables_have_our_size() {
  struct {
    ggml_backend backend;
    char room[512];
  } of_backend{};
  struct {
    ggml_backend_device device;
    char room[512];
  } of_device{};
  ggml_backend_reg reg{};
  of_device.device.reg = &reg;
  of_backend.backend.device = &of_device.device;
  return ggml_backend_get_device(&of_backend.backend) == &of_device.device &&
         ggml_backend_dev_backend_reg(&of_device.device) == &reg;
}

// ggml promises no stable ABI. What we rely on, and a program can ask: the size of a tensor, the sizes of the tables of
// functions, and the numbers of the operations and types we name.
const char* abi_mismatch() {
  constexpr size_t kObjectBytes = 32;  // struct ggml_object, in ggml.c alone
  if (ggml_tensor_overhead() != sizeof(ggml_tensor) + kObjectBytes) return "tensors have another size";
  if (!tables_have_our_size()) return "backends have other functions";
  const struct {
    ggml_op op;
    const char* name;
  } ops[] = {{GGML_OP_NONE, "NONE"},       {GGML_OP_RESHAPE, "RESHAPE"},     {GGML_OP_VIEW, "VIEW"},
             {GGML_OP_PERMUTE, "PERMUTE"}, {GGML_OP_TRANSPOSE, "TRANSPOSE"}, {GGML_OP_SET_ROWS, "SET_ROWS"}};
  for (const auto& [op, name] : ops) {
    if (std::strcmp(ggml_op_name(op), name) != 0) return "operations have other numbers";
  }
  if (std::strcmp(ggml_op_name(GGML_OP_FLASH_ATTN_EXT), "FLASH_ATTN_EXT") != 0) return "operations have other numbers";
  const struct {
    ggml_type type;
    const char* name;
  } types[] = {{GGML_TYPE_F32, "f32"},   {GGML_TYPE_F16, "f16"}, {GGML_TYPE_BF16, "bf16"}, {GGML_TYPE_Q8_0, "q8_0"},
               {GGML_TYPE_Q4_0, "q4_0"}, {GGML_TYPE_I64, "i64"}, {GGML_TYPE_I32, "i32"}};
  for (const auto& [type, name] : types) {
    if (std::strcmp(ggml_type_name(type), name) != 0) return "types have other numbers";
  }
  return nullptr;
}

bool fits_this_ggml() {
  if (ggml_backend_reg_count() == 0) {  // a host with ggml inside it has brought its libraries a second time
    log_error(
        "the CPU backend is not to be seen: plug-ins need a llama.cpp with shared libraries that loads the CPU backend "
        "first; going on without sparse decode");
    return false;
  }
  const char* pretend = std::getenv("TACTIC_TEST_ABI_MISMATCH");  // for the test of the refusal
  const char* problem = pretend != nullptr ? pretend : abi_mismatch();
  if (problem == nullptr) return true;
  log_error(
      "built for ggml %s, this is %s (%s). Rebuild with TACTIC_LLAMA_DIR set to this llama.cpp's tree "
      "(its sources and build/bin/); going on without sparse decode",
      TACTIC_GGML_VERSION, ggml_version(), problem);
  return false;
}

void read_environment() {
  if (const char* text = std::getenv("TACTIC")) {
    try {
      take_options(text);
    } catch (const std::exception& error) {
      log_error("TACTIC=%s: %s; going on with the host's dense attention", text, error.what());
      PluginOptions off;
      off.enabled = false;
      shared().set_options(off);
    }
  } else {
    take_options("");
  }
  if (const char* path = std::getenv("TACTIC_STATS")) {
    shared().stats.open(path);
    std::atexit([] { shared().stats.open(""); });
  }
}

#ifdef TACTIC_PLUGIN_CUDA
// Graphs are cut, for which their layout must be known, and that is no part of ggml's interface.
bool graphs_have_our_layout() {
  ggml_context* context = ggml_init({ggml_tensor_overhead() * 4 + ggml_graph_overhead(), nullptr, true});
  ggml_cgraph* graph = ggml_new_graph(context);
  ggml_tensor* row = ggml_new_tensor_1d(context, GGML_TYPE_F32, 1);
  ggml_build_forward_expand(graph, ggml_scale(context, ggml_scale(context, row, 2), 2));
  const ggml_cgraph last = ggml_graph_view(graph, 1, 2);
  const bool same = graph->n_nodes == 2 && graph->nodes == ggml_graph_nodes(graph) && graph->uid == 0 &&
                    last.n_nodes == 1 && last.nodes == graph->nodes + 1 && last.use_counts == graph->use_counts;
  ggml_free(context);
  return same;
}
#endif

void serve_gpus() {
  if (ggml_backend_reg_by_name("CUDA") == nullptr) return;
#ifdef TACTIC_PLUGIN_CUDA
  const char* optimized = std::getenv("GGML_CUDA_GRAPH_OPT");
  if (optimized != nullptr && std::atoi(optimized) == 1)
    return log_error(
        "GGML_CUDA_GRAPH_OPT=1 computes branches side by side that end at attention: GPUs are left to llama.cpp");
  if (std::strcmp(ggml_version(), TACTIC_GGML_VERSION) == 0 && graphs_have_our_layout())
    return hook_gpus("CUDA", make_cuda_attention);
  log_error(
      "built for ggml %s, this is %s with graphs of its own: attention on GPUs is left to llama.cpp. Rebuild with "
      "TACTIC_LLAMA_DIR set to this llama.cpp's tree",
      TACTIC_GGML_VERSION, ggml_version());
#else
  log_warning("built without CUDA: attention on GPUs is left to llama.cpp");
#endif
}

}  // namespace
}  // namespace tactic::plugin

extern "C" {
GGML_BACKEND_API ggml_backend_reg_t ggml_backend_init(void);
}

ggml_backend_reg_t ggml_backend_init(void) {
  using namespace tactic::plugin;
  static ggml_backend_reg reg = {
      GGML_BACKEND_API_VERSION, {reg_name, reg_device_count, reg_device, reg_proc_address}, nullptr};
  static const bool fits = fits_this_ggml();
  if (!fits) return nullptr;
  static const bool read = (read_environment(), serve_gpus(), true);
  (void)read;
  return &reg;
}
