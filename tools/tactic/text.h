// Text in and out: files, chat templates, generated texts, whole UTF-8 characters, lists of numbers.
#pragma once

#include <llama.h>

#include <cstdint>
#include <fstream>
#include <string>
#include <string_view>
#include <vector>

namespace tactic::tool {

/// Bytes that are no valid UTF-8, and zero bytes, become U+FFFD. Returns how many places; `first` is the offset of the
/// first.
int64_t repair_utf8(std::string& text, size_t* first);
/// Throws CommandError that says why it cannot be read; `what` it is, as in "the model ".
std::ifstream open_input(const std::string& path, const std::string& what = "");
/// Before the minutes of work, and without making or touching the file: throws CommandError that says why it cannot be
/// written. `replaced`: by another of its name, so that only its folder counts, and that it is no device.
void check_writable(const std::string& path, bool replaced = false);
/// Throws CommandError for a device or a pipe, which is neither replaced nor read to an end.
void check_regular(const std::string& path);
/// Throws CommandError if the output is one of the files that are read, which it would destroy. "": no file.
void check_apart(const std::string& output, const std::vector<std::string>& inputs);
/// While it lives no other process has a SoleWriter of the file, which is made if it is missing and goes again if
/// nothing is written. Throws CommandError if another has one.
class SoleWriter {
 public:
  explicit SoleWriter(const std::string& path);
  ~SoleWriter();
  SoleWriter(const SoleWriter&) = delete;
  SoleWriter& operator=(const SoleWriter&) = delete;

 private:
  std::string path_;
  bool made_;
  int descriptor_;
};
/// The whole file as valid UTF-8; warns on stderr about what was replaced.
std::string read_text(const std::string& path);

/// Gives out text only when its last character is whole.
class Utf8Stream {
 public:
  std::string push(std::string_view bytes);
  /// U+FFFD if a part of a character is held back; forgets it.
  std::string flush();

 private:
  std::string held_;
};

/// One user message in the model's own chat template, ready for the answer. Falls back to ChatML if the model knows its
/// markers, else to the bare text.
std::string format_chat(const llama_model* model, const std::string& user_text);

/// Records like "line lucid-harbor: REGISTER_CONTENT is <48213>", about 20 tokens each. The same seed, the same names.
std::vector<std::string> make_records(int64_t count, uint64_t seed);
/// Plain sentences of at least `size_bytes`.
std::string make_prose(size_t size_bytes, uint64_t seed);

/// "0,2000", "1000-8000:1000" (steps of 1000), "1024-32768x2" (doubling). Throws CommandError outside [low, high].
std::vector<int64_t> parse_numbers(const std::string& text, const std::string& option, int64_t low, int64_t high);

/// For one line of a report: line breaks and other controls written as escapes.
std::string escape_controls(const std::string& text);

}  // namespace tactic::tool
