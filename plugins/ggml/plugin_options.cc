#include "plugin_options.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <functional>
#include <limits>
#include <string>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

#include "tactic/error.h"

namespace tactic::plugin {

namespace {

struct Preset {
  const char* name;
  Select select;
  float target_error;
};

// Error targets; what KL they mean is measured in docs/results.md.
constexpr Preset kPresets[] = {
    {"exact", Select::kDense, 0.022f},
    {"high", Select::kSample, 0.022f},
    {"balanced", Select::kSample, 0.044f},
    {"fast", Select::kSample, 0.07f},
};

[[noreturn]] void fail(std::string_view key, std::string_view value, const std::string& allowed) {
  throw Error(std::string(key) + "=" + std::string(value) + ": must be " + allowed);
}

template <class T>
T number(std::string_view key, std::string_view value) {
  T result{};
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), result);
  if (error == std::errc::result_out_of_range) {
    if (!std::is_integral_v<T>) fail(key, value, "0 or of a size in 1.2e-38..3.4e38");
    fail(key, value, value.front() == '-' ? "at least 0" : "at most " + std::to_string(std::numeric_limits<T>::max()));
  }
  if (error != std::errc() || end != value.data() + value.size())
    fail(key, value,
         !std::is_integral_v<T> ? "a number"
         : std::is_signed_v<T>  ? "a whole number"
                                : "a whole number from 0 on");
  return result;
}

bool flag(std::string_view key, std::string_view value) {
  if (value != "0" && value != "1") fail(key, value, "0 or 1");
  return value == "1";
}

int32_t in_range(std::string_view key, std::string_view value, int32_t low, int32_t high) {
  const auto result = number<int64_t>(key, value);
  if (!(result >= low && result <= high)) fail(key, value, "in " + std::to_string(low) + ".." + std::to_string(high));
  return static_cast<int32_t>(result);
}

// A preset named where a selector belongs.
std::string preset_hint(std::string_view name) {
  for (const Preset& preset : kPresets) {
    if (name == preset.name) return "; quality=" + std::string(name) + " is a preset";
  }
  return "";
}

using Setter = std::function<void(PluginOptions&, std::string_view key, std::string_view value)>;

const std::vector<std::pair<const char*, Setter>>& setters() {
  using O = PluginOptions;
  using S = std::string_view;
  static const std::vector<std::pair<const char*, Setter>> table = {
      {"select",
       [](O& o, S, S v) {
         try {
           o.enabled = v != "off";
           if (o.enabled) o.decode.select = select_from_name(v);
         } catch (const Error& error) {
           throw Error(error.what() + std::string(", off") + preset_hint(v));
         }
       }},
      {"error", [](O& o, S k, S v) { o.decode.target_error = number<float>(k, v); }},
      {"tau", [](O& o, S k, S v) { o.decode.tau = number<float>(k, v); }},
      {"refine", [](O& o, S k, S v) { o.decode.refine = number<float>(k, v); }},
      {"mass", [](O& o, S k, S v) { o.decode.target_mass = number<float>(k, v); }},
      {"budget", [](O& o, S k, S v) { o.decode.budget = number<int32_t>(k, v); }},
      {"beta", [](O& o, S k, S v) { o.decode.beta = number<float>(k, v); }},
      {"check", [](O& o, S k, S v) { o.decode.check_rows = flag(k, v); }},
      {"seed", [](O& o, S k, S v) { o.decode.seed = o.index.seed = number<uint64_t>(k, v); }},
      {"sinks", [](O& o, S k, S v) { o.index.sink_tokens = number<int32_t>(k, v); }},
      {"outliers", [](O& o, S k, S v) { o.index.outlier_fraction = number<float>(k, v); }},
      {"cluster", [](O& o, S k, S v) { o.index.cluster_tokens = number<int32_t>(k, v); }},
      {"segment", [](O& o, S k, S v) { o.index.segment_tokens = number<int32_t>(k, v); }},
      {"provisional", [](O& o, S k, S v) { o.index.provisional_tokens = number<int32_t>(k, v); }},
      {"provisional_cluster", [](O& o, S k, S v) { o.index.provisional_cluster_tokens = number<int32_t>(k, v); }},
      {"iterations", [](O& o, S k, S v) { o.index.iterations = number<int32_t>(k, v); }},
      {"clustering",
       [](O& o, S k, S v) {
         if (v == "incremental") o.index.clustering = Clustering::kIncremental;
         else if (v == "whole") o.index.clustering = Clustering::kWhole;
         else fail(k, v, "incremental or whole");
       }},
      {"min_context",
       [](O& o, S k, S v) {
         o.min_context = o.min_sparse = in_range(k, v, 0, 1 << 30);
         o.own_lengths = true;
       }},
      {"min_sparse",
       [](O& o, S k, S v) {
         o.min_sparse = in_range(k, v, 0, 1 << 30);
         o.own_lengths = true;
       }},
      {"max_rows", [](O& o, S k, S v) { o.max_rows = in_range(k, v, 1, 64); }},
      {"places", [](O& o, S k, S v) { o.places = in_range(k, v, 0, 64); }},
      {"accept",
       [](O& o, S k, S v) {
         if (v != "any") fail(k, v, "any");
         o.accept_any = true;
       }},
      {"inspect", [](O& o, S k, S v) { o.inspect = flag(k, v); }},
      {"fault",
       [](O& o, S k, S v) {
         if (v == "mask") o.faults.ignore_mask = true;
         else if (v == "writes") o.faults.ignore_writes = true;
         else if (v == "verify") o.faults.skip_verify = true;
         else fail(k, v, "mask, writes or verify");
       }},
  };
  return table;
}

std::string_view trimmed(std::string_view text) {
  const size_t first = text.find_first_not_of(" \t"), last = text.find_last_not_of(" \t");
  return first == std::string_view::npos ? std::string_view() : text.substr(first, last - first + 1);
}

std::vector<std::pair<std::string_view, std::string_view>> split(std::string_view text) {
  std::vector<std::pair<std::string_view, std::string_view>> items;
  while (!text.empty()) {
    const size_t comma = text.find(',');
    const std::string_view item = trimmed(text.substr(0, comma));
    text = comma == std::string_view::npos ? std::string_view() : text.substr(comma + 1);
    if (item.empty()) continue;
    const size_t equals = item.find('=');
    if (equals == std::string_view::npos) throw Error("\"" + std::string(item) + "\" must be key=value");
    items.emplace_back(trimmed(item.substr(0, equals)), trimmed(item.substr(equals + 1)));
  }
  return items;
}

// The library's names of options become the keys of this grammar.
std::string with_keys(std::string_view message) {
  static constexpr std::pair<std::string_view, std::string_view> kKeys[] = {
      {"target_error", "error"},
      {"target_mass", "mass"},
      {"cluster_tokens", "cluster"},
      {"segment_tokens", "segment"},
      {"provisional_tokens", "provisional"},
      {"provisional_cluster_tokens", "provisional_cluster"},
      {"sink_tokens", "sinks"},
      {"outlier_fraction", "outliers"},
  };
  std::string out;
  while (!message.empty()) {
    size_t length = 0;
    while (length < message.size() &&
           (std::isalnum(static_cast<unsigned char>(message[length])) != 0 || message[length] == '_'))
      ++length;
    std::string_view word = message.substr(0, std::max<size_t>(length, 1));
    message.remove_prefix(word.size());
    for (const auto& [name, key] : kKeys) {
      if (word == name) word = key;
    }
    out += word;
  }
  return out;
}

void apply_preset(PluginOptions& options, std::string_view name) {
  for (const Preset& preset : kPresets) {
    if (name != preset.name) continue;
    options.decode.select = preset.select;
    options.decode.target_error = preset.target_error;
    return;
  }
  fail("quality", name, "exact, high, balanced or fast");
}

}  // namespace

PluginOptions parse_options(std::string_view text) {
  PluginOptions options;
  const auto items = split(text);
  apply_preset(options, "high");
  std::string given_error, given_tau;
  for (const auto& [key, value] : items) {
    if (key == "quality") apply_preset(options, value);
    if (key == "error") given_error = "error=" + std::string(value);
    if (key == "tau") given_tau = "tau=" + std::string(value);
  }
  if (!given_error.empty() && !given_tau.empty())
    throw Error(given_error + " and " + given_tau + " say one thing in two ways; give one");
  for (const auto& [key, value] : items) {
    if (key == "quality") continue;
    const Setter* setter = nullptr;
    for (const auto& [name, candidate] : setters()) {
      if (key == name) setter = &candidate;
    }
    if (setter == nullptr) {
      std::string keys = "quality";
      for (const auto& entry : setters()) keys += std::string(", ") + entry.first;
      throw Error("unknown key \"" + std::string(key) + "\"; the keys are " + keys);
    }
    (*setter)(options, key, value);
  }
  options.min_sparse = std::max(options.min_sparse, options.min_context);
  try {
    validate(options.decode);
    validate(options.index);
  } catch (const Error& error) {
    throw Error(with_keys(error.what()));
  }
  return options;
}

}  // namespace tactic::plugin
