// tactic inspect: decode some steps and draw what every layer and head read.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>

#include "inspect_page.h"
#include "part_file.h"
#include "report.h"
#include "text.h"
#include "verbs.h"

namespace tactic::tool {
namespace {

struct InspectOptions {
  HostOptions host;
  std::string file, mode = "default", cache_type = "f16", output = "report.html", json;
  int64_t depth = 4096, steps = 32;
  int32_t threads = 0;
};

// Gathers what the plug-in says after each step, layer by layer.
class Collector {
 public:
  void add(const std::string& text) {
    const Json report = Json::parse(text, nullptr, false);
    if (report.is_discarded() || !report.contains("layers")) {
      throw CommandError("the plug-in's report is not understood: " + text.substr(0, 80));
    }
    for (const Json& layer : report["layers"]) {
      const int64_t number = layer.value("layer", int64_t{0}), stream = layer.value("stream", int64_t{0});
      LayerFigures& figures = layers_[{number, stream}];
      figures.layer = number;
      figures.stream = stream;
      figures.kv_len = layer.value("kv_len", int64_t{0});
      const Json& heads = layer.at("heads");
      figures.heads.resize(heads.size());
      for (size_t h = 0; h < heads.size(); ++h) add_head(heads[h], figures.heads[h]);
    }
  }

  std::vector<LayerFigures> layers() const {
    std::vector<LayerFigures> layers;
    for (const auto& [key, layer] : layers_) layers.push_back(layer);
    return layers;
  }

 private:
  static void add_head(const Json& head, HeadFigures& figures) {
    const auto value = [&](const char* name) {
      const auto found = head.find(name);
      return found != head.end() && found->is_number() ? found->get<double>()
                                                       : std::numeric_limits<double>::quiet_NaN();
    };
    if (!(value("tokens") > 0)) return;  // the step was dense
    const double share = 1.0 / static_cast<double>(++figures.steps);
    const auto update_mean = [&](double& mean_value, const char* name) {
      mean_value += (value(name) - mean_value) * share;
    };
    figures.clusters = value("clusters");
    figures.mean_spread = value("mean_spread");
    figures.beta = value("beta");
    figures.tau = value("tau");
    update_mean(figures.tokens, "tokens");
    update_mean(figures.exact_tokens, "exact_tokens");
    update_mean(figures.exact_mass, "exact_mass");
    update_mean(figures.estimated_mass, "estimated_mass");
    const double mass = value("estimated_mass");
    figures.least_mass = figures.steps == 1 ? mass : std::min(figures.least_mass, mass);
  }

  std::map<std::pair<int64_t, int64_t>, LayerFigures> layers_;
};

void inspect(const InspectOptions& options) {
  Mode mode = parse_mode(options.mode);
  if (mode.is_stock()) throw CommandError("inspect shows the plug-in's work; 'stock' has none");
  if (mode.is_dense()) throw CommandError("inspect shows which rows are chosen; '" + mode.name + "' reads all");
  const int32_t min_sparse = min_sparse_of(mode);
  if (options.depth + options.steps < min_sparse) {
    throw CommandError(format("depth %lld and %lld steps are below min_sparse (%d), where everything is read",
                              static_cast<long long>(options.depth), static_cast<long long>(options.steps),
                              min_sparse));
  }
  mode.options += mode.options.empty() ? "inspect=1" : ",inspect=1";
  const ggml_type cache_type = parse_cache_type(options.cache_type);
  check_writable(options.output, true);
  check_apart(options.output, {options.file, options.host.model_path});
  JsonLines json(options.json, {options.file});
  if (json.is_wanted() &&
      std::filesystem::weakly_canonical(options.output) == std::filesystem::weakly_canonical(options.json))
    throw CommandError("-o and --json name one file, " + options.json);
  Host host(options.host, {mode});

  if (options.depth + options.steps > host.context_tokens()) {
    std::fprintf(stderr, "tactic: note: %lld tokens are beyond the model's context of %lld\n",
                 static_cast<long long>(options.depth + options.steps), static_cast<long long>(host.context_tokens()));
  }
  std::vector<llama_token> tokens = tokenize(host.vocab(), read_text(options.file), true, false);
  if (static_cast<int64_t>(tokens.size()) < options.depth + options.steps) {
    throw CommandError(format("%s has %zu tokens; depth %lld and %lld steps need %lld", options.file.c_str(),
                              tokens.size(), static_cast<long long>(options.depth),
                              static_cast<long long>(options.steps),
                              static_cast<long long>(options.depth + options.steps)));
  }
  Session session(host, mode,
                  {.kv_len_max = options.depth + options.steps, .threads = options.threads, .cache_type = cache_type});
  {
    Progress progress("prefill", options.depth, "tok");
    session.prefill({tokens.data(), static_cast<size_t>(options.depth)}, [&](int64_t done) { progress.update(done); });
  }
  InspectPage page;
  Collector collector;
  host.take_totals();
  {
    Progress progress("decode", options.steps, "tok");
    for (int64_t i = 0; i < options.steps; ++i) {
      const auto begin = std::chrono::steady_clock::now();
      session.decode(tokens[static_cast<size_t>(options.depth + i)]);
      const double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
      const ReadFigures read(host.take_totals(), static_cast<double>(session.kv_len()));
      if (!read.taken)
        throw CommandError(
            "the plug-in took no attention node: the model's attention or the cache type is left to llama.cpp");
      page.steps.push_back({session.kv_len(), read.tokens_per_kv_head, read.read_fraction, read.dense_share, ms});
      const std::string report = host.inspect();
      collector.add(report);
      if (json.is_wanted()) {
        Json line = record_header(host, "inspect");
        line.update({{"mode", mode.name},
                     {"options", mode.options},
                     {"kv_len", session.kv_len()},
                     {"read_fraction", read.read_fraction}});
        line["report"] = Json::parse(report);
        json.write(line);
      }
      progress.update(i + 1);
    }
  }
  page.layers = collector.layers();
  if (page.layers.empty()) throw CommandError("the plug-in has no indexed layer; the context may be too short");

  const Json header = record_header(host, "inspect");
  page.title = "Tactic: what attention read";
  page.facts = {
      {"model", header["model"].get<std::string>() + " (" + header["model_description"].get<std::string>() + ")"},
      {"mode", mode.name},
      {"text", options.file.substr(options.file.rfind('/') + 1)},
      {"cache", format("%lld tokens of prefill, %lld steps, %s", static_cast<long long>(options.depth),
                       static_cast<long long>(options.steps), options.cache_type.c_str())},
      {"date", header["date"].get<std::string>()},
      {"sources", header["commit"].get<std::string>()}};
  eval::replace_file(options.output, render_page(page));
  std::printf("%s: %zu layers, %lld steps\n", options.output.c_str(), page.layers.size(),
              static_cast<long long>(options.steps));
  json.finish();
}

}  // namespace

void add_inspect(CLI::App& app) {
  auto options = std::make_shared<InspectOptions>();
  CLI::App* verb = app.add_subcommand("inspect", "Draw what every layer and head read");
  add_host_options(*verb, options->host);
  verb->add_option("--file", options->file, "text to decode")->required()->type_name("FILE");
  verb->add_option("-d,--depth", options->depth, "tokens of prefill")
      ->check(CLI::Range(1, 1 << 28))
      ->capture_default_str();
  verb->add_option("-n,--tokens", options->steps, "steps to decode")
      ->check(CLI::Range(1, 1 << 16))
      ->capture_default_str();
  verb->add_option("--tactic", options->mode,
                   "mode, as in 'sample,error=0.03'; default: what TACTIC says, else the plug-in's own")
      ->envname("TACTIC")
      ->type_name("MODE");
  verb->add_option("--cache-type", options->cache_type, "f32, f16, bf16, q8_0, q4_0 ...")->capture_default_str();
  verb->add_option("-t,--threads", options->threads, "0: all processors")->check(CLI::Range(0, 512));
  verb->add_option("-o,--output", options->output, "the page")->capture_default_str()->type_name("FILE");
  verb->add_option("--json", options->json, "append the plug-in's report of each step")->type_name("FILE");
  verb->footer(
      "Example:\n  tactic inspect -m model.gguf --file book.txt -d 6000 -n 32 --tactic sample,error=0.03 -o "
      "report.html");
  verb->callback([options] { inspect(*options); });
}

}  // namespace tactic::tool
