#include "host.h"
#include "plugin_options.h"
#include "tactic/error.h"
#include "text.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

namespace tactic::tool {
namespace {

namespace fs = std::filesystem;

// llama.cpp logs from its own threads too.
struct HostLog {
  std::mutex mutex;
  bool verbose = false;
  bool continues_error = false;
  std::string errors;
};

HostLog& host_log() {
  static HostLog log;
  return log;
}

void log_callback(ggml_log_level level, const char* text, void*) {
  HostLog& log = host_log();
  const std::lock_guard lock(log.mutex);
  const bool is_error = level == GGML_LOG_LEVEL_ERROR || (level == GGML_LOG_LEVEL_CONT && log.continues_error);
  log.continues_error = is_error;
  if (is_error && log.errors.size() < 4096) log.errors += text;
  const bool is_warning = level == GGML_LOG_LEVEL_WARN && std::strncmp(text, "tactic: ", 8) == 0;  // the plug-in's
  if (log.verbose || is_warning) std::fputs(text, stderr);
}

// What the plug-in had to say and goes on without. A missing GPU driver, say, is no error of ours.
void say_own_errors(const std::string& errors) {
  for (size_t begin = 0; begin < errors.size();) {
    const size_t end = std::min(errors.find('\n', begin), errors.size() - 1) + 1;
    if (errors.compare(begin, 8, "tactic: ") == 0) std::fputs(errors.substr(begin, end - begin).c_str(), stderr);
    begin = end;
  }
}

std::string take_host_errors() {
  HostLog& log = host_log();
  const std::lock_guard lock(log.mutex);
  return std::exchange(log.errors, {});
}

std::string with_reason(const std::string& what) {
  std::string reason = take_host_error();
  if (reason.starts_with("tactic: ")) reason.erase(0, 8);  // the plug-in's own prefix
  return reason.empty() ? what : what + ": " + reason;
}

fs::path executable_dir() {
  std::error_code ignored;
  return fs::read_symlink("/proc/self/exe", ignored).parent_path();
}

fs::path llama_library_dir() {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&llama_backend_init), &info) == 0 || info.dli_fname == nullptr)
    return executable_dir();
  std::error_code error;
  const fs::path real = fs::canonical(info.dli_fname, error);
  return error ? fs::path(info.dli_fname).parent_path() : real.parent_path();
}

// Beside the executable, where it is installed, or where the build tree has it.
std::string find_plugin(const std::string& asked) {
  if (!asked.empty()) return asked;
  if (const char* path = std::getenv("TACTIC_PLUGIN"); path != nullptr && *path != 0) return path;
  const fs::path base = executable_dir();
  for (const char* dir :
       {".", "../lib", "../plugins", "../plugins/ggml", "../../plugins", "../../plugins/ggml", "../../lib"}) {
    const fs::path path = base / dir / "libggml-tactic.so";
    if (fs::exists(path)) return path.lexically_normal().string();
  }
  throw CommandError("the plug-in libggml-tactic.so was not found beside " + (base / "tactic").string() +
                     "; name it with --plugin or TACTIC_PLUGIN");
}

// Nothing of what the plug-in will refuse.
std::optional<plugin::PluginOptions> parsed(const Mode& mode) {
  try {
    return plugin::parse_options(mode.options);
  } catch (const Error&) {
    return std::nullopt;
  }
}

// llama.cpp's own messages about a bad file run over several lines and do not name the simple causes.
void check_model_file(const std::string& path) {
  std::ifstream file = open_input(path, "the model ");
  char magic[4] = {};
  file.read(magic, sizeof magic);
  if (file.gcount() != sizeof magic || std::memcmp(magic, "GGUF", 4) != 0) {
    throw CommandError("cannot read the model " + path + ": not a GGUF file");
  }
}

}  // namespace

std::string take_host_error() {
  std::string text = take_host_errors();
  text.resize(std::min(text.size(), text.find('\n')));
  return text;
}

int32_t default_threads() { return static_cast<int32_t>(std::max(1u, std::thread::hardware_concurrency())); }

ggml_type parse_cache_type(const std::string& name) {
  constexpr ggml_type kTypes[] = {GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16,   GGML_TYPE_Q8_0, GGML_TYPE_Q4_0,
                                  GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_IQ4_NL, GGML_TYPE_Q5_1};
  std::string known;
  for (const ggml_type type : kTypes) {
    if (name == ggml_type_name(type)) return type;
    known += std::string(known.empty() ? "" : ", ") + ggml_type_name(type);
  }
  throw CommandError("cache type '" + name + "' is none of " + known);
}

bool Mode::is_stock() const {
  const auto options_of_mode = parsed(*this);
  return options_of_mode && !options_of_mode->enabled;
}

bool Mode::is_dense() const {
  const auto options_of_mode = parsed(*this);
  return options_of_mode && options_of_mode->enabled && options_of_mode->decode.select == Select::kDense;
}

Mode parse_mode(const std::string& text) {
  const size_t begin = text.find_first_not_of(' ');
  if (begin == std::string::npos) return {"default", ""};
  const std::string name = text.substr(begin, text.find_last_not_of(' ') - begin + 1);
  if (name == "stock" || name == "off" || name == "select=off") return {"stock", "select=off"};
  if (name == "default") return {name, ""};
  const std::string first = name.substr(0, name.find(','));
  if (first == "stock") throw CommandError("mode '" + name + "': stock takes no options");
  if (first.find('=') != std::string::npos || first == "quality") return {name, name};
  // Exact is exact at every depth.
  if (first == "dense")
    return {name, "select=" + name + (name.find("min_context") == std::string::npos ? ",min_context=0" : "")};
  return {name, "select=" + name};
}

int32_t min_sparse_of(const Mode& mode) {
  try {
    return plugin::parse_options(mode.options).min_sparse;
  } catch (const Error& error) {
    throw CommandError("mode '" + mode.name + "': " + error.what());
  }
}

std::vector<Mode> parse_modes(const std::string& text, const std::string& option) {
  std::vector<Mode> modes;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(';', begin), text.size());
    const std::string item = text.substr(begin, end - begin);
    if (item.find_first_not_of(' ') != std::string::npos) modes.push_back(parse_mode(item));
    begin = end + 1;
  }
  if (modes.empty()) throw CommandError(option + " names no mode");
  return modes;
}

Host::Host(const HostOptions& options, const std::vector<Mode>& modes) : options_(options) {
  if (!(options.yarn >= 1)) throw CommandError("--yarn must be a number in 1..64");  // nan passes as in range
  host_log().verbose = options.verbose;
  llama_log_set(log_callback, nullptr);
  check_model_file(options.model_path);
  llama_backend_init();
  ggml_backend_load_all_from_path(llama_library_dir().c_str());
  if (ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU) == nullptr) {
    throw CommandError(with_reason("no CPU backend of llama.cpp in " + llama_library_dir().string()));
  }
  find_plugin_functions();  // GGML_BACKEND_PATH may have brought it
  if (!has_plugin() && !std::all_of(modes.begin(), modes.end(), [](const Mode& mode) { return mode.is_stock(); })) {
    load_plugin();
  }
  for (const Mode& mode : modes) configure(mode);

  say_own_errors(take_host_errors());
  configure(parse_mode("stock"));
  model_ = llama_model_load_from_file(options.model_path.c_str(), llama_model_default_params());
  if (model_ == nullptr) throw CommandError(with_reason("cannot load the model " + options.model_path));
  trained_tokens_ = llama_model_n_ctx_train(model_);
  vocab_ = llama_model_get_vocab(model_);
  if (llama_vocab_type(vocab_) == LLAMA_VOCAB_TYPE_NONE) throw CommandError("the model has no vocabulary");
  if (llama_model_has_encoder(model_) || !llama_model_has_decoder(model_)) {
    throw CommandError("the model is no decoder-only language model");
  }
}

Host::~Host() {
  if (model_ != nullptr) llama_model_free(model_);
  llama_backend_free();
}

std::string Host::model_description() const {
  char text[128] = "";
  llama_model_desc(model_, text, sizeof text);
  return text;
}

int64_t Host::context_tokens() const { return static_cast<int64_t>(options_.yarn * trained_tokens_); }

void Host::load_plugin() {
  const std::string path = find_plugin(options_.plugin_path);
  if (!fs::exists(path)) throw CommandError("the plug-in " + path + " does not exist");
  take_host_error();
  if (ggml_backend_load(path.c_str()) == nullptr)
    throw CommandError(with_reason("the plug-in " + path + " did not load"));
  find_plugin_functions();
  if (!has_plugin()) throw CommandError(path + " is not the plug-in, or one of another version");
}

void Host::find_plugin_functions() {
  for (size_t i = 0; i < ggml_backend_reg_count(); ++i) {
    const ggml_backend_reg_t reg = ggml_backend_reg_get(i);
    const auto find = [&](const char* name) { return ggml_backend_reg_get_proc_address(reg, name); };
    void* configure = find("tactic_configure");
    void* take_totals = find("tactic_take_totals");
    void* inspect = find("tactic_inspect");
    void* set_decoder = find("tactic_set_decoder");
    if (configure == nullptr || take_totals == nullptr || inspect == nullptr || set_decoder == nullptr) continue;
    configure_ = reinterpret_cast<tactic_configure_fn>(configure);
    take_totals_ = reinterpret_cast<tactic_take_totals_fn>(take_totals);
    inspect_ = reinterpret_cast<tactic_inspect_fn>(inspect);
    set_decoder_ = reinterpret_cast<tactic_set_decoder_fn>(set_decoder);
    return;
  }
}

void Host::configure(const Mode& mode) {
  if (!has_plugin() || (is_configured_ && configured_ == mode.options)) return;
  char error[512] = "refused";
  if (configure_(mode.options.c_str(), error, sizeof error) != 0) {
    throw CommandError("mode '" + mode.name + "': " + error);
  }
  configured_ = mode.options;
  is_configured_ = true;
}

void Host::forget_indexes() {
  // The plug-in drops them when the options of new indexes change.
  configure({"", "select=off,segment=1024"});
  configure(parse_mode("stock"));
}

tactic_totals Host::take_totals() {
  tactic_totals totals = {};
  if (has_plugin()) take_totals_(&totals);
  return totals;
}

void Host::set_decoder(tactic_decode_fn decode, void* user) {
  if (set_decoder_ != nullptr) set_decoder_(decode, user);
}

std::string Host::inspect() const {
  if (!has_plugin()) return {};
  std::string json(inspect_(nullptr, 0) + 1, '\0');
  inspect_(json.data(), json.size());
  json.resize(std::strlen(json.c_str()));
  return json;
}

Session::Session(Host& host, const Mode& mode, const SessionOptions& options)
    : host_(host), mode_(mode), kv_len_max_(options.kv_len_max) {
  llama_context_params params = llama_context_default_params();
  params.n_ctx = static_cast<uint32_t>(options.kv_len_max);
  params.n_threads = params.n_threads_batch = options.threads > 0 ? options.threads : default_threads();
  params.type_k = params.type_v = options.cache_type;
  params.no_perf = true;
  if (const double yarn = host.options().yarn; yarn > 1) {
    params.rope_scaling_type = LLAMA_ROPE_SCALING_TYPE_YARN;
    params.rope_freq_scale = static_cast<float>(1 / yarn);
    params.yarn_orig_ctx = static_cast<uint32_t>(host.trained_tokens());
  }
  if (options.on_node != nullptr) {
    params.cb_eval = options.on_node;
    params.cb_eval_user_data = options.on_node_data;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
  }
  // With flash attention 'auto' llama.cpp asks here which device takes the attention nodes, and turns it off if that is
  // not the layer's own.
  host_.configure(stock_beside(mode));
  context_.reset(llama_init_from_model(host_.model(), params));
  if (context_ == nullptr) {
    throw CommandError(with_reason("cannot make a context of " + std::to_string(options.kv_len_max) +
                                   " tokens, cache type " + ggml_type_name(options.cache_type)));
  }
}

void Session::check_room(int64_t tokens) const {
  if (kv_len_ + tokens > kv_len_max_) {
    throw CommandError("a context of " + std::to_string(kv_len_max_) + " tokens cannot hold " +
                       std::to_string(kv_len_ + tokens));
  }
}

void Session::prefill(std::span<const llama_token> tokens, const ProgressFn& progress) {
  check_room(static_cast<int64_t>(tokens.size()));
  host_.configure(mode_);
  constexpr auto kBatch = static_cast<size_t>(kBatchTokens);
  for (size_t begin = 0; begin < tokens.size(); begin += kBatch) {
    const auto part = tokens.subspan(begin, std::min(kBatch, tokens.size() - begin));
    // llama.cpp does not write through this pointer.
    const llama_batch batch =
        llama_batch_get_one(const_cast<llama_token*>(part.data()), static_cast<int32_t>(part.size()));
    const int32_t status = llama_decode(context_.get(), batch);
    if (status != 0) throw CommandError(with_reason("llama_decode failed with status " + std::to_string(status)));
    llama_synchronize(context_.get());
    kv_len_ += static_cast<int64_t>(part.size());
    if (progress) progress(static_cast<int64_t>(begin + part.size()));
  }
}

const float* Session::decode(llama_token token) {
  check_room(1);
  host_.configure(mode_);
  const int32_t status = llama_decode(context_.get(), llama_batch_get_one(&token, 1));
  if (status != 0) throw CommandError(with_reason("llama_decode failed with status " + std::to_string(status)));
  ++kv_len_;
  return llama_get_logits_ith(context_.get(), -1);  // waits for the computation
}

std::vector<uint8_t> Session::save() const {
  std::vector<uint8_t> state(llama_state_seq_get_size(context_.get(), 0));
  state.resize(llama_state_seq_get_data(context_.get(), state.data(), state.size(), 0));
  if (state.empty()) throw CommandError(with_reason("llama.cpp could not save the state"));
  return state;
}

void Session::restore(std::span<const uint8_t> state, int64_t kv_len) {
  if (llama_state_seq_set_data(context_.get(), state.data(), state.size(), 0) == 0) {
    throw CommandError(with_reason("llama.cpp could not restore a state of " + std::to_string(kv_len) + " tokens"));
  }
  kv_len_ = kv_len;
}

bool Session::truncate(int64_t kv_len) {
  if (!llama_memory_seq_rm(llama_get_memory(context_.get()), 0, static_cast<llama_pos>(kv_len), -1)) return false;
  kv_len_ = kv_len;
  return true;
}

void require_exact(const tactic_totals& totals, ggml_type cache_type) {
  if (totals.queries > 0 && totals.dense_queries == totals.queries) return;
  throw CommandError(
      std::string("no exact reference: the plug-in did not take this model's attention with cache type ") +
      ggml_type_name(cache_type));
}

std::vector<llama_token> tokenize(const llama_vocab* vocab, const std::string& text, bool add_special,
                                  bool with_special) {
  if (text.size() > std::numeric_limits<int32_t>::max()) throw CommandError("llama.cpp takes no text of 2 GiB");
  const auto text_size = static_cast<int32_t>(text.size());
  std::vector<llama_token> tokens(text.size() / 3 + 16);
  for (;;) {
    const int32_t n = llama_tokenize(vocab, text.data(), text_size, tokens.data(), static_cast<int32_t>(tokens.size()),
                                     add_special, with_special);
    tokens.resize(static_cast<size_t>(std::abs(n)));
    if (n >= 0) return tokens;
  }
}

std::string token_piece(const llama_vocab* vocab, llama_token token, bool with_special) {
  std::string piece(32, '\0');
  for (;;) {
    const int32_t n =
        llama_token_to_piece(vocab, token, piece.data(), static_cast<int32_t>(piece.size()), 0, with_special);
    piece.resize(static_cast<size_t>(std::abs(n)));
    if (n >= 0) return piece;
  }
}

}  // namespace tactic::tool
