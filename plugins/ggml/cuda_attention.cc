#include "cuda_attention.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <string>
#include <tuple>
#include <unordered_map>

#include "cuda_memory.h"
#include "cuda_recording.h"
#include "log.h"
#include "shared.h"
#include "tactic/cuda.h"
#include "tactic/error.h"

namespace tactic::plugin {

namespace {

constexpr size_t kMaxMasks = 256;        // of a graph, counted for every stream
constexpr size_t kMaxRecords = 1 << 16;  // of a graph: KV heads of all nodes and streams
// From where on a selection pays: in a model, where the weights of a layer drive kernels and indexes out of the caches,
// one takes 30 to 60 us, hardly longer with more rows, and llama.cpp's attention reads at three fifths of the memory's
// rate (an H100, docs/kernels/cuda-decode.md).
constexpr double kBreakEvenSeconds = 45e-6, kDenseRate = 0.6;
constexpr int32_t kBuildEvery = 16;  // steps; layers take turns

struct Stream {
  std::unique_ptr<cuda::LayerIndex> index;
  GpuPassage passage;
};

struct Layer {
  CacheGeometry cache;
  std::vector<Stream> streams;
  bool refused = false;  // memory or shape do not allow an index: said once
};

cuda::DeviceRows device_rows(const RowsView& rows) {
  cuda::DeviceRows out;
  out.data = rows.data;
  out.dtype = rows.dtype;
  out.head_stride_bytes = rows.head_stride_bytes;
  out.token_stride_bytes = rows.token_stride_bytes;
  return out;
}

class CudaAttention final : public GpuAttention {
 public:
  /// The device must be the current one.
  CudaAttention(ggml_backend_t backend, int device) : backend_(backend), device_(device) {}
  /// Throws Error when the device cannot be served.
  void open();
  ~CudaAttention() override {
    cudaSetDevice(device_);
    cudaStreamSynchronize(stream_);
    try {
      take_records();
    } catch (const std::exception& error) {
      log_error("%s", error.what());
    }
    layers_.clear();
    decoders_.clear();
    if (given_ != nullptr) ggml_backend_event_free(given_);
    if (done_ != nullptr) ggml_backend_event_free(done_);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  std::vector<size_t> begin(const GpuGraph& graph, const std::shared_ptr<const PluginOptions>& options) override;
  void attend(const GpuGraph::Node& node) override;
  void end() override;
  Way way(const GpuGraph& graph, const std::vector<size_t>& taken) override;
  void record() override;
  bool recorded(bool whole) override;
  void replay() override;
  void flush() override;
  void memory(int64_t& index_bytes, int64_t& kv_bytes) const override;

 private:
  /// Where the values of a node's first stream stand in the mirrors; those of the others follow.
  struct Place {
    size_t mask, cells, query, record;
    const int32_t* tables;  // device, [streams, n_kv]
  };
  struct Pending {  // records on their way to the host
    cuda::DecodeBatch shape;
    int32_t streams, layer;
    size_t record;
  };

  cudaEvent_t event(ggml_backend_event_t e) const { return static_cast<cudaEvent_t>(e->context); }
  /// What is given to our stream from here on comes after what the backend was given; and the other way round.
  void after_backend() {
    ggml_backend_event_record(given_, backend_);
    check(cudaStreamWaitEvent(stream_, event(given_), 0), "wait");
  }
  void before_backend() {
    check(cudaEventRecord(event(done_), stream_), "record");
    ggml_backend_event_wait(backend_, done_);
  }

  using Layers = std::unordered_map<const void*, Layer>;
  void doubt(Layers::iterator layer) {
    if (layer == layers_.end()) return;
    for (Stream& stream : layer->second.streams) stream.passage.doubt();
  }
  void doubt_all() {
    for (auto at = layers_.begin(); at != layers_.end(); ++at) doubt(at);
  }
  /// Whether a node is worth being taken: whoever asks for exact attention, or names a length, gets it from there on.
  bool pays(const GpuGraph::Node& node) const {
    return options_->own_lengths || options_->decode.select == Select::kDense ||
           static_cast<double>(node.match.k->ne[1] * node.cache.row_bytes()) >= break_even_bytes_;
  }
  std::vector<size_t> take(const GpuGraph& graph, const std::shared_ptr<const PluginOptions>& options);
  void use(const std::shared_ptr<const PluginOptions>& options);
  void refuse(const GpuGraph::Node& node, Layer& layer, const char* why);
  void read_inputs(const GpuGraph& graph);
  void take_records();
  Layer& layer_of(const GpuGraph::Node& node);
  bool prepare(const GpuGraph::Node& node, const Place& place, Layer& layer);
  void run(const GpuGraph::Node& node);
  /// Whether the rows that a stream shows are not its first ones.
  bool paged(const Place& place, int64_t stream) const {
    const cuda::VisibleRows& visible = visible_.host[place.mask + static_cast<size_t>(stream)];
    return visible.count != visible.end;
  }
  cuda::DecodeBatch batch_of(const GpuGraph::Node& node, const Place& place, int64_t stream) const;
  cuda::Decode& decoder_of(const GpuGraph::Node& node);

  ggml_backend_t backend_;
  int device_;
  cudaStream_t stream_ = nullptr;
  ggml_backend_event_t given_ = nullptr, done_ = nullptr;
  std::shared_ptr<const PluginOptions> options_;
  double break_even_bytes_ = 0;                                                      // K and V of one stream of a layer
  Layers layers_;                                                                    // by the K cache's memory
  std::map<std::tuple<int64_t, int64_t, int64_t, int64_t>, cuda::Decode> decoders_;  // by heads, dimension and cells
  Mirror<cuda::VisibleRows> visible_{kMaxMasks};
  std::unordered_map<size_t, DeviceTable> tables_;  // by a mask's place: the cells that it shows
  Mirror<int64_t> cells_{kMaxMasks};
  Mirror<float> tau_factors_{kMaxRecords};
  Mirror<cuda::StepRecord> records_{kMaxRecords};
  std::unordered_map<int, Place> places_;  // by the node's place in the graph
  size_t num_records_ = 0;
  std::vector<Pending> pending_;
  std::string told_;    // why a layer was refused
  uint64_t setup_ = 0;  // counts changes of the objects that steps are made of
  CudaRecording recording_;
};

void CudaAttention::open() {
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
  // Whether this build has code for the device, before any step depends on it.
  cuda::visible_rows(records_.device, 16, 8, 1, visible_.device, nullptr, stream_);
  check(cudaStreamSynchronize(stream_), "CUDA device");
  int khz = 0, bits = 0;
  check(cudaDeviceGetAttribute(&khz, cudaDevAttrMemoryClockRate, device_), "device facts");
  check(cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, device_), "device facts");
  const double rate = khz > 0 && bits > 0 ? 2e3 * khz * bits / 8 : 1e12;  // some devices do not say
  break_even_bytes_ = rate * kDenseRate * kBreakEvenSeconds;
  ggml_backend_dev_t device = ggml_backend_get_device(backend_);
  given_ = ggml_backend_event_new(device);
  done_ = ggml_backend_event_new(device);
  if (given_ == nullptr || done_ == nullptr)
    throw Error("its backend was built without events (GGML_CUDA_NO_PEER_COPY)");
}

// Masks and cells are inputs of the graph: nothing of it has to be computed before, and what the host waits for here is
// what it has just uploaded.
void CudaAttention::read_inputs(const GpuGraph& graph) {
  places_.clear();
  std::map<const void*, size_t> masks, cells;
  size_t num_masks = 0, num_cells = 0, num_queries = 0;
  num_records_ = 0;
  after_backend();
  for (const GpuGraph::Node& node : graph.decode) {
    const auto streams = static_cast<size_t>(node.match.streams());
    const auto heads = static_cast<size_t>(node.match.k->ne[2]);
    const ggml_tensor* mask = node.match.mask;
    const auto [mask_at, new_mask] = masks.try_emplace(mask->data, num_masks);
    const auto [cells_at, new_cells] = cells.try_emplace(node.cells->data, num_cells);
    num_masks += new_mask ? streams : 0;
    num_cells += new_cells ? streams : 0;
    if (num_masks > kMaxMasks || num_cells > kMaxMasks || num_records_ + streams * heads > kMaxRecords) {
      throw Error("a graph must have at most " + std::to_string(kMaxMasks) + " masks and " +
                  std::to_string(kMaxRecords) + " KV heads, counted for every stream");
    }
    DeviceTable& table = tables_[mask_at->second];
    if (new_mask) {
      if (table.reserve(streams * static_cast<size_t>(node.cache.cells + 255))) ++setup_;  // of any length to come
      cuda::visible_rows(mask->data, static_cast<int64_t>(mask->nb[3]), static_cast<int32_t>(node.match.k->ne[1]),
                         static_cast<int32_t>(streams), visible_.device + mask_at->second, table.data, stream_);
    }
    if (new_cells) {
      check(cudaMemcpyAsync(cells_.host + cells_at->second, node.cells->data, streams * sizeof(int64_t),
                            cudaMemcpyDeviceToHost, stream_),
            "cells");
    }
    places_[node.at] = {mask_at->second, cells_at->second, num_queries, num_records_, table.data};
    num_queries += streams;
    num_records_ += streams * heads;
  }
  check(cudaMemcpyAsync(visible_.host, visible_.device, num_masks * sizeof(cuda::VisibleRows), cudaMemcpyDeviceToHost,
                        stream_),
        "masks");
  check(cudaStreamSynchronize(stream_), "masks");
}

std::vector<size_t> CudaAttention::begin(const GpuGraph& graph, const std::shared_ptr<const PluginOptions>& options) {
  try {
    return take(graph, options);
  } catch (...) {
    doubt_all();  // the graph is computed, whatever it writes
    throw;
  }
}

void CudaAttention::use(const std::shared_ptr<const PluginOptions>& options) {
  if (options_ == options) return;
  flush();
  if (options_ != nullptr && !(options_->index == options->index)) layers_.clear();
  for (auto& [memory, layer] : layers_) layer.refused = false;
  decoders_.clear();
  ++setup_;
  doubt_all();
  options_ = options;
}

std::vector<size_t> CudaAttention::take(const GpuGraph& graph, const std::shared_ptr<const PluginOptions>& options) {
  check(cudaSetDevice(device_), "CUDA device");
  use(options);
  for (auto at = layers_.begin(); at != layers_.end(); ++at) {
    if (graph.rewritten.contains(at->second.cache.k_cache) || graph.rewritten.contains(at->second.cache.v_cache))
      doubt(at);
  }
  std::vector<size_t> taken;
  if (std::none_of(graph.decode.begin(), graph.decode.end(), [&](const auto& node) { return pays(node); })) {
    for (const GpuGraph::Node& node : graph.decode) doubt(layers_.find(node.cache.k_cache));
    return taken;
  }
  read_inputs(graph);
  take_records();
  for (size_t i = 0; i < graph.decode.size(); ++i) {
    const GpuGraph::Node& node = graph.decode[i];
    Layer& layer = layer_of(node);
    if (layer.refused) continue;
    try {
      if (pays(node) && prepare(node, places_.at(node.at), layer)) taken.push_back(i);
      else doubt(layers_.find(node.cache.k_cache));
    } catch (const std::exception& error) {
      refuse(node, layer, error.what());
    }
  }
  if (!taken.empty()) {
    size_t queries = 0;
    for (const GpuGraph::Node& node : graph.decode) queries += static_cast<size_t>(node.match.streams());
    check(cudaMemcpyAsync(tau_factors_.device, tau_factors_.host, queries * sizeof(float), cudaMemcpyHostToDevice,
                          stream_),
          "factors");
  }
  return taken;
}

// Until the options or the cache are others. One cause may be met by every layer: it is told once.
void CudaAttention::refuse(const GpuGraph::Node& node, Layer& layer, const char* why) {
  if (why != told_) log_error("%s: layer %d is left to llama.cpp: %s", ggml_backend_name(backend_), node.layer, why);
  told_ = why;
  layer.refused = true;
}

Layer& CudaAttention::layer_of(const GpuGraph::Node& node) {
  Layer& layer = layers_[node.cache.k_cache];
  if (!layer.streams.empty() && layer.cache == node.cache) return layer;
  layer.refused = false;
  layer.cache = node.cache;
  ++setup_;
  layer.streams.clear();
  layer.streams.resize(static_cast<size_t>(node.cache.num_streams));
  return layer;
}

// All streams that the node shows are looked at before any index is changed.
bool CudaAttention::prepare(const GpuGraph::Node& node, const Place& place, Layer& layer) {
  const size_t first = node.cache.first_stream(node.match);
  const auto streams = static_cast<size_t>(node.match.streams());
  int32_t longest = 0;
  for (size_t s = 0; s < streams; ++s) {
    const cuda::VisibleRows visible = visible_.host[place.mask + s];
    const int64_t cell = cells_.host[place.cells + s] - static_cast<int64_t>(first + s) * node.cache.cells;
    // Where the step's row is not the last one that is shown, those after it have changed their numbers.
    if (visible.count <= 0 || cell != visible.end - 1 || first + s >= layer.streams.size()) return false;
    longest = std::max(longest, visible.count);
  }
  if (longest < options_->min_sparse) return false;
  decoder_of(node);
  for (size_t s = 0; s < streams; ++s) {
    Stream& stream = layer.streams[first + s];
    const cuda::VisibleRows visible = visible_.host[place.mask + s];
    const int32_t settled = visible.count - 1;  // rows that are there already
    const GpuPassage::Step step = stream.passage.step(visible.count, visible.rows, visible.rows_before);
    tau_factors_.host[place.query + s] = stream.passage.tau_factor();
    if (options_->decode.select == Select::kDense) continue;  // no index to keep
    if (stream.passage.restless()) return false;
    if (stream.index == nullptr) {
      ++setup_;
      stream.index = std::make_unique<cuda::LayerIndex>(
          options_->index, KvShape{node.cache.view.num_kv_heads, node.cache.view.head_dim, node.cache.view.v_head_dim},
          1, static_cast<int32_t>(node.cache.cells));
    }
    cuda::LayerIndex& index = *stream.index;
    const cuda::DecodeBatch batch = batch_of(node, place, static_cast<int64_t>(s));
    bool changed = false;
    if (step != GpuPassage::Step::kGoesOn && !options_->faults.skip_verify) {
      const int32_t indexed = index.rows_indexed(0);
      changed = index.verify(0, batch, settled, stream_) < indexed;
    }
    if (step == GpuPassage::Step::kBegins || changed) index.forget_learned(0, stream_);
    index.truncate(0, settled, stream_);
    const int32_t behind = settled - index.rows_indexed(0);
    const bool turn = (visible.count + node.layer) % kBuildEvery == 0;
    if (turn || behind > 4 * index.options().provisional_tokens) index.build(0, batch, settled, stream_);
  }
  return true;
}

cuda::DecodeBatch CudaAttention::batch_of(const GpuGraph::Node& node, const Place& place, int64_t stream) const {
  const KvView view = node.match.view(stream);
  cuda::DecodeBatch batch;
  batch.num_sequences = 1;
  batch.num_q_heads = static_cast<int32_t>(node.match.q->ne[2]);
  batch.num_kv_heads = view.num_kv_heads;
  batch.head_dim = view.head_dim;
  batch.sm_scale = node.match.sm_scale;
  batch.k = device_rows(view.k);
  batch.v = device_rows(view.v);
  batch.q_dtype = DType::kF32;
  batch.layer = node.layer;
  if (!paged(place, stream)) return batch;
  for (cuda::DeviceRows* rows : {&batch.k, &batch.v}) {
    rows->page_tokens = 1;
    rows->page_stride_bytes = rows->token_stride_bytes;
  }
  batch.page_tables = place.tables + stream * view.kv_len;
  batch.max_pages = static_cast<int32_t>(view.kv_len);
  return batch;
}

cuda::Decode& CudaAttention::decoder_of(const GpuGraph::Node& node) {
  const std::tuple key(node.match.q->ne[2], node.match.k->ne[2], node.match.k->ne[0], node.cache.cells);
  const auto at = decoders_.find(key);
  if (at != decoders_.end()) return at->second;
  cuda::DecodeLimits limits;
  limits.num_q_heads = static_cast<int32_t>(node.match.q->ne[2]);
  limits.num_kv_heads = node.cache.view.num_kv_heads;
  limits.head_dim = node.cache.view.head_dim;
  limits.max_rows = static_cast<int32_t>(node.cache.cells);
  limits.index = options_->index;
  return decoders_.try_emplace(key, options_->decode, limits).first->second;
}

void CudaAttention::attend(const GpuGraph::Node& node) {
  try {
    run(node);
  } catch (const std::exception& error) {
    std::erase_if(pending_, [&](const Pending& step) { return step.record == places_.at(node.at).record; });
    before_backend();  // what was launched writes to the node's output
    refuse(node, layers_.at(node.cache.k_cache), error.what());
    throw;
  }
}

void CudaAttention::run(const GpuGraph::Node& node) {
  const Place& place = places_.at(node.at);
  const size_t first = node.cache.first_stream(node.match);
  Layer& layer = layers_.at(node.cache.k_cache);
  cuda::Decode& decoder = decoder_of(node);
  after_backend();
  cuda::DecodeBatch batch;
  for (int64_t s = 0; s < node.match.streams(); ++s) {
    const auto i = static_cast<size_t>(s);
    batch = batch_of(node, place, s);
    batch.kv_lens = &visible_.device[place.mask + i].count;
    batch.q = node.match.query(0, s);
    batch.out = node.match.output(0, s);
    batch.tau_factors = tau_factors_.device + place.query + i;
    batch.learn = options_->decode.select == Select::kSample;
    const size_t record = place.record + i * static_cast<size_t>(batch.num_kv_heads);
    decoder.run(batch, layer.streams[first + i].index.get(), stream_, records_.device + record);
  }
  before_backend();
}

GpuAttention::Way CudaAttention::way(const GpuGraph& graph, const std::vector<size_t>& taken) {
  pending_.clear();
  CudaRecording::Key key{graph.uid, setup_, taken, {}};
  for (const size_t i : taken) {
    const GpuGraph::Node& node = graph.decode[i];
    const Place& place = places_.at(node.at);
    pending_.push_back(
        {batch_of(node, place, 0), static_cast<int32_t>(node.match.streams()), node.layer, place.record});
    for (int64_t s = 0; s < node.match.streams(); ++s) key.paged.push_back(paged(place, s));
  }
  return recording_.way(key, graph.may_wait);
}

void CudaAttention::record() {
  after_backend();
  recording_.begin(stream_);
  try {
    before_backend();  // from here on its stream is recorded too
  } catch (const Error&) {
    recording_.end(stream_, false);
    throw;
  }
}

bool CudaAttention::recorded(bool whole) {
  try {
    after_backend();
  } catch (const Error&) {
    whole = false;
  }
  return recording_.end(stream_, whole);
}

void CudaAttention::replay() {
  after_backend();
  recording_.launch(stream_);
  before_backend();
}

void CudaAttention::end() {
  check(cudaMemcpyAsync(records_.host, records_.device, num_records_ * sizeof(cuda::StepRecord), cudaMemcpyDeviceToHost,
                        stream_),
        "records");
}

void CudaAttention::take_records() {
  std::vector<StepStats> stats;
  bool changed = false;
  for (const Pending& step : pending_) {
    stats.clear();
    for (int32_t s = 0; s < step.streams; ++s) {
      const cuda::StepRecord* records =
          records_.host + step.record + static_cast<size_t>(s) * static_cast<size_t>(step.shape.num_kv_heads);
      stats.push_back(cuda::step_stats(records, step.shape, options_->index));
      for (int32_t head = 0; head < step.shape.num_kv_heads; ++head)
        changed = changed || records[head].dense == DenseReason::kRowChanged;
    }
    shared().stats.add_node(stats.data(), step.streams, step.layer, 0);
  }
  pending_.clear();
  if (changed) doubt_all();
}

void CudaAttention::flush() {
  if (pending_.empty()) return;
  check(cudaSetDevice(device_), "CUDA device");
  check(cudaStreamSynchronize(stream_), "records");
  take_records();
}

void CudaAttention::memory(int64_t& index_bytes, int64_t& kv_bytes) const {
  for (const auto& [memory, layer] : layers_) {
    for (const Stream& stream : layer.streams) {
      if (stream.index == nullptr) continue;
      index_bytes += static_cast<int64_t>(stream.index->memory_bytes());
      kv_bytes += layer.cache.cells * layer.cache.row_bytes();  // the index has room for all of them
    }
  }
}

}  // namespace

std::unique_ptr<GpuAttention> make_cuda_attention(ggml_backend_t backend) {
  ggml_backend_dev_props props;
  ggml_backend_dev_get_props(ggml_backend_get_device(backend), &props);
  int device = -1;
  if (props.device_id == nullptr || cudaDeviceGetByPCIBusId(&device, props.device_id) != cudaSuccess) {
    cudaGetLastError();
    throw Error(std::string("no CUDA device has the id ") + (props.device_id != nullptr ? props.device_id : "(none)"));
  }
  check(cudaSetDevice(device), "CUDA device");
  auto attention = std::make_unique<CudaAttention>(backend, device);
  attention->open();
  return attention;
}

}  // namespace tactic::plugin
