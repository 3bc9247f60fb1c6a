// llama.cpp as the command uses it: the plug-in, one model, and one context per mode.
//
// Which attention nodes the plug-in takes is decided when a context builds its graph, and graphs are reused. So each
// mode has its own context, and Session sets the plug-in's options before each of its context's calls.
//
//   Host host(options, {parse_mode("stock"), parse_mode("sample,error=0.03")});
//   Session session(host, mode, {.kv_len_max = 8192});
//   session.prefill(tokens);
//   const float* logits = session.decode(token);
#pragma once

#include <llama.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "plugin_api.h"

namespace tactic::tool {

/// Ends the command with one line on stderr.
class CommandError : public std::runtime_error {
 public:
  explicit CommandError(const std::string& text, int status = 1) : std::runtime_error(text), exit_status(status) {}
  const int exit_status;
};

/// A way to compute attention: what the user wrote and what the plug-in is told.
struct Mode {
  std::string name;
  std::string options;
  bool is_stock() const;  // llama.cpp's own attention
  bool is_dense() const;  // reads everything, by the plug-in
};

/// llama.cpp's own attention with the plug-in's other options as in `mode`: were its index options to change, the
/// plug-in would drop the indexes it has.
inline Mode stock_beside(const Mode& mode) {
  return {"stock", mode.options.empty() || mode.is_stock() ? "select=off" : mode.options + ",select=off"};
}

/// "stock" | "dense" | "default" | "sample[,error=...]" | "fit,..." | "topk,..." | "key=value,...".
Mode parse_mode(const std::string& text);
/// The cache length below which nothing is sparse. Throws CommandError for options that the plug-in refuses.
int32_t min_sparse_of(const Mode& mode);
/// Modes separated by semicolons. Throws CommandError, naming the option they come from, when there is none.
std::vector<Mode> parse_modes(const std::string& text, const std::string& option = "--modes");

struct HostOptions {
  std::string model_path;
  std::string plugin_path;  // empty: TACTIC_PLUGIN, else beside the executable
  double yarn = 1;          // factor by which YaRN extends the model's context
  bool verbose = false;
};

class Host {
 public:
  /// Loads the backends, the plug-in if a mode needs it, and the model; lets the plug-in check every mode's options.
  Host(const HostOptions& options, const std::vector<Mode>& modes);
  ~Host();
  Host(const Host&) = delete;
  Host& operator=(const Host&) = delete;

  llama_model* model() const { return model_; }
  const llama_vocab* vocab() const { return vocab_; }
  /// llama.cpp's: architecture, size, quantization.
  std::string model_description() const;
  /// Tokens the model was trained for, times what YaRN adds.
  int64_t context_tokens() const;
  /// What the model was trained on. Asked once: llama.cpp multiplies its own number with every context that YaRN
  /// extends.
  int32_t trained_tokens() const { return trained_tokens_; }
  int32_t vocab_size() const { return llama_vocab_n_tokens(vocab_); }
  bool has_plugin() const { return configure_ != nullptr; }

  /// Does nothing when `mode` is what the plug-in was told last.
  void configure(const Mode& mode);
  /// Drops all indexes. To be called when contexts are gone and new ones come, which may get the same memory.
  void forget_indexes();
  /// Sums since the last call; zeros without the plug-in.
  tactic_totals take_totals();
  /// JSON text; empty without the plug-in.
  std::string inspect() const;

  /// Hands one-row attention to `decode` ("tactic_set_decoder").
  void set_decoder(tactic_decode_fn decode, void* user);

  const HostOptions& options() const { return options_; }

 private:
  void load_plugin();
  void find_plugin_functions();

  HostOptions options_;
  llama_model* model_ = nullptr;
  int32_t trained_tokens_ = 0;
  const llama_vocab* vocab_ = nullptr;
  tactic_configure_fn configure_ = nullptr;
  tactic_take_totals_fn take_totals_ = nullptr;
  tactic_inspect_fn inspect_ = nullptr;
  tactic_set_decoder_fn set_decoder_ = nullptr;
  std::string configured_;
  bool is_configured_ = false;
};

struct SessionOptions {
  int64_t kv_len_max = 0;
  int32_t threads = 0;  // 0: all processors this process may use
  ggml_type cache_type = GGML_TYPE_F16;
  ggml_backend_sched_eval_callback on_node = nullptr;  // sees every node; makes flash attention certain
  void* on_node_data = nullptr;
};

/// A context and the mode it decodes in. One sequence, its tokens at positions 0 to kv_len - 1.
class Session {
 public:
  using ProgressFn = std::function<void(int64_t tokens_done)>;

  /// `prefill` computes this many tokens at a time, llama.cpp's own default of a physical batch.
  static constexpr int64_t kBatchTokens = 512;

  Session(Host& host, const Mode& mode, const SessionOptions& options);

  /// Appends tokens many at a time, without wanting their logits.
  void prefill(std::span<const llama_token> tokens, const ProgressFn& progress = {});
  /// Appends one token and returns the scores of the next [vocab_size], valid until the next call.
  const float* decode(llama_token token);

  std::vector<uint8_t> save() const;
  void restore(std::span<const uint8_t> state, int64_t kv_len);
  /// Forgets the tokens from position `kv_len` on. False: the model's memory cannot, and the session is of no more use.
  bool truncate(int64_t kv_len);

  int64_t kv_len() const { return kv_len_; }
  const Mode& mode() const { return mode_; }
  llama_context* context() const { return context_.get(); }

 private:
  struct Free {
    void operator()(llama_context* context) const { llama_free(context); }
  };
  void check_room(int64_t tokens) const;

  Host& host_;
  Mode mode_;
  int64_t kv_len_ = 0;
  int64_t kv_len_max_ = 0;
  std::unique_ptr<llama_context, Free> context_;
};

/// Special tokens written in `text` are recognized when `with_special`.
std::vector<llama_token> tokenize(const llama_vocab* vocab, const std::string& text, bool add_special,
                                  bool with_special);
/// Bytes of one token; not necessarily whole UTF-8 characters. Control tokens give nothing unless `with_special`.
std::string token_piece(const llama_vocab* vocab, llama_token token, bool with_special = false);

/// Throws when the plug-in did not compute all attention of some steps exactly, so that they are no reference.
void require_exact(const tactic_totals& totals, ggml_type cache_type);

int32_t default_threads();
/// "f16", "q8_0", ... Throws CommandError when the cache cannot be of this type.
ggml_type parse_cache_type(const std::string& name);
/// The first line of what llama.cpp complained about since the last call; empty if nothing.
std::string take_host_error();

}  // namespace tactic::tool
