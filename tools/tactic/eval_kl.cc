// tactic eval kl: how far each mode's next-token distributions are from those of exact attention.
//
// The same text is decoded token by token from the same prefill, once exactly and once per mode, each in a context of
// its own. The exact logits wait in a file, so that no more than one context and one window are in memory at a time.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>

#include "kl.h"
#include "report.h"
#include "text.h"
#include "verbs.h"

namespace tactic::tool {
namespace {

struct EvalOptions {
  HostOptions host;
  std::vector<std::string> texts;
  std::string modes = "stock;sample,error=0.02;fit,mass=0.9;topk,budget=1024", cache_type = "f16", json;
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

struct ModeResult {
  std::vector<TokenComparison> tokens;  // of all windows, one after the other
  tactic_totals totals = {};
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
tactic_totals decode_window(Host& host, const Mode& mode, const SessionOptions& session_options,
                            const EvalOptions& options, std::span<const uint8_t> state,
                            const std::vector<llama_token>& window, Progress& progress, int64_t progress_begin,
                            Take take) {
  host.forget_indexes();
  Session session(host, mode, session_options);
  session.restore(state, options.depth);
  host.configure(mode);
  host.take_totals();
  for (int64_t i = 0; i < options.steps; ++i) {
    take(i, session.decode(window[static_cast<size_t>(options.depth + i)]));
    progress.update(progress_begin + i + 1);
  }
  return host.take_totals();
}

std::vector<uint8_t> prefill_state(Host& host, const SessionOptions& session_options,
                                   std::span<const llama_token> tokens, const std::string& label) {
  Session session(host, parse_mode("stock"), session_options);
  Progress progress(label, static_cast<int64_t>(tokens.size()), "tok");
  session.prefill(tokens, [&](int64_t done) { progress.update(done); });
  return session.save();
}

std::vector<ModeResult> evaluate(Host& host, const EvalOptions& options, const std::vector<Mode>& modes,
                                 const Source& source) {
  const SessionOptions session_options = {.kv_len_max = options.depth + options.steps,
                                          .threads = options.threads,
                                          .cache_type = parse_cache_type(options.cache_type)};
  std::vector<ModeResult> results(modes.size());
  LogitStore exact(options.steps, host.vocab_size());
  for (size_t w = 0; w < source.windows.size(); ++w) {
    const std::vector<llama_token>& window = source.windows[w];
    const std::string label = format("%s %zu/%zu", source.name.c_str(), w + 1, source.windows.size());
    const auto state =
        prefill_state(host, session_options, {window.data(), static_cast<size_t>(options.depth)}, label + " prefill");
    Progress progress(label, static_cast<int64_t>(modes.size() + 1) * options.steps, "tok");
    const tactic_totals totals =
        decode_window(host, parse_mode("dense"), session_options, options, state, window, progress, 0,
                      [&](int64_t i, const float* logits) { exact.set(i, logits); });
    require_exact(totals, session_options.cache_type);
    for (size_t m = 0; m < modes.size(); ++m) {
      const auto begin = static_cast<int64_t>(m + 1) * options.steps;
      const auto compare = [&](int64_t i, const float* logits) {
        const llama_token next = window[static_cast<size_t>(options.depth + i + 1)];
        results[m].tokens.push_back(compare_logits(exact.row(i), logits, host.vocab_size(), next));
      };
      add_totals(results[m].totals,
                 decode_window(host, modes[m], session_options, options, state, window, progress, begin, compare));
    }
  }
  return results;
}

struct Summary {
  double mean_kl, median_kl, p99_kl, max_kl;
  Interval mean_interval;
  double same_top;
  Interval same_top_interval;
  double perplexity, exact_perplexity;
};

Summary summarize(const std::vector<TokenComparison>& tokens, int64_t steps) {
  std::vector<double> kl, nll, exact_nll;
  int64_t same = 0;
  for (const TokenComparison& t : tokens) {
    kl.push_back(t.kl);
    nll.push_back(t.nll);
    exact_nll.push_back(t.exact_nll);
    same += t.top == t.exact_top ? 1 : 0;
  }
  const auto count = static_cast<int64_t>(tokens.size());
  return {.mean_kl = mean(kl),
          .median_kl = median(kl),
          .p99_kl = quantile(kl, 0.99),
          .max_kl = *std::max_element(kl.begin(), kl.end()),
          .mean_interval = bootstrap_mean(kl, static_cast<size_t>(steps), 16),
          .same_top = static_cast<double>(same) / static_cast<double>(count),
          .same_top_interval = wilson(same, count),
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

void report(const Host& host, const EvalOptions& options, const std::vector<Mode>& modes, const Source& source,
            const std::vector<ModeResult>& results, JsonLines& json) {
  Table table({"mode", "mean KL", "95% interval", "median", "p99", "max", "same top", "95% interval", "perplexity",
               "tokens/KV head", "read fraction", "dense"});
  const double kv_len = static_cast<double>(options.depth) + static_cast<double>(options.steps + 1) / 2;
  double exact_perplexity = 0;
  for (size_t m = 0; m < modes.size(); ++m) {
    const Summary s = summarize(results[m].tokens, options.steps);
    const ReadFigures read(results[m].totals, kv_len);
    exact_perplexity = s.exact_perplexity;
    table.add({modes[m].name, format("%.5f", s.mean_kl), format("%.5f-%.5f", s.mean_interval.low, s.mean_interval.high),
               format("%.5f", s.median_kl), format("%.4f", s.p99_kl), format("%.4f", s.max_kl),
               format("%.1f%%", 100 * s.same_top),
               format("%.1f-%.1f%%", 100 * s.same_top_interval.low, 100 * s.same_top_interval.high),
               format("%.4f", s.perplexity), format("%.0f", read.tokens_per_kv_head),
               format("%.3f", read.read_fraction),
               read.taken ? format("%.1f%%", 100 * read.dense_share) : "llama.cpp"});
    Json line = record_header(host, "eval kl");
    line.update({{"text", source.name},
                 {"mode", modes[m].name},
                 {"options", modes[m].options},
                 {"depth", options.depth},
                 {"steps", options.steps},
                 {"windows", options.windows},
                 {"seed", options.seed},
                 {"cache_type", options.cache_type},
                 {"mean_kl", s.mean_kl},
                 {"mean_kl_95", {s.mean_interval.low, s.mean_interval.high}},
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
                 {"totals", totals_json(results[m].totals)}});
    json.write(line);
  }
  std::printf("\n%s: %lld tokens after %lld, %lld window(s), cache %s; exact perplexity %.4f\n", source.name.c_str(),
              static_cast<long long>(options.steps), static_cast<long long>(options.depth),
              static_cast<long long>(options.windows), options.cache_type.c_str(), exact_perplexity);
  table.print(stdout);
  if (options.worst > 0) std::printf("worst positions:\n");
  for (size_t m = 0; m < modes.size(); ++m) print_worst(host, options, source, modes[m], results[m].tokens);
  std::fflush(stdout);
}

void eval_kl(const EvalOptions& options) {
  const std::vector<Mode> modes = parse_modes(options.modes);
  parse_cache_type(options.cache_type);
  if (options.texts.empty() && options.records < 0) throw CommandError("nothing to evaluate; give --text or --records");
  if (options.recall && options.records < 0) throw CommandError("--recall goes with --records");
  JsonLines json(options.json);
  std::vector<Mode> all_modes = modes;
  all_modes.push_back(parse_mode("dense"));
  Host host(options.host, all_modes);
  if (options.depth + options.steps > llama_model_n_ctx_train(host.model())) {
    std::fprintf(stderr, "tactic: note: %lld tokens are beyond the model's training context of %d\n",
                 static_cast<long long>(options.depth + options.steps), llama_model_n_ctx_train(host.model()));
  }
  // All texts are read before the first minutes are spent.
  const std::vector<Source> sources = make_sources(host, options);
  for (const Source& source : sources)
    report(host, options, modes, source, evaluate(host, options, modes, source), json);
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
  verb->footer(
      "Example:\n  tactic eval kl -m model.gguf --text book.txt --records 0 -d 6144 -n 384 --modes "
      "'stock;sample,error=0.02'\n"
      "Exact: attention over the whole stored cache, summed in f32. Intervals: bootstrap over blocks of 16 tokens; "
      "Wilson.");
  verb->callback([options] { eval_kl(*options); });
}

}  // namespace tactic::tool
