#include "accel_backend.h"

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <string>

#include "log.h"
#include "shared.h"
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

// The work on indexes that one decode step may do for one layer: a full segment every 16th step, a few small ones
// every fourth, so that layers take turns. An index that lags far behind (state restored, watched late) is built at
// once.
double budget_of(const CacheLayer& layer, const StreamIndex& stream) {
  const KvIndex& index = stream.index;
  const int64_t behind = index.rows_written() - index.rows_indexed();
  if (behind > 4 * index.options().provisional_tokens + index.options().sink_tokens) return -1;
  const auto turn = static_cast<uint64_t>(layer.layer) + stream.passages.current().steps;
  return turn % 16 == 0 ? 1.0 : turn % 4 == 0 ? 0.25 : 0.0;
}

// Of the rows that a step writes, the most that one of its queries sees: those of one sequence.
int64_t rows_of_a_sequence(const std::vector<int32_t>& written, std::span<const MaskRow> rows) {
  int64_t most = 0;
  for (const MaskRow& row : rows) {
    most = std::max<int64_t>(most, std::count_if(written.begin(), written.end(), [&](int32_t cell) {
                               const auto at = static_cast<size_t>(cell);
                               return at / 64 < row.visible.size() && (row.visible[at / 64] >> (at % 64) & 1) != 0;
                             }));
  }
  return most;
}

std::shared_ptr<CacheLayer> watched_layer(const AttentionMatch& match, const PluginOptions& options) {
  try {
    return shared().watch.layer_of(match, options.index);
  } catch (const std::exception& error) {  // most likely memory
    log_error("%s is read densely: %s", match.out->name, error.what());
    return nullptr;
  }
}

}  // namespace

ggml_status AccelBackend::compute(ggml_cgraph* graph) {
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

void AccelBackend::write(const ggml_tensor* node, const PluginOptions& options) {
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

void AccelBackend::index_rows(const ggml_tensor* node, const PluginOptions& options) {
  const std::shared_ptr<CacheLayer> layer = shared().watch.note_write(node, options);
  if (layer == nullptr) return;
  shared().watch.set_owner(*layer, this);
  if (!options.enabled || options.decode.select == Select::kDense) return;
  const int64_t begin = now_ns();
  for (size_t s = 0; s < layer->streams.size(); ++s) {
    if (static_cast<int64_t>(layer->streams[s]->written.size()) > kMaxRows) cluster_prompt(*layer, s, options);
  }
  shared().stats.add_clustering(now_ns() - begin);
}

// Prefill pays for its clusters as it goes; decode steps have their own budget.
void AccelBackend::cluster_prompt(CacheLayer& layer, size_t stream, const PluginOptions& options) {
  if (options.index.clustering != Clustering::kWhole && !layer.streams[stream]->stays_short())
    maintain(layer, stream, -1);
}

void AccelBackend::maintain(CacheLayer& layer, size_t stream, double budget) {
  KvIndex& index = layer.streams[stream]->index;
  index.set_num_threads(num_threads);
  index.maintain(layer.stream_view(stream), budget);
}

void AccelBackend::attend(ggml_tensor* node, const PluginOptions& options) {
  // A graph built under other options is computed all the same.
  const std::optional<AttentionMatch> match = readable_attention(node);
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
  bool prompt = false;
  for (int64_t stream = 0; stream < match->streams(); ++stream) {
    const auto first = static_cast<size_t>(stream * match->rows());
    for (int64_t row = 0; row < match->rows(); ++row) {
      const ggml_fp16_t* mask = options.faults.ignore_mask ? nullptr : match->mask_row(row, stream);
      MaskRow& bits = masks_[first + static_cast<size_t>(row)];
      mask != nullptr ? bits.set(mask, match->k->ne[1]) : bits.set_all(match->k->ne[1]);
    }
    const size_t of_cache = layer != nullptr ? layer->first_stream(*match) + static_cast<size_t>(stream) : 0;
    const std::span rows(masks_.data() + first, static_cast<size_t>(match->rows()));
    const bool ready = indexed && layer != nullptr && prepare(*layer, of_cache, rows, options, prompt);
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
    if (stats.dense == DenseReason::kRowChanged) shared().watch.compare_again();
  }
  const ggml_tensor* cache = match->k->view_src != nullptr ? match->k->view_src : match->k;
  if (first_cache_ == nullptr) first_cache_ = cache->data;
  const int32_t after = cache->data == first_cache_ ? 0 : node_layer_ + 1;  // where no index and no name says it
  node_layer_ = layer != nullptr ? layer->layer : layer_number(cache, static_cast<size_t>(after));
  if (!prompt) shared().stats.add_node(stats_.data(), num_queries, node_layer_, now_ns() - attend_begin);
}

void AccelBackend::run(const ggml_tensor& node, const PluginOptions& options) {
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

bool AccelBackend::prepare(CacheLayer& layer, size_t stream, std::span<const MaskRow> rows,
                           const PluginOptions& options, bool& prompt) {
  if (stream >= layer.streams.size()) return false;
  StreamIndex& entry = *layer.streams[stream];
  try {
    if (static_cast<int64_t>(rows.size()) > options.max_rows &&
        rows_of_a_sequence(entry.written, rows) > options.max_rows) {
      prompt = true;
      cluster_prompt(layer, stream, options);
      return false;
    }
    int64_t longest = 0;
    const auto most = std::max(static_cast<int64_t>(rows.size()), static_cast<int64_t>(options.max_rows));
    for (const MaskRow& row : rows) {
      const bool begins = &row == rows.data() && entry.begin_step(row.visible, row.num_visible, most);
      shared().watch.before_step(layer, stream, row.visible, begins, options.faults);
      longest = std::max(longest, row.num_visible);
    }
    const bool few = longest < options.min_sparse;
    entry.note_length(longest, few);
    if (few) entry.passages.current().steps_since_prompt = 0;  // the first to select is the first that knows nothing
    // Rows of a context that grows towards a selection are clustered before, a few at a time.
    if (longest < options.min_context || entry.stays_short()) return false;
    maintain(layer, stream, budget_of(layer, entry));
    return true;
  } catch (const std::exception& error) {
    log_error("layer %d is read densely: %s", layer.layer, error.what());
    entry.index.clear();
    return false;
  }
}

void AccelBackend::use_index(CacheLayer& layer, size_t stream, int64_t row, const PluginOptions& options,
                             const MaskRow& bits, DecodeQuery& query) {
  if (bits.num_visible < options.min_sparse) return;
  try {
    StreamIndex& entry = *layer.streams[stream];
    query.index = &entry.index;
    query.tau_factor = entry.tau_factor();
    query.position = entry.passages.position_of(bits.visible, bits.num_visible, row);
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
void AccelBackend::name_likely_rows(CacheLayer& layer, size_t stream, int32_t places, const MaskRow& bits,
                                    DecodeQuery& query) {
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

}  // namespace tactic::plugin
