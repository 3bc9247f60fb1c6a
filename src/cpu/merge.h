// merge: partial outputs of disjoint sets of rows become one. Associative; the empty partial is the identity.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "core/steps.h"

namespace tactic::cpu {

/// Adds the partial (state, values) of `other` into (state, values). values: sum of exp(score - max) * v, [v_head_dim].
inline void merge(SoftmaxState& state, float* values, const SoftmaxState& other, const float* other_values,
                  int32_t v_head_dim) {
  if (other.sum == 0 && other.max == -HUGE_VALF) return;
  const float max = state.max > other.max ? state.max : other.max;
  const float mine = state.max == max ? 1.0f : std::exp(state.max - max);
  const float theirs = other.max == max ? 1.0f : std::exp(other.max - max);
  for (int32_t d = 0; d < v_head_dim; ++d) values[d] = values[d] * mine + other_values[d] * theirs;
  state.sum = state.sum * mine + other.sum * theirs;
  state.max = max;
}

/// Divides by the sum; without any row the output is zero and lse -infinity.
inline void finish(const SoftmaxState& state, const float* values, int32_t v_head_dim, float* out, float* lse) {
  const bool empty = state.sum == 0 && state.max == -HUGE_VALF;
  for (int32_t d = 0; d < v_head_dim; ++d) out[d] = empty ? 0.0f : values[d] / state.sum;
  if (lse != nullptr) *lse = empty ? -HUGE_VALF : state.max + std::log(state.sum);
}

}  // namespace tactic::cpu
