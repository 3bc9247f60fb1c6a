// Traces of models that are not at hand: keys and queries made with the statistics of QK-normed heads (as in Qwen 3 or
// Gemma 3), so that a default is tried on more than one shape of attention. No text, no model.
#pragma once

#include <cstdint>
#include <string>

namespace tactic::eval {

/// Each position has a token (Zipf over a vocabulary) and a topic (which lasts a while and comes back). A key is what
/// all keys share + its topic + its token + noise, over a decaying spectrum of dimensions, RMS-normed, scaled and
/// rotated (RoPE). A query is what all queries share + its position's topic and token + noise, normed and rotated
/// likewise. Heads differ in temperature, from flat to peaked, and in how much they look at topic, token and the sink
/// at position 0.
struct SyntheticOptions {
  std::string name = "normed-128";
  int32_t num_layers = 8, num_q_heads = 8, num_kv_heads = 2, head_dim = 128;
  int64_t kv_len = 8192, prompt_len = 6144, queries = 64, prompt_queries = 32;
  float flatness = 1.0f;  // scales the temperature: at 1 the heads' scores spread by 0.7 to 4
  uint64_t seed = 1;
};

/// "normed-128" (8 query and 2 KV heads of 128), "normed-256" (4 and 1 of 256), "flat-128" (as the first, twice as
/// flat). Throws Error for another name.
SyntheticOptions synthetic_preset(const std::string& name);

/// Writes the trace. The same options, the same file.
void write_synthetic(const std::string& path, const SyntheticOptions& options);

}  // namespace tactic::eval
