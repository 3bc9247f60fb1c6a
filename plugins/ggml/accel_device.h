// The ggml device of type ACCEL: takes decode attention and cache writes from the CPU, leaves everything else to it.
#pragma once

#include "ggml-backend-impl.h"

namespace tactic::plugin {

ggml_backend_dev_t accel_device(ggml_backend_reg_t reg);

/// Threads of a backend made by accel_device (the host sets them).
void set_num_threads(ggml_backend_t backend, int num_threads);

}  // namespace tactic::plugin
