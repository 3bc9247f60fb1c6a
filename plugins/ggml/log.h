// One line of error or warning through ggml's log.
#pragma once

namespace tactic::plugin {

void log_error(const char* format, ...) __attribute__((format(printf, 1, 2)));
void log_warning(const char* text);

}  // namespace tactic::plugin
