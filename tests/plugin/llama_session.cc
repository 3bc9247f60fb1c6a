#include "llama_session.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>

namespace tactic::test {

// Measured over all scenarios: mean 0.0007 to 0.004, max 0.004 to 0.03. Without its safeguard the mildest one (context
// (context shift) has mean 0.036 and max 0.7.
const Bound kNormal{0.012, 0.25};

namespace {

constexpr int32_t kThreads = 1;  // two programs at a time
constexpr size_t kBatchTokens = 512;

struct HostLog {
  std::mutex mutex;
  std::string text;
};

HostLog& host_log() {
  static HostLog log;
  return log;
}

void keep_log(ggml_log_level, const char* text, void*) {
  const std::lock_guard lock(host_log().mutex);
  host_log().text += text;
}

ggml_backend_reg_t plugin() {
  static const ggml_backend_reg_t reg = [] {
    unsetenv("TACTIC");  // what the developer's shell has must not change the tests
    unsetenv("TACTIC_STATS");
    unsetenv("GGML_BACKEND_PATH");
    llama_log_set(keep_log, nullptr);
    ggml_backend_load_all_from_path(TACTIC_TEST_LLAMA_BIN);
    ggml_backend_reg_t loaded = ggml_backend_load(TACTIC_TEST_PLUGIN);
    if (loaded == nullptr) throw std::runtime_error("the plug-in did not load: " + take_log());
    return loaded;
  }();
  return reg;
}

template <class Function>
Function plugin_function(const char* name) {
  void* address = ggml_backend_reg_get_proc_address(plugin(), name);
  if (address == nullptr) throw std::runtime_error(std::string("the plug-in has no ") + name);
  return reinterpret_cast<Function>(address);
}

class Random {  // splitmix64
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

 private:
  uint64_t state_;
};

int content_of(uint64_t seed, int number) {
  return 1000 + static_cast<int>(Random(seed * 1000003 + static_cast<uint64_t>(number)).next() % 9000);
}

std::vector<double> log_softmax(const std::vector<float>& scores) {
  const double max = *std::max_element(scores.begin(), scores.end());
  double sum = 0;
  for (const float x : scores) sum += std::exp(x - max);
  std::vector<double> result(scores.size());
  for (size_t i = 0; i < scores.size(); ++i) result[i] = scores[i] - max - std::log(sum);
  return result;
}

double kl(const std::vector<float>& exact, const std::vector<float>& other) {
  const std::vector<double> p = log_softmax(exact), q = log_softmax(other);
  double sum = 0;
  for (size_t i = 0; i < p.size(); ++i) sum += std::exp(p[i]) * (p[i] - q[i]);
  return std::isnan(sum) ? HUGE_VAL : std::max(sum, 0.0);
}

}  // namespace

Host* Host::get() {
  static Host* const host = []() -> Host* {
    const char* path = std::getenv("TACTIC_TEST_MODEL");
    if (path == nullptr || *path == 0) return nullptr;
    plugin();
    auto* loaded = new Host;
    loaded->model_ = llama_model_load_from_file(path, llama_model_default_params());
    if (loaded->model_ == nullptr) throw std::runtime_error(std::string("cannot load ") + path);
    return loaded;
  }();
  return host;
}

ggml_backend_dev_t Host::plugin_device() { return ggml_backend_reg_dev_get(plugin(), 0); }

bool on_gpu() {
  plugin();
  return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU) != nullptr;
}

std::vector<llama_token> Host::tokenize(const std::string& text) const {
  std::vector<llama_token> tokens(text.size() + 16);
  const int32_t count = llama_tokenize(llama_model_get_vocab(model_), text.data(), static_cast<int32_t>(text.size()),
                                       tokens.data(), static_cast<int32_t>(tokens.size()), false, false);
  tokens.resize(static_cast<size_t>(std::max(count, 0)));
  return tokens;
}

std::string try_configure(const std::string& options) {
  char error[512] = "";
  if (plugin_function<tactic_configure_fn>("tactic_configure")(options.c_str(), error, sizeof error) == 0) return {};
  return error;
}

void configure(const std::string& options) { ASSERT_EQ(try_configure(options), "") << options; }

tactic_totals take_totals() {
  tactic_totals totals{};
  plugin_function<tactic_take_totals_fn>("tactic_take_totals")(&totals);
  return totals;
}

void forget_indexes() {  // they go when the options of new ones change
  configure("segment=1024");
  configure("");
}

void set_decoder(tactic_decode_fn decode, void* user) {
  plugin_function<tactic_set_decoder_fn>("tactic_set_decoder")(decode, user);
}

std::string take_log() {
  const std::lock_guard lock(host_log().mutex);
  std::string text;
  text.swap(host_log().text);
  return text;
}

Session::Session(const std::string& mode, const SessionOptions& options)
    : mode_(mode), cache_type_(options.cache_type) {
  llama_context_params params = llama_context_default_params();
  params.n_ctx = options.cells * (options.unified ? 1 : options.num_seqs);
  params.n_batch = params.n_ubatch = kBatchTokens;
  params.n_seq_max = options.num_seqs;
  params.kv_unified = options.unified;
  params.n_threads = params.n_threads_batch = kThreads;
  params.type_k = params.type_v = options.cache_type;
  params.no_perf = true;
  configure(mode_);
  context_.reset(llama_init_from_model(Host::get()->model(), params));
  if (context_ == nullptr) throw std::runtime_error("cannot make a context: " + take_log());
}

void Session::run_batch(std::span<const Step> steps, bool with_scores) {
  configure(mode_);
  llama_batch batch = llama_batch_init(static_cast<int32_t>(steps.size()), 0, 1);
  batch.n_tokens = static_cast<int32_t>(steps.size());
  for (size_t i = 0; i < steps.size(); ++i) {
    batch.token[i] = steps[i].token;
    batch.pos[i] = steps[i].position;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = steps[i].seq;
    batch.logits[i] = with_scores;
  }
  const int32_t status = llama_decode(context_.get(), batch);
  llama_synchronize(context_.get());
  llama_batch_free(batch);
  if (status != 0) throw std::runtime_error("llama_decode gave " + std::to_string(status) + ": " + take_log());
  if (!with_scores) return;
  const int32_t vocab = llama_vocab_n_tokens(llama_model_get_vocab(Host::get()->model()));
  for (size_t i = 0; i < steps.size(); ++i) {
    const float* row = llama_get_logits_ith(context_.get(), static_cast<int32_t>(i));
    scores.emplace_back(row, row + vocab);
  }
}

// Only a sparse play must write its cells itself; the others may take what another has saved. Prefill attention is the
// host's in every mode, so the rows are the same.
void Session::prefill(std::span<const llama_token> tokens, llama_pos begin, llama_seq_id seq) {
  static std::map<std::vector<llama_token>, std::vector<uint8_t>> saved;
  const bool may_save = begin == 0 && cache_type_ == GGML_TYPE_F16;
  const std::vector<llama_token> key(tokens.begin(), tokens.end());
  if (may_save && mode_ != kSparse && saved.contains(key)) {
    restore(saved[key], seq);
    return;
  }
  std::vector<Step> steps;
  for (size_t i = 0; i < tokens.size(); ++i) {
    steps.push_back({tokens[i], begin + static_cast<llama_pos>(i), seq});
    if (steps.size() < kBatchTokens && i + 1 < tokens.size()) continue;
    run_batch(steps, false);
    steps.clear();
  }
  if (may_save && (mode_ == kExact || mode_ == kSparse) && !saved.contains(key)) saved[key] = save(seq);
}

void Session::decode(std::span<const llama_token> tokens, llama_pos begin, llama_seq_id seq) {
  for (const llama_token token : tokens) {
    const Step step{token, begin++, seq};
    run_batch({&step, 1}, true);
  }
}

void Session::decode_batch(std::span<const Step> steps) { run_batch(steps, true); }

std::vector<uint8_t> Session::save(llama_seq_id seq) const {
  std::vector<uint8_t> state(llama_state_seq_get_size(context_.get(), seq));
  state.resize(llama_state_seq_get_data(context_.get(), state.data(), state.size(), seq));
  if (state.empty()) throw std::runtime_error("the state was not saved");
  return state;
}

void Session::restore(std::span<const uint8_t> state, llama_seq_id seq) {
  if (llama_state_seq_set_data(context_.get(), state.data(), state.size(), seq) == 0) {
    throw std::runtime_error("the state was not restored");
  }
}

double Outcome::read_fraction() const {
  if (totals.kv_bytes_present == 0) return 1;
  return static_cast<double>(totals.kv_bytes + totals.index_bytes) / static_cast<double>(totals.kv_bytes_present);
}

Outcome run(const std::string& mode, const SessionOptions& options, const Play& play) {
  forget_indexes();
  Session session(mode, options);
  take_totals();
  play(session);
  return {std::move(session.scores), take_totals()};
}

Divergence divergence(const Outcome& exact, const Outcome& other) {
  if (exact.scores.size() != other.scores.size() || exact.scores.empty())
    throw std::runtime_error("not the same steps");
  Divergence result;
  for (size_t i = 0; i < exact.scores.size(); ++i) {
    const double value = kl(exact.scores[i], other.scores[i]);
    result.mean += value / static_cast<double>(exact.scores.size());
    result.max = std::max(result.max, value);
  }
  return result;
}

void expect_close(const std::string& name, const Outcome& exact, const Outcome& sparse, const Bound& bound) {
  EXPECT_GT(exact.totals.queries, 0) << name << ": the reference is the host's";
  EXPECT_EQ(exact.totals.dense_queries, exact.totals.queries) << name << ": the reference is not exact";
  const Divergence kl_sparse = divergence(exact, sparse);
  std::printf("  %-34s KL mean %.5f max %.4f, %lld sparse of %lld queries, %lld saw a changed row, read %.2f\n",
              name.c_str(), kl_sparse.mean, kl_sparse.max, static_cast<long long>(sparse.totals.sparse_queries),
              static_cast<long long>(sparse.totals.queries), static_cast<long long>(sparse.totals.changed_queries),
              sparse.read_fraction());
  EXPECT_GT(sparse.totals.sparse_queries, sparse.totals.queries / 2) << name << ": mostly dense";
  EXPECT_LT(sparse.read_fraction(), 0.9) << name;
  EXPECT_LT(kl_sparse.mean, bound.mean) << name;
  EXPECT_LT(kl_sparse.max, bound.max) << name;
}

namespace {

void expect_scenario(const Scenario& scenario, const Outcome& exact, const Outcome& sparse) {
  const Bound& bound = scenario.bound;
  expect_close(scenario.name, exact, sparse, bound);
  // Rows of earlier places are often those that a stale index misses.
  for (const std::string& fault : scenario.faults) {
    const Divergence kl_fault = divergence(exact, run(kSparse + ",places=0," + fault, scenario.options, scenario.play));
    std::printf("  %-34s KL mean %.5f max %.4f\n", ("  with " + fault).c_str(), kl_fault.mean, kl_fault.max);
    EXPECT_TRUE(kl_fault.mean > bound.mean || kl_fault.max > bound.max)
        << scenario.name << ": without its safeguard (" << fault << ") the scenario passes all the same";
  }
}

}  // namespace

void expect_scenario(const Scenario& scenario) {
  const Outcome sparse = run(kSparse, scenario.options, scenario.play);  // first: the others need not prefill again
  const Play& exact_play = scenario.exact_play ? scenario.exact_play : scenario.play;
  expect_scenario(scenario, run(kExact, scenario.options, exact_play), sparse);
}

void expect_scenario(const Scenario& scenario, const Outcome& exact) {
  expect_scenario(scenario, exact, run(kSparse, scenario.options, scenario.play));
}

std::string recall(uint64_t seed, int number) {
  return "line " + std::to_string(number) + ": REGISTER_CONTENT is <" + std::to_string(content_of(seed, number)) +
         ">\n";
}

std::string records(uint64_t seed, int first, int count) {
  std::string text;
  for (int i = first; i < first + count; ++i) text += recall(seed, i);
  return text;
}

std::string words(uint64_t seed, int count) {
  static const char* const kWords[] = {
      "the",   "river", "a",    "stone",   "walks",  "under", "green", "light",  "and",   "sings", "of",    "winter",
      "house", "old",   "boat", "carries", "seven",  "birds", "over",  "silver", "hills", "while", "rain",  "falls",
      "on",    "every", "door", "where",   "no",     "one",   "waits", "for",    "bread", "or",    "salt",  "today",
      "clock", "moves", "slow", "engine",  "letter", "from",  "north", "window", "paper", "blue",  "horse", "sleeps"};
  Random random(seed);
  std::string text;
  for (int i = 0; i < count; ++i) {
    text += kWords[random.next() % std::size(kWords)];
    text += i % 11 == 10 ? ".\n" : " ";
  }
  return text;
}

std::vector<llama_token> tokens_of(const std::string& text) { return Host::get()->tokenize(text); }

std::vector<llama_token> tokens_of(const std::string& text, size_t count) {
  std::vector<llama_token> tokens = tokens_of(text);
  if (tokens.size() < count) throw std::runtime_error("the text has " + std::to_string(tokens.size()) + " tokens only");
  tokens.resize(count);
  return tokens;
}

}  // namespace tactic::test
