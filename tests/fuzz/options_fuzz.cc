// The grammar of the variable TACTIC: any text gives valid options or an Error with a message.
#include <string>

#include "input.h"
#include "plugin_options.h"
#include "tactic/error.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using tactic::fuzz::require;
  const std::string text(tactic::fuzz::Input(data, size).rest());
  try {
    const tactic::plugin::PluginOptions options = tactic::plugin::parse_options(text);
    validate(options.decode);
    validate(options.index);
    require(options.min_context >= 0 && options.max_rows >= 1, "limits are in range");
  } catch (const tactic::Error& error) {
    require(error.what()[0] != '\0', "an error says what is wrong");
  }
  return 0;
}
