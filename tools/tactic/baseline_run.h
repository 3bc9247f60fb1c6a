// Other methods (eval/baselines) in llama.cpp: they answer the plug-in's one-row attention nodes.
#pragma once

#include <exception>
#include <vector>

#include "baselines/baseline.h"
#include "host.h"

namespace tactic::tool {

/// What one layer was asked at the last prompt positions.
struct PromptLayer {
  std::vector<float> q;   // [positions, num_q_heads, head_dim], oldest first; empty: the layer has no attention
  bool sees_all = false;  // the last position saw every row before it: the layer has no window
};
using PromptQueries = std::vector<PromptLayer>;  // [num_layers]

/// While it lives, the plug-in offers one-row attention to answer(). One at a time.
class HostDecoder {
 public:
  explicit HostDecoder(Host& host);
  virtual ~HostDecoder();
  HostDecoder(const HostDecoder&) = delete;
  HostDecoder& operator=(const HostDecoder&) = delete;

  /// Throws what answer() threw inside llama.cpp since the last call.
  void rethrow();

 protected:
  /// Whether the query was answered; otherwise it is answered exactly.
  virtual bool answer(const tactic_query& query, tactic_step_stats& stats) = 0;

 private:
  static int call(void* self, const tactic_query* query, tactic_step_stats* stats);
  Host& host_;
  std::exception_ptr error_;
};

/// Keeps the queries it sees and answers none.
class QueryRecorder : public HostDecoder {
 public:
  explicit QueryRecorder(Host& host);
  PromptQueries take() { return std::move(queries_); }

 protected:
  bool answer(const tactic_query& query, tactic_step_stats& stats) override;

 private:
  PromptQueries queries_;
};

/// Answers by one method, layers that see the whole context; those with a window stay exact. The first call of each
/// layer builds what the method needs over `prompt_len` rows.
class BaselineDecoder : public HostDecoder {
 public:
  BaselineDecoder(Host& host, const eval::BaselineSpec& spec, const PromptQueries& prompt, int64_t prompt_len,
                  uint64_t seed);
  /// |o - o_exact| / |o_exact| at the inputs that each layer got, mean over every fourth query, layers and heads.
  double mean_error() const { return errors_ > 0 ? error_sum_ / errors_ : 0; }
  /// Of the queries it answered.
  const tactic_totals& totals() const { return totals_; }

 protected:
  bool answer(const tactic_query& query, tactic_step_stats& stats) override;

 private:
  struct LayerState {
    eval::Rows rows;
    std::unique_ptr<eval::Baseline> baseline;
  };
  LayerState& prepare(const tactic_query& query, const KvView& kv);
  void add_errors(const eval::Step& step, const std::vector<float>& out);

  eval::BaselineSpec spec_;
  const PromptQueries& prompt_;
  int64_t prompt_len_;
  uint64_t seed_;
  std::vector<LayerState> layers_;
  tactic_totals totals_ = {};
  double error_sum_ = 0, errors_ = 0;
};

}  // namespace tactic::tool
