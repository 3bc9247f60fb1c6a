// The cache types of ggml that the library knows; the plug-in and the command share them.
#pragma once

#include <optional>

#include "ggml.h"
#include "tactic/kv_view.h"

namespace tactic::plugin {

/// nullopt: another type.
inline std::optional<DType> dtype_of(ggml_type type) {
  switch (type) {
    case GGML_TYPE_F32: return DType::kF32;
    case GGML_TYPE_F16: return DType::kF16;
    case GGML_TYPE_BF16: return DType::kBF16;
    case GGML_TYPE_Q8_0: return DType::kQ8_0;
    case GGML_TYPE_Q4_0: return DType::kQ4_0;
    default: return std::nullopt;
  }
}

inline ggml_type ggml_type_of(DType dtype) {
  switch (dtype) {
    case DType::kF32: return GGML_TYPE_F32;
    case DType::kF16: return GGML_TYPE_F16;
    case DType::kBF16: return GGML_TYPE_BF16;
    case DType::kQ8_0: return GGML_TYPE_Q8_0;
    case DType::kQ4_0: return GGML_TYPE_Q4_0;
    case DType::kF8E4M3: break;  // ggml has none
  }
  return GGML_TYPE_COUNT;
}

}  // namespace tactic::plugin
