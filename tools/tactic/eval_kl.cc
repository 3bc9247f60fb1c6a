// tactic eval kl: how far each mode's next-token distributions are from those of exact attention.
//
// The same text is decoded token by token from the same prefill, once exactly and once per mode, each in a context of
// its own. The exact logits wait in a file, so that no more than one context and one window are in memory at a time.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <numeric>
#include <optional>
#include <random>

#include "baseline_run.h"
#include "kl.h"
#include "report.h"
#include "text.h"
#include "verbs.h"

namespace tactic::tool {
namespace {

struct EvalOptions {
  HostOptions host;
  std::vector<std::string> texts;
  std::string modes = "stock;sample,error=0.03;fit,mass=0.9;topk,budget=1024", cache_type = "f16", json;
  int64_t records = -1, depth = 4096, steps = 384, windows = 1, stride = 0;
  int32_t threads = 0, worst = 3;
  uint64_t seed = 1;
  bool recall = false;

  int64_t window_tokens() const { return depth + steps + 1; }  // the last one is only predicted
};

struct Source {
  std::string name;
  std::vector<std::vector<llama_token>> windows;
};

// A mode of the plug-in, or another method that answers in its place.
struct EvalMode {
  Mode mode;
  std::optional<eval::BaselineSpec> baseline;
};

std::vector<EvalMode> parse_eval_modes(const std::string& text) {
  std::vector<EvalMode> modes;
  for (const Mode& mode : parse_modes(text)) {
    if (eval::is_baseline(mode.name)) {
      modes.push_back({{mode.name, parse_mode("dense").options}, eval::parse_baseline(mode.name)});
    } else {
      modes.push_back({mode, std::nullopt});
    }
  }
  return modes;
}

struct ModeResult {
  std::vector<TokenComparison> tokens;  // of all windows, one after the other
  tactic_totals totals = {};
  double error_sum = 0;  // of a baseline's mean errors, one a window
};

// The cache after `depth` tokens, and the queries of the last of them if a mode needs them.
struct Prefilled {
  std::vector<uint8_t> state;
  PromptQueries queries;
};

std::vector<llama_token> records_window(const Host& host, const EvalOptions& options, uint64_t seed) {
  const auto wanted = static_cast<size_t>(options.window_tokens()), depth = static_cast<size_t>(options.depth);
  const int64_t count = options.records > 0 ? options.records : options.window_tokens() / 8 + 1;
  std::vector<std::string> lines = make_records(count, seed);
  std::vector<llama_token> tokens;
  // Appends whole lines until there are `enough` tokens; returns how many lines are held by the first `depth` tokens.
  const auto append_lines = [&](size_t enough) {
    size_t held = 0;
    for (size_t i = 0; i < lines.size() && tokens.size() < enough; ++i) {
      const auto more = tokenize(host.vocab(), lines[i], tokens.empty(), false);
      tokens.insert(tokens.end(), more.begin(), more.end());
      if (tokens.size() <= depth) held = i + 1;
    }
    return held;
  };
  const size_t held = append_lines(options.recall ? depth : wanted);
  if (options.recall) {
    lines.resize(held);  // only what the cache holds can be recalled
    std::shuffle(lines.begin(), lines.end(), std::mt19937_64(seed));
    append_lines(wanted);
  }
  if (tokens.size() < wanted) {
    throw CommandError(format("--records: %lld records make %zu tokens, %zu are needed", static_cast<long long>(count),
                              tokens.size(), wanted));
  }
  tokens.resize(wanted);
  return tokens;
}

Source text_source(const Host& host, const EvalOptions& options, const std::string& path) {
  Source source{.name = path.substr(path.rfind('/') + 1), .windows = {}};
  const std::vector<llama_token> text = tokenize(host.vocab(), read_text(path), false, false);
  const bool add_bos = llama_vocab_get_add_bos(host.vocab());
  const int64_t needed = options.window_tokens() - (add_bos ? 1 : 0);
  const int64_t room = static_cast<int64_t>(text.size()) - needed;
  const int64_t stride =
      options.stride > 0 ? options.stride : std::max<int64_t>(room, 0) / std::max<int64_t>(options.windows - 1, 1);
  if (room < 0 || stride * (options.windows - 1) > room) {
    throw CommandError(format("%s has %zu tokens; %lld window(s) of depth %lld and %lld steps need %lld", path.c_str(),
                              text.size(), static_cast<long long>(options.windows),
                              static_cast<long long>(options.depth), static_cast<long long>(options.steps),
                              static_cast<long long>(needed + (options.windows - 1) * std::max<int64_t>(stride, 0))));
  }
  if (options.windows > 1 && stride == 0) {
    throw CommandError(format("%s has %zu tokens: %lld windows would be the same one", path.c_str(), text.size(),
                              static_cast<long long>(options.windows)));
  }
  if (options.windows > 1 && stride < options.steps) {
    std::fprintf(
        stderr,
        "note: %s: windows begin %lld tokens after each other and decode %lld: tokens that several decode make "
        "the intervals too narrow\n",
        path.c_str(), static_cast<long long>(stride), static_cast<long long>(options.steps));
  }
  for (int64_t w = 0; w < options.windows; ++w) {
    std::vector<llama_token> window;
    if (add_bos) window.push_back(llama_vocab_bos(host.vocab()));
    window.insert(window.end(), text.begin() + w * stride, text.begin() + w * stride + needed);
    source.windows.push_back(std::move(window));
  }
  return source;
}

std::vector<Source> make_sources(const Host& host, const EvalOptions& options) {
  std::vector<Source> sources;
  for (const std::string& path : options.texts) sources.push_back(text_source(host, options, path));
  if (options.records >= 0) {
    Source source{.name = options.recall ? "records, recalled" : "records", .windows = {}};
    for (int64_t w = 0; w < options.windows; ++w) {
      source.windows.push_back(records_window(host, options, options.seed + static_cast<uint64_t>(w)));
    }
    sources.push_back(std::move(source));
  }
  return sources;
}

// Decodes the window's last tokens in `mode`, calling take(step, logits).
template <class Take>
tactic_totals decode_window(Host& host, const Mode& mode, HostDecoder* decoder, const SessionOptions& session_options,
                            const EvalOptions& options, const Prefilled& prefilled,
                            const std::vector<llama_token>& window, Progress& progress, int64_t progress_begin,
                            Take take) {
  host.forget_indexes();
  Session session(host, mode, session_options);
  session.restore(prefilled.state, options.depth);
  host.configure(mode);
  host.take_totals();
  for (int64_t i = 0; i < options.steps; ++i) {
    take(i, session.decode(window[static_cast<size_t>(options.depth + i)]));
    if (decoder != nullptr) decoder->rethrow();
    progress.update(progress_begin + i + 1);
  }
  return host.take_totals();
}

// The last `recorded` tokens are decoded one by one, so that their queries are seen.
Prefilled prefill(Host& host, const SessionOptions& session_options, std::span<const llama_token> tokens,
                  size_t recorded, const std::string& label) {
  Prefilled result;
  const auto many = static_cast<int64_t>(tokens.size() - recorded);
  {
    Session session(host, parse_mode("stock"), session_options);
    Progress progress(label, many, "tok");
    session.prefill(tokens.first(static_cast<size_t>(many)), [&](int64_t done) { progress.update(done); });
    result.state = session.save();
  }
  if (recorded == 0) return result;
  QueryRecorder recorder(host);
  host.forget_indexes();
  Session session(host, parse_mode("dense"), session_options);
  session.restore(result.state, many);
  for (const llama_token token : tokens.last(recorded)) session.decode(token);
  recorder.rethrow();
  result.queries = recorder.take();
  result.state = session.save();
  return result;
}

// Calls done(mode, result) when a mode has seen all windows.
template <class Done>
std::vector<ModeResult> evaluate(Host& host, const EvalOptions& options, const std::vector<EvalMode>& modes,
                                 const Source& source, Done done) {
  const SessionOptions session_options = {.kv_len_max = options.depth + options.steps,
                                          .threads = options.threads,
                                          .cache_type = parse_cache_type(options.cache_type)};
  constexpr int64_t kRecorded = 32;  // what the papers of eviction methods observe
  const bool any_baseline =
      std::any_of(modes.begin(), modes.end(), [](const EvalMode& m) { return m.baseline.has_value(); });
  const auto recorded = static_cast<size_t>(any_baseline ? std::min(kRecorded, options.depth - 1) : 0);
  std::vector<ModeResult> results(modes.size());
  LogitStore exact(options.steps, host.vocab_size());
  for (size_t w = 0; w < source.windows.size(); ++w) {
    const std::vector<llama_token>& window = source.windows[w];
    const std::string label = format("%s %zu/%zu", source.name.c_str(), w + 1, source.windows.size());
    const Prefilled prefilled = prefill(host, session_options, {window.data(), static_cast<size_t>(options.depth)},
                                        recorded, label + " prefill");
    Progress progress(label, static_cast<int64_t>(modes.size() + 1) * options.steps, "tok");
    const tactic_totals totals =
        decode_window(host, parse_mode("dense"), nullptr, session_options, options, prefilled, window, progress, 0,
                      [&](int64_t i, const float* logits) { exact.set(i, logits); });
    require_exact(totals, session_options.cache_type);
    for (size_t m = 0; m < modes.size(); ++m) {
      const auto begin = static_cast<int64_t>(m + 1) * options.steps;
      const auto compare = [&](int64_t i, const float* logits) {
        const llama_token next = window[static_cast<size_t>(options.depth + i + 1)];
        results[m].tokens.push_back(compare_logits(exact.row(i), logits, host.vocab_size(), next));
      };
      std::optional<BaselineDecoder> decoder;
      if (modes[m].baseline) decoder.emplace(host, *modes[m].baseline, prefilled.queries, options.depth, options.seed);
      const tactic_totals read = decode_window(host, modes[m].mode, decoder ? &*decoder : nullptr, session_options,
                                               options, prefilled, window, progress, begin, compare);
      add_totals(results[m].totals, decoder ? decoder->totals() : read);  // of a baseline: layers that it answers for
      if (decoder) results[m].error_sum += decoder->mean_error();
      if (w + 1 == source.windows.size()) done(modes[m], results[m]);
    }
  }
  return results;
}

struct Summary {
  double mean_kl, median_kl, p99_kl, max_kl;
  std::optional<Interval> mean_interval;
  double same_top;
  Interval same_top_interval;
  double perplexity, exact_perplexity;
};

Summary summarize(const std::vector<TokenComparison>& tokens, int64_t steps) {
  std::vector<double> kl, nll, exact_nll, same;
  for (const TokenComparison& t : tokens) {
    kl.push_back(t.kl);
    nll.push_back(t.nll);
    exact_nll.push_back(t.exact_nll);
    same.push_back(t.top == t.exact_top ? 1 : 0);
  }
  return {.mean_kl = mean(kl),
          .median_kl = median(kl),
          .p99_kl = quantile(kl, 0.99),
          .max_kl = *std::max_element(kl.begin(), kl.end()),
          .mean_interval = bootstrap_mean(kl, static_cast<size_t>(steps), 16),
          .same_top = mean(same),
          .same_top_interval = wilson_of_series(same, static_cast<size_t>(steps), 16),
          .perplexity = std::exp(mean(nll)),
          .exact_perplexity = std::exp(mean(exact_nll))};
}

void print_worst(const Host& host, const EvalOptions& options, const Source& source, const Mode& mode,
                 const std::vector<TokenComparison>& tokens) {
  std::vector<size_t> order(tokens.size());
  std::iota(order.begin(), order.end(), size_t{0});
  const size_t shown = std::min(order.size(), static_cast<size_t>(options.worst));
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(shown), order.end(),
                    [&](size_t a, size_t b) { return tokens[a].kl > tokens[b].kl; });
  const auto quoted = [&](llama_token token) {
    return "'" + escape_controls(token_piece(host.vocab(), token, true)) + "'";
  };
  for (size_t k = 0; k < shown && tokens[order[k]].kl > 0; ++k) {
    const size_t i = order[k];
    const auto steps = static_cast<size_t>(options.steps);
    const auto& window = source.windows[i / steps];
    const size_t at = static_cast<size_t>(options.depth) + i % steps;  // the token just decoded
    std::string before;
    for (size_t j = at < 7 ? 0 : at - 7; j <= at; ++j) before += token_piece(host.vocab(), window[j], true);
    repair_utf8(before, nullptr);
    std::printf("  %s: KL %.4f at token %zu after \"%s\": exact %s, here %s, the text %s\n", mode.name.c_str(),
                tokens[i].kl, at, escape_controls(before).c_str(), quoted(tokens[i].exact_top).c_str(),
                quoted(tokens[i].top).c_str(), quoted(window[at + 1]).c_str());
  }
}

double mean_kv_len(const EvalOptions& options) {
  return static_cast<double>(options.depth) + static_cast<double>(options.steps + 1) / 2;
}

Json mode_json(const Host& host, const EvalOptions& options, const EvalMode& mode, const Source& source,
               const ModeResult& result) {
  const Summary s = summarize(result.tokens, options.steps);
  const ReadFigures read(result.totals, mean_kv_len(options));
  Json line = record_header(host, "eval kl");
  line.update({{"text", source.name},
               {"mode", mode.mode.name},
               {"options", mode.mode.options},
               {"depth", options.depth},
               {"steps", options.steps},
               {"windows", options.windows},
               {"seed", options.seed},
               {"cache_type", options.cache_type},
               {"mean_kl", s.mean_kl},
               {"median_kl", s.median_kl},
               {"p99_kl", s.p99_kl},
               {"max_kl", s.max_kl},
               {"same_top", s.same_top},
               {"same_top_95", {s.same_top_interval.low, s.same_top_interval.high}},
               {"perplexity", s.perplexity},
               {"exact_perplexity", s.exact_perplexity},
               {"tokens_per_kv_head", read.tokens_per_kv_head},
               {"read_fraction", read.read_fraction},
               {"mass_std_error", read.mass_std_error},
               {"dense_share", read.dense_share},
               {"taken", read.taken},
               {"totals", totals_json(result.totals)}});
  if (s.mean_interval) line["mean_kl_95"] = {s.mean_interval->low, s.mean_interval->high};
  if (mode.baseline) line["attention_error"] = result.error_sum / static_cast<double>(options.windows);
  return line;
}

void report(const Host& host, const EvalOptions& options, const std::vector<EvalMode>& modes, const Source& source,
            const std::vector<ModeResult>& results) {
  Table table({"mode", "mean KL", "95% interval", "median", "p99", "max", "same top", "95% interval", "perplexity",
               "tokens/KV head", "read fraction", "dense"});
  double exact_perplexity = 0;
  for (size_t m = 0; m < modes.size(); ++m) {
    const Summary s = summarize(results[m].tokens, options.steps);
    const ReadFigures read(results[m].totals, mean_kv_len(options));
    exact_perplexity = s.exact_perplexity;
    table.add({modes[m].mode.name, format("%.5f", s.mean_kl),
               s.mean_interval ? format("%.5f-%.5f", s.mean_interval->low, s.mean_interval->high) : "-",
               format("%.5f", s.median_kl), format("%.4f", s.p99_kl), format("%.4f", s.max_kl),
               format("%.1f%%", 100 * s.same_top),
               format("%.1f-%.1f%%", 100 * s.same_top_interval.low, 100 * s.same_top_interval.high),
               format("%.4f", s.perplexity), format("%.0f", read.tokens_per_kv_head),
               format("%.3f", read.read_fraction),
               read.taken ? format("%.1f%%", 100 * read.dense_share) : "llama.cpp"});
  }
  std::printf("\n%s: %lld tokens after %lld, %lld window(s), cache %s; exact perplexity %.4f\n", source.name.c_str(),
              static_cast<long long>(options.steps), static_cast<long long>(options.depth),
              static_cast<long long>(options.windows), options.cache_type.c_str(), exact_perplexity);
  table.print(stdout);
  if (options.worst > 0) std::printf("worst positions:\n");
  for (size_t m = 0; m < modes.size(); ++m) print_worst(host, options, source, modes[m].mode, results[m].tokens);
  std::fflush(stdout);
}

void eval_kl(const EvalOptions& options) {
  const std::vector<EvalMode> modes = parse_eval_modes(options.modes);
  parse_cache_type(options.cache_type);
  if (options.texts.empty() && options.records < 0) throw CommandError("nothing to evaluate; give --text or --records");
  if (options.recall && options.records < 0) throw CommandError("--recall goes with --records");
  JsonLines json(options.json, options.texts);
  std::vector<Mode> all_modes = {parse_mode("dense")};
  for (const EvalMode& mode : modes) all_modes.push_back(mode.mode);
  Host host(options.host, all_modes);
  if (options.depth + options.steps > host.context_tokens()) {
    std::fprintf(stderr, "tactic: note: %lld tokens are beyond the model's context of %lld\n",
                 static_cast<long long>(options.depth + options.steps), static_cast<long long>(host.context_tokens()));
  }
  // All texts are read before the first minutes are spent.
  const std::vector<Source> sources = make_sources(host, options);
  for (const Source& source : sources) {
    // A mode's row is written when it is done: a run that is cut short keeps what it has.
    const auto write = [&](const EvalMode& mode, const ModeResult& result) {
      json.write(mode_json(host, options, mode, source, result));
    };
    report(host, options, modes, source, evaluate(host, options, modes, source, write));
  }
  json.finish();
}

}  // namespace

void add_eval(CLI::App& app) {
  auto options = std::make_shared<EvalOptions>();
  CLI::App* eval = app.add_subcommand("eval", "Measure the error of modes");
  eval->require_subcommand(1);
  add_eval_tasks(*eval);
  CLI::App* verb = eval->add_subcommand("kl", "KL of next-token distributions against exact attention, token by token");
  add_host_options(*verb, options->host);
  verb->add_option("--text", options->texts, "text to decode; may be repeated")->type_name("FILE")->take_all();
  verb->add_option("--records", options->records, "decode generated records, this many; 0: as many as are needed")
      ->check(CLI::Range(0, 1 << 24));
  verb->add_flag("--recall", options->recall, "the decoded records repeat earlier ones, in random order");
  verb->add_option("-d,--depth", options->depth, "tokens of prefill")
      ->check(CLI::Range(2, 1 << 28))
      ->capture_default_str();
  verb->add_option("-n,--tokens", options->steps, "tokens decoded per window")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  verb->add_option("--windows", options->windows, "places of the text, or seeds of the records")
      ->check(CLI::Range(1, 10000))
      ->capture_default_str();
  verb->add_option("--stride", options->stride, "tokens from window to window; 0: spread over the text")
      ->check(CLI::Range(0, 1 << 28));
  verb->add_option("--modes", options->modes, "modes separated by ';'")->capture_default_str();
  verb->add_option("--cache-type", options->cache_type, "f32, f16, bf16, q8_0, q4_0 ...")->capture_default_str();
  verb->add_option("-t,--threads", options->threads, "0: all processors")->check(CLI::Range(0, 512));
  verb->add_option("--seed", options->seed, "of the records")->capture_default_str();
  verb->add_option("--worst", options->worst, "positions shown per mode")
      ->check(CLI::Range(0, 1000))
      ->capture_default_str();
  verb->add_option("--json", options->json, "append one JSON object per text and mode")->type_name("FILE");
  std::string methods;
  for (const std::string& line : eval::baseline_help()) methods += "\n  " + line;
  verb->footer(
      "Other methods as modes, with their defaults:" + methods +
      "\n"
      "Example:\n  tactic eval kl -m model.gguf --text book.txt --records 0 -d 6144 -n 384 --modes "
      "'stock;sample,error=0.03'\n"
      "Exact: attention over the whole stored cache, summed in f32. Intervals: over blocks of 16 tokens (eight "
      "at least), bootstrap; of rates Wilson's, as wide as the blocks scatter.");
  verb->callback([options] { eval_kl(*options); });
  add_eval_paper(*eval);
  add_eval_trace(*eval);
}

}  // namespace tactic::tool
