#include "log.h"

#include <cstdarg>
#include <cstdio>

#include "ggml-impl.h"

namespace tactic::plugin {

namespace {

void log(ggml_log_level level, const char* format, va_list arguments) {
  char text[1024];
  std::vsnprintf(text, sizeof text, format, arguments);
  ggml_log_internal(level, "tactic: %s\n", text);
}

}  // namespace

void log_error(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  log(GGML_LOG_LEVEL_ERROR, format, arguments);
  va_end(arguments);
}

void log_info(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  log(GGML_LOG_LEVEL_INFO, format, arguments);
  va_end(arguments);
}

}  // namespace tactic::plugin
