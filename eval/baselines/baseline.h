// Other methods of sparse decode attention, one file each, under one interface: given the queries of one step at one
// layer, which rows are read, with what weight, and how many bytes that costs.
//
//   Rows rows;  rows.extend(kv);                                   // rows [0, kv_len) decoded
//   auto quest = make_baseline(parse_baseline("quest,budget=512"), {.rows = &rows, .kv = kv, ...});
//   Choice choice;
//   quest->select(Step(rows, q, head_dim, num_q_heads, sm_scale, kv_len), choice);
//   attend(step, choice, out);
//
// All of them read the first `sinks` rows and the newest `recent` rows exactly (these count too), and `budget` rows
// besides.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "baselines/rows.h"
#include "tactic/selection.h"

namespace tactic::eval {

class ClusterCache;  // common.h

/// What is known when the prompt is in the cache.
struct Layer {
  const Rows* rows = nullptr;
  KvView kv;  // at least prompt_len rows
  int64_t prompt_len = 0;
  int32_t num_q_heads = 0;
  float sm_scale = 1;
  std::span<const float> prompt_q;    // [n, num_q_heads, head_dim]: the last n prompt positions, oldest first
  int32_t layer = 0, num_layers = 1;  // place and number among the layers that a method answers: those without a window
  uint64_t seed = 0;
  ClusterCache* clusterings = nullptr;  // shared by methods of this layer that are made one after the other, or nullptr

  int32_t group_size() const { return num_q_heads / kv.num_kv_heads; }
};

/// One query position. Every true score is at hand; a baseline pays for those that it looks at.
class Step {
 public:
  /// q: [num_q_heads, head_dim]; the query sees rows [0, kv_len).
  Step(const Rows& rows, const float* q, int64_t q_head_stride, int32_t num_q_heads, float sm_scale, int64_t kv_len);

  const Rows& rows() const { return *rows_; }
  int64_t kv_len() const { return kv_len_; }
  int32_t num_q_heads() const { return num_q_heads_; }
  int32_t group_size() const { return num_q_heads_ / rows_->num_kv_heads(); }
  /// Scaled by sm_scale: a score is this times a key.
  const float* q(int32_t q_head) const {
    return q_.data() + static_cast<size_t>(q_head) * static_cast<size_t>(rows_->head_dim());
  }
  /// [kv_len]
  const float* scores(int32_t q_head) const { return scores_.data() + q_head * kv_len_; }

 private:
  const Rows* rows_;
  int64_t kv_len_;
  int32_t num_q_heads_;
  std::vector<float> q_, scores_;
};

/// Stands for rows that are not read.
struct Estimate {
  double log_sum = -__builtin_inf();  // natural log of their sum of exp(score)
  std::vector<float> value;           // [v_head_dim] their mean value under these weights
};

/// What a step reads. Rows of the selection cost their K and V bytes once per KV head.
struct Choice {
  Selection selection;  // [num_kv_heads]
  std::vector<std::vector<float>>
      head_log_weights;             // [num_q_heads][rows]: instead of the selection's; -infinity: not for this head
  std::vector<Estimate> estimates;  // [num_q_heads] or empty
  int64_t summary_bytes = 0;        // centroids, page bounds, codes, tables, row lists

  int64_t tokens() const;   // rows over all KV heads
  int64_t sampled() const;  // of those, rows with a weight of their own
  int64_t bytes(const Rows& rows) const;
};

/// A method for one layer and sequence. Steps come in the order of their positions.
class Baseline {
 public:
  virtual ~Baseline() = default;
  virtual void select(const Step& step, Choice& out) = 0;
};

/// "quest,budget=512": a name and numbers.
struct BaselineSpec {
  std::string text, name;
  std::map<std::string, double> values;

  double at(const std::string& key) const { return values.at(key); }
  int64_t count(const std::string& key) const { return static_cast<int64_t>(at(key)); }
};

/// Whether the text begins with the name of a baseline.
bool is_baseline(const std::string& text);
/// With defaults filled in. Throws Error naming what is unknown or out of range and what is allowed.
BaselineSpec parse_baseline(const std::string& text);
/// Names and options with their defaults, for help texts.
std::vector<std::string> baseline_help();
std::unique_ptr<Baseline> make_baseline(const BaselineSpec& spec, const Layer& layer);

/// out: [num_q_heads, v_head_dim].
void attend(const Step& step, const Choice& choice, float* out);
/// Over all rows.
void attend_dense(const Step& step, float* out);

}  // namespace tactic::eval
