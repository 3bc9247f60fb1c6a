// The cache types of ggml that the library knows; the plug-in and the command share them.
#pragma once

#include <optional>
#include <utility>

#include "ggml.h"
#include "tactic/kv_view.h"

namespace tactic::plugin {

inline constexpr std::pair<ggml_type, DType> kCacheTypes[] = {{GGML_TYPE_F32, DType::kF32},
                                                              {GGML_TYPE_F16, DType::kF16},
                                                              {GGML_TYPE_BF16, DType::kBF16},
                                                              {GGML_TYPE_Q8_0, DType::kQ8_0},
                                                              {GGML_TYPE_Q4_0, DType::kQ4_0}};

/// nullopt: another type.
inline std::optional<DType> dtype_of(ggml_type type) {
  for (const auto& [ours, dtype] : kCacheTypes) {
    if (ours == type) return dtype;
  }
  return std::nullopt;
}

/// GGML_TYPE_COUNT: ggml has none such.
inline ggml_type ggml_type_of(DType dtype) {
  for (const auto& [type, ours] : kCacheTypes) {
    if (ours == dtype) return type;
  }
  return GGML_TYPE_COUNT;
}

}  // namespace tactic::plugin
