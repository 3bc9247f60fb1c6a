// What the command does with bytes from outside: text becomes UTF-8, whole or in pieces, and lists of numbers
// and modes are what they say.
#include <algorithm>
#include <string>

#include "host.h"
#include "input.h"
#include "text.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace tactic::tool;
  using tactic::fuzz::require;
  tactic::fuzz::Input input(data, size);
  const int64_t piece = input.within(1, 7);
  const std::string bytes(input.rest());

  std::string whole = bytes;
  size_t first = 0;
  const int64_t places = repair_utf8(whole, &first);
  require(places > 0 ? first < bytes.size() : whole == bytes, "only what is wrong is replaced");
  std::string again = whole;
  require(repair_utf8(again, nullptr) == 0 && again == whole, "what was repaired is valid");

  Utf8Stream stream;
  std::string streamed;
  for (size_t at = 0; at < bytes.size(); at += static_cast<size_t>(piece)) {
    std::string part = stream.push(std::string_view(bytes).substr(at, static_cast<size_t>(piece)));
    require(repair_utf8(part, nullptr) == 0, "each part is valid");
    streamed += part;
  }
  streamed += stream.flush();
  require(repair_utf8(streamed, nullptr) == 0, "the whole is valid");
  if (places == 0) require(streamed == bytes, "valid text passes unchanged");

  for (const char c : escape_controls(whole))
    require(static_cast<unsigned char>(c) >= 0x20 && c != 0x7F, "no control is left");

  try {
    require(!parse_modes(bytes).empty(), "a list of modes names one");
  } catch (const CommandError&) {
  }
  try {
    const std::vector<int64_t> numbers = parse_numbers(bytes.substr(0, 32), "--numbers", 0, 100000);
    require(!numbers.empty() &&
                std::all_of(numbers.begin(), numbers.end(), [](int64_t n) { return n >= 0 && n <= 100000; }),
            "numbers lie in the range");
  } catch (const CommandError&) {
  }
  return 0;
}
