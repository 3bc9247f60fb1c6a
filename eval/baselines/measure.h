// The error of baselines over a trace, in the same cases as the library's own selectors (trace_error.h).
#pragma once

#include <span>
#include <vector>

#include "baselines/baseline.h"
#include "dense_layer.h"
#include "trace_error.h"

namespace tactic::eval {

/// Measures every method on one layer, at the decode queries `answers` (ascending). What a method builds, it builds
/// over the trace's prompt; rows after it are new to it. Layers with a sliding window give no cases.
std::vector<SettingCases> measure_baselines(const TraceLayer& layer, int32_t layer_number,
                                            std::span<const DenseQuery> answers, std::span<const BaselineSpec> specs,
                                            uint64_t seed);

}  // namespace tactic::eval
