#include "accel_device.h"

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <mutex>
#include <set>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include "log.h"
#include "tactic/attention.h"
#include "tactic/error.h"

namespace tactic::plugin {

namespace {

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// fn(begin, end) for the rows of a write; few elements are not worth a second thread.
template <class Fn>
void share_rows(int num_threads, int64_t rows, int64_t row_elements, Fn fn) {
  if (rows * row_elements < 32768 || num_threads == 1) {
    fn(int64_t{0}, rows);
    return;
  }
#pragma omp parallel num_threads(num_threads > 0 ? num_threads : omp_get_max_threads())
  {
    const int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
    fn(rows * part / parts, rows * (part + 1) / parts);
  }
}

// The same options without the limits that only decide what is taken over.
PluginOptions without_limits(const PluginOptions& options) {
  PluginOptions any = options;
  any.enabled = any.accept_any = true;
  any.min_context = 0;
  any.max_rows = std::numeric_limits<int32_t>::max();
  return any;
}

// Prefill attention is not ours, but its tensors say how the cache is laid out before the first cells are written.
void note_geometry(const ggml_tensor* op, const PluginOptions& options) {
  const std::optional<AttentionMatch> match = match_attention(op, without_limits(options));
  const ggml_tensor* cache = match ? match->k->view_src : nullptr;
  if (cache == nullptr || cache->data == nullptr || cache->buffer == nullptr ||
      !ggml_backend_buffer_is_host(cache->buffer))
    return;
  if (shared().watch.layer_of(*match, options.index) != nullptr && !views_filled_cache(op))
    shared().watch.note_empty(*match);
}

// Says once what keeps attention over a cache with the host. As an error, since llama.cpp shows no less by default.
void note_unsupported(const ggml_tensor* op, const PluginOptions& options) {
  if (op->src[1]->view_src == nullptr || op->src[0]->ne[1] > options.max_rows) return;
  const std::string what = unsupported(op);
  if (what.empty()) return;
  static std::mutex mutex;
  static std::set<std::string> said;
  const std::lock_guard lock(mutex);
  if (said.insert(what).second) log_error("%s is not supported: such attention is left to llama.cpp", what.c_str());
}

/// The mask rows of the step under way as bits. Every layer shows the same mask, so the last few rows are kept and
/// compared.
struct MaskRow {
  std::vector<ggml_fp16_t> values;
  std::vector<uint64_t> visible;
  std::vector<float> bias;  // filled when other values than 0 and -infinity occur
  int64_t num_visible = 0;

  void set(const ggml_fp16_t* mask, int64_t n_kv) {
    const auto n = static_cast<size_t>(n_kv);
    if (values.size() == n && std::memcmp(values.data(), mask, n * sizeof(ggml_fp16_t)) == 0) return;
    values.assign(mask, mask + n);
    visible.assign((n + 63) / 64, 0);
    bias.clear();
    num_visible = 0;
    bool plain = true;
    for (size_t i = 0; i < n; ++i) {
      const bool zero = (mask[i] & 0x7fff) == 0, hidden = mask[i] == 0xfc00;
      plain = plain && (zero || hidden);
      visible[i / 64] |= static_cast<uint64_t>(!hidden) << (i % 64);
      num_visible += !hidden;
    }
    if (plain) return;
    bias.resize(n);
    for (size_t i = 0; i < n; ++i) bias[i] = ggml_fp16_to_fp32(mask[i]);
  }
  void set_all(int64_t n_kv) {
    values.clear();
    bias.clear();
    num_visible = n_kv;
    visible.assign(static_cast<size_t>((n_kv + 63) / 64), ~uint64_t{0});
    if (n_kv % 64 != 0) visible.back() = (uint64_t{1} << (n_kv % 64)) - 1;
  }
};

class AccelBackend {
 public:
  int num_threads = 0;

  ggml_status compute(ggml_cgraph* graph) {
    const std::shared_ptr<const PluginOptions> options = shared().options();
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
      ggml_tensor* node = ggml_graph_node(graph, i);
      if (ggml_is_empty(node)) continue;
      if (node->op == GGML_OP_SET_ROWS) {
        write(node, *options);
      } else if (node->op == GGML_OP_FLASH_ATTN_EXT) {
        attend(node, *options);
      }
    }
    return GGML_STATUS_SUCCESS;
  }

 private:
  void write(const ggml_tensor* node, const PluginOptions& options) {
    check_cells(node);
    const int64_t begin = now_ns(), rows = rows_to_store(node);
    share_rows(num_threads, rows, node->ne[0], [&](int64_t first, int64_t last) { store_rows(node, first, last); });
    shared().stats.add_write(now_ns() - begin);
    try {
      index_rows(node, options);
    } catch (const std::exception& error) {  // most likely memory; the rows are there, and are read densely
      log_error("%s is not indexed: %s", node->name, error.what());
      shared().watch.clear();
    }
  }

  void index_rows(const ggml_tensor* node, const PluginOptions& options) {
    const std::shared_ptr<CacheLayer> layer = shared().watch.note_write(node, options);
    if (layer == nullptr) return;
    shared().watch.set_owner(*layer, this);
    if (!options.enabled || options.decode.select == Select::kDense || options.index.clustering == Clustering::kWhole)
      return;
    const int64_t begin = now_ns();
    for (size_t s = 0; s < layer->streams.size(); ++s) {
      // Prefill pays for its clusters as it goes; decode steps have their own budget.
      const StreamIndex& stream = *layer->streams[s];
      if (static_cast<int64_t>(stream.written.size()) > options.max_rows && !stream.stays_short())
        maintain(*layer, s, -1);
    }
    shared().stats.add_clustering(now_ns() - begin);
  }

  void maintain(CacheLayer& layer, size_t stream, double budget) {
    KvIndex& index = layer.streams[stream]->index;
    index.set_num_threads(num_threads);
    index.maintain(layer.stream_view(stream), budget);
  }

  // The work on indexes that one decode step may do for one layer: a full segment every 16th step, a few small ones
  // every fourth, so that layers take turns. An index that lags far behind (state restored, watched late) is built at
  // once.
  static double budget_of(const CacheLayer& layer, const StreamIndex& stream) {
    const KvIndex& index = stream.index;
    const int64_t behind = index.rows_written() - index.rows_indexed();
    if (behind > 4 * index.options().provisional_tokens + index.options().sink_tokens) return -1;
    const auto turn = static_cast<uint64_t>(layer.layer) + stream.steps;
    return turn % 16 == 0 ? 1.0 : turn % 4 == 0 ? 0.25 : 0.0;
  }

  void attend(ggml_tensor* node, const PluginOptions& options) {
    // A graph built under other options is computed all the same.
    const std::optional<AttentionMatch> match = match_attention(node, without_limits(options));
    if (!match) throw Error(std::string("attention node ") + node->name + " cannot be computed here");
    const bool offered = shared().decoder.is_set() && match->rows() == 1;
    const bool indexed = options.enabled && options.decode.select != Select::kDense && !offered;
    const std::shared_ptr<CacheLayer> layer = indexed || offered ? watched_layer(*match, options) : nullptr;
    const int64_t num_queries = match->rows() * match->streams();
    queries_.assign(static_cast<size_t>(num_queries), {});
    stats_.resize(static_cast<size_t>(num_queries));
    if (masks_.size() < static_cast<size_t>(num_queries)) masks_.resize(static_cast<size_t>(num_queries));
    if (layer != nullptr) shared().watch.set_owner(*layer, this);
    const int64_t cluster_begin = now_ns();
    for (int64_t stream = 0; stream < match->streams(); ++stream) {
      const auto first = static_cast<size_t>(stream * match->rows());
      for (int64_t row = 0; row < match->rows(); ++row) {
        const ggml_fp16_t* mask = options.faults.ignore_mask ? nullptr : match->mask_row(row, stream);
        MaskRow& bits = masks_[first + static_cast<size_t>(row)];
        mask != nullptr ? bits.set(mask, match->k->ne[1]) : bits.set_all(match->k->ne[1]);
      }
      const size_t of_cache = layer != nullptr ? layer->first_stream(*match) + static_cast<size_t>(stream) : 0;
      const std::span rows(masks_.data() + first, static_cast<size_t>(match->rows()));
      const bool ready = indexed && layer != nullptr && prepare(*layer, of_cache, rows, options);
      for (int64_t row = 0; row < match->rows(); ++row) {
        const size_t at = first + static_cast<size_t>(row);
        const MaskRow& bits = masks_[at];
        DecodeQuery& query = queries_[at];
        query.q = match->query(row, stream);
        query.q_head_stride = static_cast<int64_t>(match->q->nb[2] / sizeof(float));
        query.num_q_heads = static_cast<int32_t>(match->q->ne[2]);
        query.sm_scale = match->sm_scale;
        query.kv = match->view(stream);
        query.visible = bits.visible.data();
        query.bias = bits.bias.empty() ? nullptr : bits.bias.data();
        query.position = bits.num_visible;
        query.stream_id = static_cast<uint64_t>(row);
        query.out = match->output(row, stream);
        query.out_head_stride = static_cast<int64_t>(match->out->nb[1] / sizeof(float));
        if (layer != nullptr) query.layer = layer->layer;
        if (ready) use_index(*layer, of_cache, row, options, bits, query);
      }
    }
    const int64_t attend_begin = now_ns();
    if (layer != nullptr) shared().stats.add_clustering(attend_begin - cluster_begin);
    if (!offered || !shared().decoder.answer(queries_, stats_.data())) run(*node, options);
    for (const StepStats& stats : stats_) {
      if (stats.dense == DenseReason::kRowChanged) shared().watch.note_changed_row();
    }
    const ggml_tensor* cache = match->k->view_src != nullptr ? match->k->view_src : match->k;
    if (first_cache_ == nullptr) first_cache_ = cache->data;
    const int32_t after = cache->data == first_cache_ ? 0 : node_layer_ + 1;  // where no index and no name says it
    node_layer_ = layer != nullptr ? layer->layer : layer_number(cache, static_cast<size_t>(after));
    shared().stats.add_node(stats_.data(), num_queries, node_layer_, now_ns() - attend_begin);
  }

  static std::shared_ptr<CacheLayer> watched_layer(const AttentionMatch& match, const PluginOptions& options) {
    try {
      return shared().watch.layer_of(match, options.index);
    } catch (const std::exception& error) {  // most likely memory
      log_error("%s is read densely: %s", match.out->name, error.what());
      return nullptr;
    }
  }

  void run(const ggml_tensor& node, const PluginOptions& options) {
    attention_.set_options(options.decode);
    attention_.set_num_threads(num_threads);
    try {
      attention_.run(queries_, stats_.data());
    } catch (const std::exception& error) {  // most likely memory: exact attention over the cache needs next to none
      log_error("%s is read densely: %s", node.name, error.what());
      for (DecodeQuery& query : queries_) query.index = nullptr, query.head_stats = nullptr;
      attention_.run(queries_, stats_.data());
    }
  }

  // Makes the index of a stream fit what the node's rows show of it, which may be of several sequences. Returns whether
  // one of them is long enough to use it.
  bool prepare(CacheLayer& layer, size_t stream, std::span<const MaskRow> rows, const PluginOptions& options) {
    if (stream >= layer.streams.size()) return false;
    StreamIndex& entry = *layer.streams[stream];
    try {
      int64_t longest = 0;
      for (const MaskRow& row : rows) {
        const bool begins = &row == rows.data() && entry.begin_step(row.visible, row.num_visible, options.max_rows);
        shared().watch.before_step(layer, stream, row.visible, begins, options.faults);
        longest = std::max(longest, row.num_visible);
      }
      entry.note_length(longest < options.min_context);
      if (longest < options.min_context) return false;
      maintain(layer, stream, budget_of(layer, entry));
      return true;
    } catch (const std::exception& error) {
      log_error("layer %d is read densely: %s", layer.layer, error.what());
      entry.index.clear();
      return false;
    }
  }

  void use_index(CacheLayer& layer, size_t stream, int64_t row, const PluginOptions& options, const MaskRow& bits,
                 DecodeQuery& query) {
    query.stream_id += stream * 64;
    if (bits.num_visible < options.min_context) return;
    try {
      StreamIndex& entry = *layer.streams[stream];
      query.index = &entry.index;
      query.tau_factor = entry.tau_factor();
      if (options.decode.select == Select::kSample) name_likely_rows(layer, stream, options.places, bits, query);
    } catch (const std::exception& error) {
      log_error("layer %d is read densely: %s", layer.layer, error.what());
      layer.streams[stream]->index.clear();
      return;
    }
    if (!options.inspect || row != 0) return;
    layer.last_step.assign(static_cast<size_t>(query.kv.num_kv_heads), {});
    layer.last_kv_len = bits.num_visible;
    layer.last_stream = stream;
    query.head_stats = layer.last_step.data();
  }

  // The first layer finds them, for itself and for the layers after it that show the same cells.
  void name_likely_rows(CacheLayer& layer, size_t stream, int32_t places, const MaskRow& bits, DecodeQuery& query) {
    const auto at = static_cast<size_t>(&query - queries_.data());
    if (likely_.size() <= at) likely_.resize(at + 1);
    Likely& likely = likely_[at];
    if (layer.layer == 0) {
      likely.cells = layer.cells;
      likely.visible = bits.num_visible;
      StreamIndex& entry = *layer.streams[stream];
      entry.earlier_places.find(layer.stream_view(stream), bits.visible, entry.written, places, likely.rows);
    }
    if (likely.cells != layer.cells || likely.visible != bits.num_visible) return;
    query.likely_rows = likely.rows.data();
    query.num_likely_rows = static_cast<int32_t>(likely.rows.size());
  }

  struct Likely {
    int64_t cells = 0, visible = 0;  // where these rows are rows
    std::vector<int32_t> rows;
  };

  Attention attention_;
  std::vector<Likely> likely_;  // one per query of a node
  std::vector<DecodeQuery> queries_;
  std::vector<StepStats> stats_;
  std::vector<MaskRow> masks_;         // one per query of a node
  int32_t node_layer_ = -1;            // of the node before
  const void* first_cache_ = nullptr;  // of the first node that was computed
};

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
  return "Tactic sparse decode attention on the CPU, on without --device";
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

ggml_backend_t device_init(ggml_backend_dev_t device, const char*) {
  auto* backend = new ggml_backend{};
  backend->guid = backend_guid();
  backend->iface.get_name = backend_name;
  backend->iface.free = backend_free;
  backend->iface.graph_compute = backend_compute;
  backend->device = device;
  backend->context = new AccelBackend;
  return backend;
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
          note_unsupported(op, *options);
        } catch (const std::exception& error) {  // whether it can be computed does not depend on what is noted
          log_error("%s: %s", op->name, error.what());
        }
      }
      return match_attention(op, *options).has_value();
    }
    default: return false;
  }
}

bool device_supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t type) {
  return ggml_backend_buft_is_host(type);
}

}  // namespace

std::shared_ptr<const PluginOptions> Shared::options() const {
  const std::lock_guard lock(mutex_);
  return options_;
}

void Shared::set_options(const PluginOptions& options) {
  const std::lock_guard lock(mutex_);
  if (!(options.index == options_->index)) watch.clear();
  options_ = std::make_shared<PluginOptions>(options);
}

Shared& shared() {
  static Shared* instance = new Shared;  // outlives static destruction of the host
  return *instance;
}

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

std::string inspect_json() {
  std::ostringstream json;
  json << "{\"layers\": [";
  const char* separator = "";
  shared().watch.for_each([&](const CacheLayer& layer) {
    if (layer.last_step.empty()) return;
    const KvIndex& index = layer.streams[layer.last_stream]->index;
    json << separator << "{\"layer\": " << layer.layer << ", \"stream\": " << layer.last_stream
         << ", \"kv_len\": " << layer.last_kv_len << ", \"heads\": [";
    separator = ", ";
    for (size_t head = 0; head < layer.last_step.size(); ++head) {
      const HeadStats& s = layer.last_step[head];
      json << (head > 0 ? ", " : "") << "{\"clusters\": " << index.num_clusters()
           << ", \"mean_spread\": " << index.mean_spread(static_cast<int32_t>(head)) << ", \"beta\": " << s.beta
           << ", \"tokens\": " << s.tokens << ", \"exact_tokens\": " << s.exact_tokens
           << ", \"exact_mass\": " << s.exact_mass << ", \"estimated_mass\": " << s.estimated_mass
           << ", \"tau\": " << (std::isfinite(s.tau) ? s.tau : 0) << "}";
    }
    json << "]}";
  });
  json << "]}";
  return json.str();
}

void set_num_threads(ggml_backend_t backend, int num_threads) { self(backend)->num_threads = num_threads; }

}  // namespace tactic::plugin
