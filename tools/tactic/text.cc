#include "text.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <set>

#include "host.h"
#include "report.h"

namespace tactic::tool {
namespace {

// Length of the valid UTF-8 character at `text`; 0: invalid; -1: the text ends within it.
int character_length(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned lead = byte(0);
  if (lead < 0x80) return 1;
  const int length = lead >= 0xC2 && lead <= 0xDF   ? 2
                     : (lead & 0xF0) == 0xE0        ? 3
                     : lead >= 0xF0 && lead <= 0xF4 ? 4
                                                    : 0;
  if (length == 0) return 0;
  for (size_t i = 1; i < static_cast<size_t>(length); ++i) {
    if (i >= text.size()) return -1;
    unsigned low = 0x80, high = 0xBF;
    if (i == 1 && lead == 0xE0) low = 0xA0;   // overlong
    if (i == 1 && lead == 0xED) high = 0x9F;  // surrogates
    if (i == 1 && lead == 0xF0) low = 0x90;   // overlong
    if (i == 1 && lead == 0xF4) high = 0x8F;  // beyond U+10FFFF
    if (byte(i) < low || byte(i) > high) return 0;
  }
  return length;
}

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

template <size_t N>
const char* pick(const char* const (&words)[N], std::mt19937_64& random) {
  return words[random() % N];
}

int64_t parse_number(std::string_view text, const std::string& option, int64_t low, int64_t high) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) {
    throw CommandError(option + ": '" + std::string(text) + "' is not a whole number");
  }
  if (value < low || value > high) {
    throw CommandError(option + ": " + std::string(text) + " is outside " + std::to_string(low) + " to " +
                       std::to_string(high));
  }
  return value;
}

}  // namespace

int64_t repair_utf8(std::string& text, size_t* first) {
  std::string repaired;
  int64_t places = 0;
  size_t copied = 0;
  for (size_t i = 0; i < text.size();) {
    const int length = text[i] == '\0' ? 0 : character_length(std::string_view(text).substr(i));
    if (length > 0) {
      i += static_cast<size_t>(length);
      continue;
    }
    if (places++ == 0 && first != nullptr) *first = i;
    repaired.append(text, copied, i - copied).append(kReplacement);
    copied = ++i;
  }
  if (places > 0) text = repaired.append(text, copied);
  return places;
}

std::ifstream open_input(const std::string& path, const std::string& what) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error))
    throw CommandError("cannot read " + what + path + ": it is a directory");
  std::ifstream file(path, std::ios::binary);
  if (!file) throw CommandError("cannot read " + what + path + ": " + std::strerror(errno));
  return file;
}

void check_writable(const std::string& path, bool replaced) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) throw CommandError("cannot write " + path + ": it is a directory");
  if (replaced) check_regular(path);
  const bool is_there = !replaced && std::filesystem::exists(path, error);
  const std::string checked = is_there ? path : std::filesystem::absolute(path, error).parent_path().string();
  if (access(checked.c_str(), is_there ? W_OK : W_OK | X_OK) != 0)
    throw CommandError("cannot write " + path + ": " + std::strerror(errno));
}

void check_regular(const std::string& path) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status))
    throw CommandError("cannot write " + path + ": it is there and no regular file");
}

SoleWriter::SoleWriter(const std::string& path)
    : path_(path),
      made_(access(path.c_str(), F_OK) != 0),
      descriptor_(open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666)) {
  if (descriptor_ >= 0 && flock(descriptor_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
    close(descriptor_);
    throw CommandError("cannot write " + path + ": another process writes it");
  }
}

SoleWriter::~SoleWriter() {
  struct stat file {};
  if (made_ && fstat(descriptor_, &file) == 0 && file.st_size == 0) unlink(path_.c_str());
  if (descriptor_ >= 0) close(descriptor_);
}

void check_apart(const std::string& output, const std::vector<std::string>& inputs) {
  std::error_code error;
  for (const std::string& input : inputs) {
    if (!input.empty() && std::filesystem::equivalent(output, input, error))
      throw CommandError("cannot write " + output + ": it is a file that is read");
  }
}

std::string read_text(const std::string& path) {
  std::ifstream file = open_input(path);
  constexpr size_t kMaxBytes = size_t{1} << 30;  // llama.cpp counts bytes and tokens in 32 bits
  constexpr size_t kPart = size_t{1} << 20;      // a file may have no end
  std::string text;
  while (file.peek() != std::ifstream::traits_type::eof()) {
    const size_t had = text.size();
    if (had == kMaxBytes) throw CommandError(path + " is larger than 1 GiB");
    text.resize(had + kPart);
    file.read(text.data() + had, kPart);
    text.resize(had + static_cast<size_t>(file.gcount()));
  }
  size_t first = 0;
  if (const int64_t places = repair_utf8(text, &first); places > 0) {
    std::fprintf(stderr,
                 "tactic: warning: %s is not UTF-8 text: %lld byte(s) replaced by U+FFFD, the first at offset %zu\n",
                 path.c_str(), static_cast<long long>(places), first);
  }
  return text;
}

std::string Utf8Stream::push(std::string_view bytes) {
  held_ += bytes;
  // Only the last three bytes can begin a character that is not whole yet.
  size_t whole = held_.size();
  for (size_t back = 1; back <= std::min<size_t>(3, held_.size()); ++back) {
    const size_t at = held_.size() - back;
    if ((held_[at] & 0xC0) == 0x80) continue;
    if (character_length(std::string_view(held_).substr(at)) < 0) whole = at;
    break;
  }
  std::string out = held_.substr(0, whole);
  held_.erase(0, whole);
  repair_utf8(out, nullptr);
  return out;
}

std::string Utf8Stream::flush() {
  const bool is_whole = held_.empty();
  held_.clear();
  return std::string(is_whole ? "" : kReplacement);
}

std::string format_chat(const llama_model* model, const std::string& user_text) {
  const char* chat_template = llama_model_chat_template(model, nullptr);
  const llama_chat_message message = {"user", user_text.c_str()};
  std::string text(user_text.size() + 1024, '\0');
  for (const char* candidate : {chat_template, "chatml"}) {
    if (candidate == nullptr) continue;
    if (candidate != chat_template) {
      // A model that does not know the marker as one token was not trained on ChatML.
      if (tokenize(llama_model_get_vocab(model), "<|im_start|>", false, true).size() != 1) break;
    }
    for (;;) {
      const int32_t n =
          llama_chat_apply_template(candidate, &message, 1, true, text.data(), static_cast<int32_t>(text.size()));
      if (n < 0) break;
      const bool fits = static_cast<size_t>(n) < text.size();
      text.resize(static_cast<size_t>(n) + (fits ? 0 : 1));
      if (fits) return text;
    }
  }
  std::fputs("tactic: note: no chat template that llama.cpp knows; the bare text is used\n", stderr);
  return user_text;
}

std::vector<std::string> make_records(int64_t count, uint64_t seed) {
  static constexpr const char* kAdjectives[] = {
      "amber", "brisk", "calm",   "dusty",  "eager",  "faint", "gentle", "hollow", "icy",
      "jolly", "keen",  "lucid",  "mellow", "narrow", "ochre", "plain",  "quiet",  "rapid",
      "sandy", "tidy",  "upper",  "vivid",  "windy",  "young", "bitter", "clever", "dim",
      "fresh", "grand", "humble", "loyal",  "modern", "noble", "proud",  "rustic", "silver"};
  static constexpr const char* kNouns[] = {
      "anchor", "beacon", "cabin",    "delta",  "ember",   "falcon",  "garden", "harbor", "island",
      "jacket", "kettle", "ladder",   "meadow", "needle",  "orchard", "pillar", "quarry", "river",
      "saddle", "temple", "umbrella", "valley", "window",  "yard",    "bridge", "candle", "desert",
      "engine", "forest", "glacier",  "hammer", "lantern", "mirror",  "parcel", "rocket", "spoon"};
  std::mt19937_64 random(seed);
  std::vector<std::string> lines;
  std::set<std::string> names;
  for (int64_t i = 0; i < count; ++i) {
    const char* adjective = pick(kAdjectives, random);
    const char* noun = pick(kNouns, random);
    std::string name = format("%s-%s", adjective, noun);
    while (!names.insert(name).second) {
      name =
          format("%s-%s-%llu", adjective, noun, static_cast<unsigned long long>(random() % (1000 + 10 * lines.size())));
    }
    lines.push_back(format("line %s: REGISTER_CONTENT is <%05d>\n", name.c_str(), static_cast<int>(random() % 100000)));
  }
  return lines;
}

std::string make_prose(size_t size_bytes, uint64_t seed) {
  static constexpr const char* kPeople[] = {"the captain", "Maria",        "an old teacher", "the clerk",
                                            "Tobias",      "the gardener", "a young sailor", "the widow",
                                            "Henrik",      "the doctor",   "her brother",    "the judge"};
  static constexpr const char* kVerbs[] = {"remembered", "described", "avoided",    "followed", "repaired",
                                           "sold",       "counted",   "defended",   "painted",  "forgot",
                                           "measured",   "carried",   "questioned", "admired"};
  static constexpr const char* kThings[] = {"the letter",         "a broken clock", "the northern road",
                                            "two silver coins",   "the harvest",    "a map of the coast",
                                            "the long winter",    "his debts",      "the garden wall",
                                            "an unfinished song", "the last ferry", "a bowl of soup"};
  static constexpr const char* kPlaces[] = {"near the harbor",   "in the market square", "behind the mill",
                                            "at the station",    "on the second floor",  "beyond the river",
                                            "in the courthouse", "by the fire"};
  static constexpr const char* kTimes[] = {"Before dawn", "That evening", "In the third week",    "After the storm",
                                           "As usual",    "Years later",  "On the following day", "Without a word"};
  static constexpr const char* kLinks[] = {"because", "although", "while", "until", "so that", "and then", "but"};
  std::mt19937_64 random(seed);
  std::string text;
  while (text.size() < size_bytes) {
    for (uint64_t sentences = 3 + random() % 5; sentences > 0; --sentences) {
      text += format("%s %s %s %s %s", pick(kTimes, random), pick(kPeople, random), pick(kVerbs, random),
                     pick(kThings, random), pick(kPlaces, random));
      if (random() % 2 == 0) {
        text += format(", %s %s %s %s", pick(kLinks, random), pick(kPeople, random), pick(kVerbs, random),
                       pick(kThings, random));
      }
      text += ". ";
    }
    text.back() = '\n';
  }
  return text;
}

std::vector<int64_t> parse_numbers(const std::string& text, const std::string& option, int64_t low, int64_t high) {
  constexpr size_t kMost = 10000;
  std::vector<int64_t> numbers;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string_view item = std::string_view(text).substr(begin, end - begin);
    const size_t dash = item.find('-', 1);
    const size_t step = item.find_first_of(":x", 1);
    begin = end + 1;
    if (dash == std::string_view::npos) {
      numbers.push_back(parse_number(item, option, low, high));
      continue;
    }
    if (step == std::string_view::npos || step < dash) {
      throw CommandError(option + ": the range '" + std::string(item) +
                         "' needs a step, as in 1000-8000:1000 or 1024-8192x2");
    }
    const int64_t last = parse_number(item.substr(dash + 1, step - dash - 1), option, low, high);
    const bool multiplies = item[step] == 'x';
    const int64_t by = parse_number(item.substr(step + 1), option + ", step", multiplies ? 2 : 1, high);
    const int64_t first = parse_number(item.substr(0, dash), option, multiplies ? 1 : low, high);
    if (first > last) throw CommandError(option + ": the range '" + std::string(item) + "' does not rise");
    for (int64_t n = first; n <= last;) {
      if (numbers.size() == kMost) throw CommandError(option + ": more than 10000 numbers in '" + text + "'");
      numbers.push_back(n);
      n = multiplies ? n * by : n + by;
    }
  }
  if (numbers.empty()) throw CommandError(option + ": no number in '" + text + "'");
  return numbers;
}

std::string escape_controls(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '\n') {
      out += "\\n";
    } else if (c == '\t') {
      out += "\\t";
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) {
      out += format("\\x%02x", static_cast<unsigned>(c));
    } else {
      out += c;
    }
  }
  return out;
}

}  // namespace tactic::tool
