// llama.cpp with the plug-in, as a test drives it: the same scenario is played in exact mode, in sparse mode and with a
// safeguard taken out, each in a context of its own, and the distributions of the next token are compared.
//
//   const Play play = [&](Session& s) { s.prefill(text); s.decode(rest); };
//   const Outcome exact = run(kExact, {}, play), sparse = run(kSparse, {}, play);
//   const Divergence kl = divergence(exact, sparse);
#pragma once

#include <llama.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "plugin_api.h"

namespace tactic::test {

/// The process-wide host: backends, the plug-in, the model.
class Host {
 public:
  /// Loads everything at the first call. nullptr without TACTIC_TEST_MODEL.
  static Host* get();

  /// Without a model: loads the backends and the plug-in alone.
  static ggml_backend_dev_t plugin_device();

  llama_model* model() const { return model_; }
  int32_t num_layers() const { return llama_model_n_layer(model_); }
  int32_t num_kv_heads() const { return llama_model_n_head_kv(model_); }
  std::vector<llama_token> tokenize(const std::string& text) const;

 private:
  llama_model* model_ = nullptr;
};

/// Whether the model is on a GPU, where less is taken over: llama.cpp has CUDA in TACTIC_LLAMA_DIR.
bool on_gpu();
#define TACTIC_SKIP_ON_GPU(reason) \
  if (on_gpu()) GTEST_SKIP() << (reason)

/// Fails the test when the plug-in refuses.
void configure(const std::string& options);
/// Its message; empty when it accepts.
std::string try_configure(const std::string& options);
/// Since the last call.
tactic_totals take_totals();
/// Drops every index.
void forget_indexes();
/// "tactic_set_decoder".
void set_decoder(tactic_decode_fn decode, void* user);
/// What llama.cpp logged since the last call.
std::string take_log();

inline const std::string kIndexOptions = "min_context=0,segment=256,provisional=64";
inline const std::string kSparse = kIndexOptions + ",error=0.03";
inline const std::string kExact = kIndexOptions + ",select=dense";

struct SessionOptions {
  uint32_t cells = 1024;  // per stream
  uint32_t num_seqs = 1;
  bool unified = false;
  ggml_type cache_type = GGML_TYPE_F16;
};

/// One token of a batch.
struct Step {
  llama_token token;
  llama_pos position;
  llama_seq_id seq = 0;
};

/// A context. Keeps the scores of every decoded token, [steps][vocab].
class Session {
 public:
  Session(const std::string& mode, const SessionOptions& options);

  /// Many tokens at a time, without scores.
  void prefill(std::span<const llama_token> tokens, llama_pos begin = 0, llama_seq_id seq = 0);
  /// One token at a time, at begin, begin + 1, ...
  void decode(std::span<const llama_token> tokens, llama_pos begin, llama_seq_id seq = 0);
  /// All in one batch.
  void decode_batch(std::span<const Step> steps);

  llama_memory_t memory() const { return llama_get_memory(context_.get()); }
  llama_context* context() const { return context_.get(); }
  std::vector<uint8_t> save(llama_seq_id seq = 0) const;
  void restore(std::span<const uint8_t> state, llama_seq_id seq = 0);

  std::vector<std::vector<float>> scores;

 private:
  void run_batch(std::span<const Step> steps, bool with_scores);

  std::string mode_;
  ggml_type cache_type_;
  std::unique_ptr<llama_context, decltype(&llama_free)> context_{nullptr, &llama_free};
};

struct Outcome {
  std::vector<std::vector<float>> scores;
  tactic_totals totals{};
  double read_fraction() const;
};

using Play = std::function<void(Session&)>;
Outcome run(const std::string& mode, const SessionOptions& options, const Play& play);

/// KL(exact || other) of the next token, in nats.
struct Divergence {
  double mean = 0, max = 0;
};
Divergence divergence(const Outcome& exact, const Outcome& other);

/// What a scenario promises. Where they come from stands at kNormal.
struct Bound {
  double mean, max;
};
extern const Bound kNormal;

struct Scenario {
  std::string name = {};
  SessionOptions options = {};
  Play play = {};
  Play exact_play = {};                  // a shorter way to the same cache, if there is one
  std::vector<std::string> faults = {};  // options that take the safeguards out
  Bound bound = kNormal;
};
/// Plays the scenario exactly, sparsely and with each fault; expects that the sparse path was used, that it stays
/// within the bound, and that no fault does.
void expect_scenario(const Scenario& scenario);
void expect_scenario(const Scenario& scenario, const Outcome& exact);
/// The checks of the sparse play alone.
void expect_close(const std::string& name, const Outcome& exact, const Outcome& sparse, const Bound& bound = kNormal);

/// Numbered records of four digits, and random words; both follow from the seed alone.
std::string records(uint64_t seed, int first, int count);
std::string words(uint64_t seed, int count);
/// One record again: its digits can only be known by looking it up.
std::string recall(uint64_t seed, int number);

/// `text` cut to exactly `count` tokens; fails the test when it is too short.
std::vector<llama_token> tokens_of(const std::string& text, size_t count);
std::vector<llama_token> tokens_of(const std::string& text);

}  // namespace tactic::test
