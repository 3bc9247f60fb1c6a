// tactic trace: K and V of every layer and the queries at chosen positions, from one prefill, into a file.
//
// llama.cpp shows every node of its graph to an evaluation callback. The attention nodes have all that is wanted as
// inputs: Q after RoPE, and views of the cache, which hold every row when the last batch is computed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>

#include <ggml-backend.h>

#include "dtype.h"
#include "report.h"
#include "synthetic.h"
#include "tactic/error.h"
#include "text.h"
#include "trace.h"
#include "verbs.h"

namespace tactic::tool {
namespace {

using eval::QueryKind;
using eval::TraceInfo;
using eval::TraceLayerInfo;

struct TraceOptions {
  HostOptions host;
  std::string text, name, output, synthetic, cache_type = "f16";
  int64_t records = -1, tokens = 8192, skip = 0, queries = 64, prompt_queries = 32, prompt = 0;
  int32_t threads = 0;
  uint64_t seed = 1;
};

DType trace_dtype(ggml_type type) {
  if (const std::optional<DType> dtype = plugin::dtype_of(type)) return *dtype;
  throw CommandError(std::string("a trace cannot hold a cache of type ") + ggml_type_name(type));
}

/// Takes what it wants from the attention nodes as they are computed. What goes wrong inside llama.cpp's C code waits
/// in `error` for the caller.
class Recorder {
 public:
  explicit Recorder(const TraceInfo& info) : info_(info) {}

  static bool callback(ggml_tensor* node, bool ask, void* self) {
    const bool wanted = node->op == GGML_OP_FLASH_ATTN_EXT;
    if (ask || !wanted) return wanted;
    auto& recorder = *static_cast<Recorder*>(self);
    try {
      if (recorder.error.empty()) recorder.take(node);
    } catch (const std::exception& e) {
      recorder.error = e.what();
    }
    return recorder.error.empty();  // false stops the graph
  }

  /// Every node of the tokens [begin, end) was computed.
  void next_batch(int64_t end) {
    if (num_layers_ == 0) num_layers_ = node_;
    if (error.empty() && (node_ == 0 || node_ != num_layers_)) {
      error = node_ == 0 ? "llama.cpp computed no attention node of the kind a trace is made of (FLASH_ATTN_EXT)"
                         : format("the number of attention nodes changed from %zu to %zu", num_layers_, node_);
    }
    node_ = 0;
    begin_ = end;
  }

  TraceInfo info_of_model() const {
    TraceInfo info = info_;
    for (const Layer& layer : layers_) info.layers.push_back(layer.info);
    return info;
  }
  void write(eval::TraceWriter& writer) const {
    for (size_t i = 0; i < layers_.size(); ++i)
      writer.write_layer(static_cast<int32_t>(i), layers_[i].k, layers_[i].v, layers_[i].q);
  }

  std::string error;

 private:
  struct Layer {
    TraceLayerInfo info;
    std::vector<std::byte> k, v;
    std::vector<float> q;
  };

  void take(const ggml_tensor* node) {
    const size_t number = node_++;
    const ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2], *mask = node->src[3];
    float params[3];  // scale, max_bias (ALiBi), logit soft-cap
    std::memcpy(params, node->op_params, sizeof params);
    if (node->src[4] != nullptr || params[1] != 0 || params[2] != 0) {
      throw CommandError(format(
          "attention node %zu has sink tensors, ALiBi or logit soft-capping, which a trace does not hold", number));
    }
    if (q->type != GGML_TYPE_F32 || q->ne[3] != 1 || q->nb[0] != sizeof(float))
      throw CommandError("the queries are not one sequence of f32");
    if (number >= layers_.size()) {
      if (begin_ > 0) return;  // counted and refused by next_batch
      Layer layer;
      layer.info = {.layer = layer_number(k, static_cast<int32_t>(number)),
                    .num_q_heads = static_cast<int32_t>(q->ne[2]),
                    .num_kv_heads = static_cast<int32_t>(k->ne[2]),
                    .head_dim = static_cast<int32_t>(k->ne[0]),
                    .v_head_dim = static_cast<int32_t>(v->ne[0]),
                    .k_dtype = trace_dtype(k->type),
                    .v_dtype = trace_dtype(v->type),
                    .sm_scale = params[0]};
      layer.q.resize(static_cast<size_t>(info_.num_queries() * q->ne[2] * q->ne[0]));
      layers_.push_back(std::move(layer));
    }
    Layer& layer = layers_[number];
    take_queries(q, layer);
    if (begin_ + q->ne[1] < info_.kv_len) return;
    if (mask != nullptr) layer.info.window = window_of(mask, q->ne[1]);
    take_rows(k, layer.k);
    take_rows(v, layer.v);
  }

  // From the name of the cache's tensor, "cache_k_l17".
  static int32_t layer_number(const ggml_tensor* k, int32_t fallback) {
    const std::string name = k->view_src != nullptr ? k->view_src->name : k->name;
    const size_t at = name.rfind("_l");
    int number = 0;
    return at != std::string::npos && std::sscanf(name.c_str() + at, "_l%d", &number) == 1 ? number : fallback;
  }

  void take_queries(const ggml_tensor* q, Layer& layer) const {
    for (int64_t i = 0; i < info_.num_queries(); ++i) {
      const int64_t token = info_.positions[static_cast<size_t>(i)] - begin_;
      if (token < 0 || token >= q->ne[1]) continue;
      for (int64_t head = 0; head < q->ne[2]; ++head) {
        ggml_backend_tensor_get(q, layer.q.data() + (i * q->ne[2] + head) * q->ne[0],
                                static_cast<size_t>(token) * q->nb[1] + static_cast<size_t>(head) * q->nb[2],
                                static_cast<size_t>(q->ne[0]) * sizeof(float));
      }
    }
  }

  // The rows the last query sees must be the last ones: as many as the window, or all.
  int64_t window_of(const ggml_tensor* mask, int64_t batch) const {
    if (mask->type != GGML_TYPE_F16) throw CommandError("the mask is not f16");
    std::vector<ggml_fp16_t> row(static_cast<size_t>(mask->ne[0]));
    ggml_backend_tensor_get(mask, row.data(), static_cast<size_t>(batch - 1) * mask->nb[1],
                            row.size() * sizeof(ggml_fp16_t));
    const auto sees = [&](int64_t r) { return ggml_fp16_to_fp32(row[static_cast<size_t>(r)]) == 0; };
    int64_t first = 0, seen = 0;
    while (first < info_.kv_len && !sees(first)) ++first;
    for (int64_t r = first; r < mask->ne[0]; ++r) seen += sees(r) ? 1 : 0;
    if (seen != info_.kv_len - first || !sees(info_.kv_len - 1)) {
      throw CommandError("the mask is neither causal nor a sliding window over a cache in order of positions");
    }
    return first == 0 ? 0 : info_.kv_len - first;
  }

  void take_rows(const ggml_tensor* rows, std::vector<std::byte>& out) const {
    if (rows->ne[1] < info_.kv_len || rows->ne[3] != 1) {
      throw CommandError(format("the cache holds %lld rows of %lld", static_cast<long long>(rows->ne[1]),
                                static_cast<long long>(info_.kv_len)));
    }
    const size_t bytes = ggml_row_size(rows->type, rows->ne[0]);
    out.resize(static_cast<size_t>(rows->ne[2] * info_.kv_len) * bytes);
    std::byte* to = out.data();
    for (int64_t head = 0; head < rows->ne[2]; ++head) {
      for (int64_t row = 0; row < info_.kv_len; ++row, to += bytes) {
        ggml_backend_tensor_get(
            rows, to, static_cast<size_t>(row) * rows->nb[1] + static_cast<size_t>(head) * rows->nb[2], bytes);
      }
    }
  }

  TraceInfo info_;  // layers empty
  std::vector<Layer> layers_;
  size_t node_ = 0, num_layers_ = 0;
  int64_t begin_ = 0;  // position of the batch's first token
};

std::vector<llama_token> trace_tokens(const Host& host, const TraceOptions& options) {
  std::string text;
  if (options.records >= 0) {
    for (const std::string& line :
         make_records(options.records > 0 ? options.records : options.tokens / 8 + 1, options.seed))
      text += line;
  } else {
    text = read_text(options.text);
  }
  std::vector<llama_token> tokens = tokenize(host.vocab(), text, false, false);
  const bool add_bos = llama_vocab_get_add_bos(host.vocab());
  const int64_t needed = options.tokens - (add_bos ? 1 : 0), has = static_cast<int64_t>(tokens.size());
  if (has < options.skip + needed) {
    throw CommandError(format("%s has %lld tokens; --skip %lld and --tokens %lld need %lld",
                              options.records >= 0 ? "the records" : options.text.c_str(), static_cast<long long>(has),
                              static_cast<long long>(options.skip), static_cast<long long>(options.tokens),
                              static_cast<long long>(options.skip + needed)));
  }
  tokens = {tokens.begin() + options.skip, tokens.begin() + options.skip + needed};
  if (add_bos) tokens.insert(tokens.begin(), llama_vocab_bos(host.vocab()));
  return tokens;
}

// Prompt queries are the last before the decoded part, decode queries in the middles of equal parts of it.
TraceInfo plan_queries(const TraceOptions& options) {
  TraceInfo info;
  info.kv_len = options.tokens;
  info.prompt_len = options.prompt > 0 ? options.prompt : options.tokens * 3 / 4;
  const int64_t decoded = info.kv_len - info.prompt_len;
  if (decoded < 1) {
    throw CommandError(format("--prompt (%lld) must be less than the trace's %lld tokens (-n)",
                              static_cast<long long>(info.prompt_len), static_cast<long long>(info.kv_len)));
  }
  if (options.queries > decoded) {
    throw CommandError(format("--queries %lld do not fit into %lld positions after a prompt of %lld (--prompt)",
                              static_cast<long long>(options.queries), static_cast<long long>(decoded),
                              static_cast<long long>(info.prompt_len)));
  }
  for (int64_t i = std::max<int64_t>(0, info.prompt_len - options.prompt_queries); i < info.prompt_len; ++i) {
    info.positions.push_back(i);
    info.kinds.push_back(QueryKind::kPrompt);
  }
  for (int64_t i = 0; i < options.queries; ++i) {
    info.positions.push_back(info.prompt_len + (2 * i + 1) * decoded / (2 * options.queries));
    info.kinds.push_back(QueryKind::kDecode);
  }
  return info;
}

void print_written(const std::string& path, const TraceInfo& info) {
  std::printf("%s: %zu layers, %lld rows, %lld queries, %.1f MB\n", path.c_str(), info.layers.size(),
              static_cast<long long>(info.kv_len), static_cast<long long>(info.num_queries()),
              static_cast<double>(std::filesystem::file_size(path)) / 1e6);
}

void trace(const TraceOptions& options) {
  check_writable(options.output, true);
  check_apart(options.output, {options.text, options.host.model_path});
  if (!options.synthetic.empty()) {
    try {
      eval::write_synthetic(options.output, eval::synthetic_preset(options.synthetic));
      return print_written(options.output, eval::Trace(options.output).info());
    } catch (const Error& e) {
      throw CommandError(e.what());
    }
  }
  const std::filesystem::path model = options.host.model_path, text = options.text;
  if (options.host.model_path.empty()) throw CommandError("give --model, or --synthetic");
  if (options.text.empty() == (options.records < 0)) throw CommandError("give either --file or --records");
  TraceInfo info = plan_queries(options);
  info.model = model.filename().string();
  info.text = !options.name.empty() ? options.name : options.records >= 0 ? "records" : text.filename().string();
  const ggml_type cache_type = parse_cache_type(options.cache_type);
  trace_dtype(cache_type);
  Host host(options.host, {parse_mode("stock")});
  const std::vector<llama_token> tokens = trace_tokens(host, options);
  if (options.tokens > host.context_tokens()) {
    std::fprintf(stderr, "tactic: note: %lld tokens are beyond the model's context of %lld\n",
                 static_cast<long long>(options.tokens), static_cast<long long>(host.context_tokens()));
  }
  Recorder recorder(info);
  Session session(host, parse_mode("stock"),
                  {.kv_len_max = options.tokens,
                   .threads = options.threads,
                   .cache_type = cache_type,
                   .on_node = Recorder::callback,
                   .on_node_data = &recorder});
  {
    Progress progress("trace " + info.text, options.tokens, "tok");
    session.prefill(tokens, [&](int64_t done) {
      recorder.next_batch(done);
      if (!recorder.error.empty()) throw CommandError(recorder.error);
      progress.update(done);
    });
  }
  try {
    const TraceInfo whole = recorder.info_of_model();
    eval::TraceWriter writer(options.output, whole);
    recorder.write(writer);
    writer.finish();
    print_written(options.output, whole);
  } catch (const Error& e) {
    throw CommandError(e.what());
  }
}

}  // namespace

void add_trace(CLI::App& app) {
  auto options = std::make_shared<TraceOptions>();
  CLI::App* verb = app.add_subcommand("trace", "Record K, V and queries of a prefill for tactic eval trace");
  add_host_options(*verb, options->host);
  CLI::Option* synthetic =
      verb->add_option("--synthetic", options->synthetic, "no model: normed-128, flat-128 or normed-256");
  verb->get_option("--model")->required(false);
  verb->add_option("-f,--file", options->text, "text to read")->type_name("FILE");
  verb->add_option("--records", options->records, "generated records instead, this many; 0: as many as are needed")
      ->check(CLI::Range(0, 1 << 24));
  verb->add_option("--name", options->name, "of the text, in reports; else the file's");
  verb->add_option("-n,--tokens", options->tokens, "length of the cache")
      ->check(CLI::Range(16, 1 << 28))
      ->capture_default_str();
  verb->add_option("--skip", options->skip, "tokens of the text left out first")->check(CLI::Range(0, 1 << 30));
  verb->add_option("--queries", options->queries, "decode positions recorded")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  verb->add_option("--prompt", options->prompt,
                   "tokens of prompt, after which the decode positions are spread; 0: three quarters")
      ->check(CLI::Range(0, 1 << 28));
  verb->add_option("--prompt-queries", options->prompt_queries, "last positions of the prompt recorded too")
      ->check(CLI::Range(0, 1 << 16))
      ->capture_default_str();
  verb->add_option("--cache-type", options->cache_type, "f16, f32, bf16, q8_0 or q4_0")->capture_default_str();
  verb->add_option("-t,--threads", options->threads, "0: all processors")->check(CLI::Range(0, 512));
  verb->add_option("--seed", options->seed, "of the records")->capture_default_str();
  for (CLI::Option* option : verb->get_options()) {  // a synthetic trace is what its name says
    if (option != synthetic && option != verb->get_help_ptr()) option->excludes(synthetic);
  }
  verb->add_option("-o,--output", options->output, "the trace")->required()->type_name("FILE");
  verb->footer(
      "Example:\n  tactic trace -m model.gguf -f book.txt --tokens 8192 --queries 64 -o book.trace\nFormat: "
      "docs/trace-format.md.");
  verb->callback([options] { trace(*options); });
}

}  // namespace tactic::tool
