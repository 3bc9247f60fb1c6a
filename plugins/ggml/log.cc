#include "log.h"

#include <cstdarg>
#include <cstdio>
#include <string>

#include "ggml-impl.h"

namespace tactic::plugin {

namespace {

std::string line(const char* format, va_list arguments) {
  char text[1024];
  std::vsnprintf(text, sizeof text, format, arguments);
  return text;
}

}  // namespace

void log_error(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  GGML_LOG_ERROR("tactic: %s\n", line(format, arguments).c_str());
  va_end(arguments);
}

void log_warning(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  GGML_LOG_WARN("tactic: %s\n", line(format, arguments).c_str());
  va_end(arguments);
}

}  // namespace tactic::plugin
