#include "log.h"

#include <cstdarg>
#include <cstdio>

#include "ggml-impl.h"

namespace tactic::plugin {

void log_error(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  GGML_LOG_ERROR("tactic: %s\n", text);
}

void log_warning(const char* text) { GGML_LOG_WARN("tactic: %s\n", text); }

}  // namespace tactic::plugin
