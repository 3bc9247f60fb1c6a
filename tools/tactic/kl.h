// How far two next-token distributions are apart, and a place to keep the exact ones.
#pragma once

#include <llama.h>

#include <cstdint>

namespace tactic::tool {

/// The distribution behind logits: its most probable token, and what to take off a logit for the log probability.
struct Normalizer {
  llama_token top;
  double lse;  // natural log of the sum of exp(logit)
};

/// `logits`: [vocab_size].
Normalizer normalize(const float* logits, int32_t vocab_size);

struct TokenComparison {
  double kl = 0;         // KL(exact || other) in nats, over the whole vocabulary in double
  double exact_nll = 0;  // -ln probability of the token that the text has next
  double nll = 0;
  llama_token exact_top = 0;  // most probable token
  llama_token top = 0;
};

/// `exact`, `other`: logits [vocab_size].
TokenComparison compare_logits(const float* exact, const float* other, int32_t vocab_size, llama_token next);

/// Rows of logits in an unlinked temporary file, mapped: a long evaluation of a large vocabulary takes gigabytes.
class LogitStore {
 public:
  LogitStore(int64_t rows, int32_t vocab_size);
  ~LogitStore();
  LogitStore(const LogitStore&) = delete;
  LogitStore& operator=(const LogitStore&) = delete;

  float* row(int64_t i) { return data_ + i * vocab_size_; }
  void set(int64_t i, const float* logits);

 private:
  float* data_ = nullptr;
  int64_t vocab_size_ = 0;
  size_t size_bytes_ = 0;
};

}  // namespace tactic::tool
