// tactic eval trace: tokens read and error of attention for lists of settings, over recorded traces.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "baselines/measure.h"
#include "plugin_options.h"
#include "report.h"
#include "tactic/error.h"
#include "text.h"
#include "trace_error.h"
#include "verbs.h"

namespace tactic::tool {
namespace {

using eval::ErrorSummary;
using eval::Setting;
using eval::SettingCases;

struct EvalTraceOptions {
  std::vector<std::string> traces;
  std::string select = "sample,error=0.02-0.08x2;fit,mass=0.9|0.95|0.98", layers, json;
  int64_t queries = 0, within = 1 << 30, worst = 0;
  int32_t threads = 0;
};

struct Family {
  std::string name;  // as the user wrote it
  std::vector<Setting> settings;
};

double parse_value(const std::string& text, const std::string& item) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != 0 || !std::isfinite(value))
    throw CommandError("--select '" + item + "': '" + text + "' is not a number");
  return value;
}

// "a|b|c", "a-bxf" (times f), "a-b:s" (plus s); anything else is one value.
std::vector<std::string> expand_value(const std::string& value, const std::string& item) {
  std::vector<std::string> out;
  if (value.find('|') != std::string::npos) {
    for (size_t begin = 0; begin <= value.size();) {
      const size_t end = std::min(value.find('|', begin), value.size());
      out.push_back(value.substr(begin, end - begin));
      begin = end + 1;
    }
    return out;
  }
  const size_t dash = value.find('-', 1), by = value.find_first_of("x:", 1);
  if (dash == std::string::npos || by == std::string::npos || by < dash) return {value};
  const double low = parse_value(value.substr(0, dash), item),
               high = parse_value(value.substr(dash + 1, by - dash - 1), item);
  const double step = parse_value(value.substr(by + 1), item);
  const bool times = value[by] == 'x';
  if (high < low || (times ? !(step > 1 && low > 0) : !(step > 0)))
    throw CommandError("--select '" + item + "': the range '" + value + "' does not rise");
  for (double x = low; x <= high * (1 + 1e-9); x = times ? x * step : x + step) {
    out.push_back(format("%.6g", x));
    if (out.size() > 1000)
      throw CommandError("--select '" + item + "': the range '" + value + "' has more than 1000 values");
  }
  return out;
}

std::vector<Family> parse_families(const std::string& text) {
  std::vector<Family> families;
  for (const Mode& mode : parse_modes(text, "--select")) {
    std::vector<std::string> options{""};
    for (size_t begin = 0; begin < mode.options.size();) {
      const size_t end = std::min(mode.options.find(',', begin), mode.options.size());
      const std::string part = mode.options.substr(begin, end - begin);
      const size_t equals = part.find('=');
      begin = end + 1;
      std::vector<std::string> next;
      const auto values = equals == std::string::npos ? std::vector<std::string>{part}
                                                      : expand_value(part.substr(equals + 1), mode.name);
      for (const std::string& before : options) {
        for (const std::string& value : values) {
          next.push_back(before + (before.empty() ? "" : ",") +
                         (equals == std::string::npos ? value : part.substr(0, equals + 1) + value));
        }
      }
      options = std::move(next);
    }
    Family family{mode.name, {}};
    for (const std::string& one : options) {
      try {
        const std::string name = one.starts_with("select=") ? one.substr(7) : one;
        if (eval::is_baseline(name)) {
          family.settings.push_back({eval::parse_baseline(name).text, {}, {}});
          continue;
        }
        const plugin::PluginOptions parsed = plugin::parse_options(one);
        if (!parsed.enabled)
          throw CommandError("--select: llama.cpp's own attention (stock, off) is not evaluated on traces");
        if (const plugin::PluginOptions usual;
            parsed.min_context != usual.min_context || parsed.min_sparse != usual.min_sparse)
          throw CommandError("--select '" + mode.name +
                             "': min_context and min_sparse are not of traces, where every query is answered sparsely");
        family.settings.push_back({name, parsed.index, parsed.decode});
      } catch (const Error& error) {
        std::string reason = error.what();
        if (reason.starts_with("select=")) reason.erase(0, 7);  // parse_mode's, not the user's
        throw CommandError("--select '" + mode.name + "': " + reason);
      }
    }
    families.push_back(std::move(family));
  }
  return families;
}

std::vector<int32_t> chosen_layers(const EvalTraceOptions& options, const eval::Trace& trace) {
  std::vector<int32_t> layers;
  if (options.layers.empty()) {
    for (int32_t i = 0; i < trace.num_layers(); ++i) layers.push_back(i);
  } else {
    for (const int64_t i : parse_numbers(options.layers, "--layers", 0, trace.num_layers() - 1))
      layers.push_back(static_cast<int32_t>(i));
    std::sort(layers.begin(), layers.end());
    layers.erase(std::unique(layers.begin(), layers.end()), layers.end());
  }
  return layers;
}

// Methods other than the library's own have no answer for sliding-window layers, so that these tell nothing where both
// are compared.
void leave_out_windows(const eval::Trace& trace, std::vector<int32_t>& layers) {
  const size_t left = std::erase_if(layers, [&](int32_t i) { return trace.layer(i).info->window > 0; });
  if (layers.empty())
    throw CommandError(trace.path() + ": only sliding-window layers are asked for, which other methods do not answer");
  if (left > 0) {
    std::fprintf(stderr, "note: %s: %zu sliding-window layer(s) left out, which other methods do not answer\n",
                 trace.path().c_str(), left);
  }
}

// The decode queries, thinned evenly to `limit` if there are more.
std::vector<int64_t> chosen_queries(const eval::Trace& trace, int64_t limit, int64_t within) {
  std::vector<int64_t> all;
  for (int64_t i = 0; i < trace.info().num_queries(); ++i) {
    const bool near = trace.info().positions[static_cast<size_t>(i)] <= trace.info().prompt_len + within;
    if (trace.info().kinds[static_cast<size_t>(i)] == eval::QueryKind::kDecode && near) all.push_back(i);
  }
  const auto n = static_cast<int64_t>(all.size());
  if (limit == 0 || limit >= n) return all;
  std::vector<int64_t> some;
  for (int64_t i = 0; i < limit; ++i) some.push_back(all[static_cast<size_t>((2 * i + 1) * n / (2 * limit))]);
  return some;
}

// The library's settings and those that name another method, in the order given.
std::vector<SettingCases> measure_settings(const eval::TraceLayer& layer, int32_t number,
                                           const std::vector<eval::DenseQuery>& answers,
                                           const std::vector<Setting>& settings) {
  std::vector<Setting> own;
  std::vector<eval::BaselineSpec> others;
  for (const Setting& setting : settings) {
    eval::is_baseline(setting.name) ? others.push_back(eval::parse_baseline(setting.name)) : own.push_back(setting);
  }
  std::vector<SettingCases> own_cases = eval::measure_layer(layer, number, answers, own);
  std::vector<SettingCases> other_cases = eval::measure_baselines(layer, number, answers, others, 1);
  std::vector<SettingCases> all;
  all.reserve(settings.size());
  auto next_own = own_cases.begin(), next_other = other_cases.begin();
  for (const Setting& setting : settings)
    all.push_back(std::move(eval::is_baseline(setting.name) ? *next_other++ : *next_own++));
  return all;
}

// Null for layers that were not measured.
Json error_by_layer(const SettingCases& cases, const eval::Trace& trace) {
  std::vector<double> sums(static_cast<size_t>(trace.num_layers())), counts(sums.size());
  for (const eval::HeadCase& one : cases.heads)
    sums[static_cast<size_t>(one.layer)] += one.error, counts[static_cast<size_t>(one.layer)] += 1;
  Json means = Json::array();
  for (size_t l = 0; l < sums.size(); ++l) means.push_back(counts[l] > 0 ? Json(sums[l] / counts[l]) : Json());
  return means;
}

std::vector<SettingCases> measure(const EvalTraceOptions& options, const eval::Trace& trace,
                                  const std::vector<Setting>& settings) {
  std::vector<int32_t> layers = chosen_layers(options, trace);
  if (std::any_of(settings.begin(), settings.end(), [](const Setting& s) { return eval::is_baseline(s.name); }))
    leave_out_windows(trace, layers);
  const std::vector<int64_t> queries = chosen_queries(trace, options.queries, options.within);
  if (queries.empty())
    throw CommandError(format("%s holds no decode query within %lld rows after the prompt (--within)",
                              trace.path().c_str(), static_cast<long long>(options.within)));
  std::vector<std::vector<SettingCases>> parts(layers.size());
  std::atomic<size_t> next{0};
  std::mutex mutex;
  std::string error;
  int64_t done = 0;
  Progress progress(trace.info().text, static_cast<int64_t>(layers.size()), "layers");
  const auto work = [&] {
    for (size_t i; (i = next++) < layers.size();) {
      try {
        const eval::TraceLayer layer = trace.layer(layers[i]);
        parts[i] = measure_settings(layer, layers[i], eval::dense_layer(layer, queries), settings);
      } catch (const std::exception& e) {
        const std::lock_guard lock(mutex);
        error = e.what();
        next = layers.size();
      }
      const std::lock_guard lock(mutex);
      progress.update(++done);
    }
  };
  std::vector<std::thread> threads;
  const int32_t count = options.threads > 0 ? options.threads : default_threads();
  for (int32_t t = 1; t < count; ++t) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  if (!error.empty()) throw CommandError(error);
  std::vector<SettingCases> results(settings.size());
  for (const auto& part : parts) {
    for (size_t s = 0; s < settings.size(); ++s) results[s].append(part[s]);
  }
  return results;
}

Json summary_json(const ErrorSummary& s) {
  return {{"tokens_per_kv_head", s.tokens},
          {"tokens_certain", s.tokens_certain},
          {"read_fraction", s.read_fraction},
          {"mean_error", s.mean},
          {"median_error", s.median},
          {"p99_error", s.p99},
          {"max_error", s.max},
          {"max_at", {{"layer", s.max_layer}, {"head", s.max_head}, {"position", s.max_position}}},
          {"worst_head", {{"layer", s.worst_layer}, {"head", s.worst_head}, {"mean_error", s.worst_mean}}},
          {"achieved_mass", s.achieved_mass},
          {"success", s.success},
          {"coverage", s.coverage},
          {"mass_bias", s.mass_bias},
          {"std_error_ratio", s.std_error_ratio},
          {"dense_share", s.dense_share},
          {"cases", s.cases},
          {"sampled_cases", s.sampled_cases}};
}

// For every point of every family, the tokens of each swept family at the same mean error.
void print_equal_error(const std::vector<Family>& families, const std::vector<ErrorSummary>& summaries) {
  std::vector<std::vector<eval::TokensError>> points;
  size_t at = 0;
  for (const Family& family : families) {
    points.emplace_back();
    for (size_t i = 0; i < family.settings.size(); ++i, ++at)
      points.back().push_back({summaries[at].tokens, summaries[at].mean});
  }
  std::vector<std::string> header{"at the error of"};
  std::vector<size_t> columns;
  for (size_t f = 0; f < families.size(); ++f) {
    if (families[f].settings.size() < 2) continue;
    header.push_back(families[f].name);
    columns.push_back(f);
  }
  if (families.size() < 2 || columns.empty()) return;
  Table table(header);
  at = 0;
  for (size_t f = 0; f < families.size(); ++f) {
    for (size_t i = 0; i < families[f].settings.size(); ++i, ++at) {
      std::vector<std::string> row{format("%s: %.0f tokens, %.4f", families[f].settings[i].name.c_str(),
                                          summaries[at].tokens, summaries[at].mean)};
      bool any = false;
      for (const size_t c : columns) {
        const double tokens = c == f ? NAN : eval::tokens_at_error(points[c], summaries[at].mean);
        any = any || std::isfinite(tokens);
        row.push_back(std::isfinite(tokens) ? format("%.0f (%.2f)", tokens, tokens / summaries[at].tokens) : "-");
      }
      if (any) table.add(row);
    }
  }
  std::printf("tokens at equal mean error\n");
  table.print(stdout);
}

void print_worst(const std::string& name, const SettingCases& cases, int64_t count) {
  std::vector<const eval::HeadCase*> order;
  for (const eval::HeadCase& c : cases.heads) order.push_back(&c);
  const auto shown = std::min(order.size(), static_cast<size_t>(count));
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(shown), order.end(),
                    [](const eval::HeadCase* a, const eval::HeadCase* b) { return a->error > b->error; });
  if (shown == 0) return;
  std::printf("worst cases of %s\n", name.c_str());
  Table table({"layer", "head", "position", "error", "mass", "believed", "largest row not read", "its weight"});
  for (size_t i = 0; i < shown; ++i) {
    const eval::HeadCase& c = *order[i];
    table.add({format("%d", c.layer), format("%d", c.head), format("%lld", static_cast<long long>(c.position)),
               format("%.3f", c.error), format("%.3f", c.achieved_mass),
               format("%.3f +- %.3f", c.estimated_mass, c.mass_std_error),
               c.missed_row < 0 ? "-" : format("%lld", static_cast<long long>(c.missed_row)),
               c.missed_row < 0 ? "-" : format("%.3f", c.missed_weight)});
  }
  table.print(stdout);
}

// What success is measured against.
double target_mass(const Setting& setting) {
  if (eval::is_baseline(setting.name)) {
    const eval::BaselineSpec spec = eval::parse_baseline(setting.name);
    if (const auto mass = spec.values.find("mass"); mass != spec.values.end()) return mass->second;
  }
  return setting.decode.target_mass > 0 ? setting.decode.target_mass : 0.9;
}

void report(const std::string& name, const eval::Trace* trace, const EvalTraceOptions& options,
            const std::vector<Family>& families, const std::vector<Setting>& settings,
            const std::vector<SettingCases>& cases, JsonLines& json) {
  Table table({name, "tokens", "read fraction", "mean error", "median", "p99", "max", "at layer/head", "worst mean",
               "layer/head", "mass", "success", "coverage", "bias"});
  std::vector<ErrorSummary> summaries;
  for (size_t s = 0; s < settings.size(); ++s) {
    const ErrorSummary e = summarize(cases[s], target_mass(settings[s]));
    summaries.push_back(e);
    table.add({settings[s].name, format("%.0f", e.tokens), format("%.3f", e.read_fraction), format("%.4f", e.mean),
               format("%.4f", e.median), format("%.3f", e.p99), format("%.2f", e.max),
               format("%d/%d", e.max_layer, e.max_head), format("%.3f", e.worst_mean),
               format("%d/%d", e.worst_layer, e.worst_head), format("%.4f", e.achieved_mass), format("%.3f", e.success),
               e.sampled_cases > 0 ? format("%.3f", e.coverage) : "-",
               e.sampled_cases > 0 ? format("%+.4f", e.mass_bias) : "-"});
    Json line = record_header("eval trace");
    line.update({{"trace", name},
                 {"model", trace != nullptr ? trace->info().model : "several"},
                 {"queries", options.queries},
                 {"within", options.within},
                 {"layers", options.layers},
                 {"setting", settings[s].name},
                 {"target_mass", target_mass(settings[s])}});
    line.update(summary_json(e));
    if (trace != nullptr) line["error_by_layer"] = error_by_layer(cases[s], *trace);
    json.write(line);
  }
  std::printf("\n");
  table.print(stdout);
  print_equal_error(families, summaries);
  for (size_t s = 0; s < settings.size(); ++s) print_worst(settings[s].name, cases[s], options.worst);
  std::fflush(stdout);
}

void eval_trace(const EvalTraceOptions& options) {
  const std::vector<Family> families = parse_families(options.select);
  std::vector<Setting> settings;
  for (const Family& family : families) settings.insert(settings.end(), family.settings.begin(), family.settings.end());
  JsonLines json(options.json, options.traces);
  std::vector<eval::Trace> traces;
  try {
    for (const std::string& path : options.traces) traces.emplace_back(path);
  } catch (const Error& error) {
    throw CommandError(error.what());
  }
  std::vector<SettingCases> all(settings.size());
  for (const eval::Trace& trace : traces) {
    const std::vector<SettingCases> cases = measure(options, trace, settings);
    report(trace.info().text, &trace, options, families, settings, cases, json);
    for (size_t s = 0; s < settings.size(); ++s) all[s].append(cases[s]);
  }
  if (traces.size() > 1) report("all traces", nullptr, options, families, settings, all, json);
  json.finish();
}

}  // namespace

void add_eval_trace(CLI::App& eval) {
  auto options = std::make_shared<EvalTraceOptions>();
  CLI::App* verb = eval.add_subcommand("trace", "Error of attention and tokens read over recorded traces");
  verb->add_option("--traces", options->traces, "files of tactic trace, separated by commas")
      ->required()
      ->delimiter(',')
      ->type_name("FILES");
  verb->add_option("--select", options->select,
                   "settings separated by ';', as the plug-in's options; values may be lists and ranges")
      ->capture_default_str();
  verb->add_option("--layers", options->layers, "of the file, as in 0-29:3; else all");
  verb->add_option("--queries", options->queries, "at most so many of the decode queries; 0: all")
      ->check(CLI::Range(0, 1 << 20));
  verb->add_option("--worst", options->worst, "cases shown per setting")->check(CLI::Range(0, 1000));
  verb->add_option("--within", options->within,
                   "only decode queries at most so many rows after the prompt, which is all that other methods index")
      ->check(CLI::Range(0, 1 << 30));
  verb->add_option("-t,--threads", options->threads, "0: all processors")->check(CLI::Range(0, 512));
  verb->add_option("--json", options->json, "append one JSON object per trace and setting")->type_name("FILE");
  verb->footer(
      "Other methods are settings too, as in 'quest,budget=256|512'; tactic eval kl --help lists them.\n"
      "Values: a|b|c lists, a-bxf multiplies by f, a-b:s adds s.\n"
      "Example:\n  tactic eval trace --traces prose.trace,code.trace --select "
      "'sample,error=0.02-0.08x2;fit,mass=0.9|0.95'\n"
      "Every query is answered sparsely, however short the context (no min_context, no min_sparse).\n"
      "tokens: rows read per KV head, all counted. success: share of cases with at least the setting's mass, 0.9 where "
      "it\n"
      "names none. coverage: share of cases whose own 95% interval holds the true mass.");
  verb->callback([options] { eval_trace(*options); });
}

}  // namespace tactic::tool
