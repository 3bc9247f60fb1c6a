// The error of attention over a trace: the library's own steps (KvIndex and Attention) at every recorded decode
// position, against exact attention.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "dense_layer.h"
#include "tactic/attention.h"
#include "trace.h"

namespace tactic::eval {

struct Setting {
  std::string name;
  IndexOptions index;
  DecodeOptions decode;
};

/// One query head of one step.
struct HeadCase {
  int32_t layer = 0;  // number in the file
  int32_t head = 0;   // query head
  int64_t position = 0;
  double error = 0;           // |o - o_dense| / |o_dense|
  double achieved_mass = 0;   // true mass of the rows read with certainty
  double estimated_mass = 0;  // what the step believed
  double mass_std_error = 0;  // and how sure it was
  double low = 0, high = 0;   // 95% interval of the estimate
  double missed_weight = 0;   // largest weight of a row that was not read
  int64_t missed_row = -1;
};

/// One step of one layer.
struct StepCase {
  double tokens = 0;  // rows read per KV head: bytes of K and V read, probes too, over the bytes of a row
  double tokens_certain = 0, tokens_sampled = 0;  // per KV head
  double read_fraction = 0;
  bool dense = false;
};

struct SettingCases {
  std::vector<HeadCase> heads;
  std::vector<StepCase> steps;
  void append(const SettingCases& other);
};

/// Measures every setting on one layer. `answers` are those of decode queries, ascending. An index grows from query to
/// query as rows would have come; settings that only read share it. A sampling setting has its own, which first sees
/// the trace's prompt queries (not measured) and learns at every step: a trace has one position of about thirty, a
/// decode has them all.
std::vector<SettingCases> measure_layer(const TraceLayer& layer, int32_t layer_number,
                                        std::span<const DenseQuery> answers, std::span<const Setting> settings);

/// What a table says of some cases.
struct ErrorSummary {
  double tokens = 0, tokens_certain = 0, read_fraction = 0;
  double mean = 0, median = 0, p99 = 0, max = 0;  // of the error
  int32_t max_layer = 0, max_head = 0;            // where the largest is
  int64_t max_position = 0;
  int32_t worst_layer = 0, worst_head = 0;  // of largest mean error
  double worst_mean = 0;
  double achieved_mass = 0;    // mean
  double success = 0;          // share of cases with achieved mass >= target
  double coverage = 0;         // share of sampled cases whose 95% interval holds the true mass
  double mass_bias = 0;        // mean of estimated - achieved over those
  double std_error_ratio = 0;  // root mean square error of the estimate / that of std_error
  double dense_share = 0;      // steps answered exactly
  int64_t cases = 0, sampled_cases = 0;
};

ErrorSummary summarize(const SettingCases& cases, double target_mass);

/// Tokens at which a family of points (tokens, error) reaches `error`: log-log between the neighbors, no extrapolation
/// (NaN).
struct TokensError {
  double tokens = 0, error = 0;
};
double tokens_at_error(std::vector<TokensError> points, double error);

}  // namespace tactic::eval
