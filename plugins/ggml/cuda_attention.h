// Sparse decode on a backend of ggml's CUDA devices, by tactic/cuda.h.
#pragma once

#include "gpu_hook.h"

namespace tactic::plugin {

/// Throws Error when the backend's device cannot be served.
std::unique_ptr<GpuAttention> make_cuda_attention(ggml_backend_t backend);

}  // namespace tactic::plugin
