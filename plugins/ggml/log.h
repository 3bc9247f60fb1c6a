// One line of error through ggml's log.
#pragma once

namespace tactic::plugin {

void log_error(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace tactic::plugin
