// tactic bench: decode speed at depths, the modes taking turns in one process, always with error and read fraction.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <numeric>
#include <optional>

#include "kl.h"
#include "report.h"
#include "text.h"
#include "verbs.h"

namespace tactic::tool {
namespace {

struct BenchOptions {
  HostOptions host;
  std::string depths = "0,4000,8000", threads = "0", modes = "stock;dense;sample,error=0.03", file, json;
  std::vector<std::string> cache_types = {"f16"};
  int64_t steps = 32, warmup = 4;
  int32_t rounds = 5;
  bool kl = false, watch_prefill = false;

  // A turn begins with a step that is not timed: after another mode's options the plug-in may have to build its index
  // anew.
  int64_t turn_begin(int32_t round) const { return warmup + (steps + 1) * round; }
  int64_t decoded() const { return turn_begin(rounds); }
};

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

// What a mode did at one depth.
struct ModeRun {
  std::unique_ptr<Session> session;
  std::vector<double> round_rates;  // tok/s
  std::vector<double> step_seconds;
  std::vector<double> kl;
  int64_t same_top = 0;
  double warmup_seconds = 0;
  tactic_totals warmup_totals = {};  // building the index of a restored cache falls into the warm-up
  tactic_totals totals = {};
};

// A prefill that grows from depth to depth, so that every token is computed once.
struct Prefill {
  std::unique_ptr<Session> session;
  double seconds = 0;
  tactic_totals totals = {};

  void advance(Host& host, const std::vector<llama_token>& tokens, int64_t depth, const std::string& label) {
    const int64_t begin = session->kv_len();
    host.configure(session->mode());
    host.take_totals();
    Progress progress(label, depth - begin, "tok");
    session->prefill({tokens.data() + begin, static_cast<size_t>(depth - begin)},
                     [&](int64_t done) { progress.update(done); });
    seconds += progress.seconds();
    add_totals(totals, host.take_totals());
  }
};

std::vector<llama_token> bench_tokens(const Host& host, const BenchOptions& options, int64_t count) {
  std::vector<llama_token> tokens;
  const auto wanted = static_cast<size_t>(count);
  if (options.file.empty()) {
    // The generated words are common ones, nearly one token each.
    for (size_t bytes = wanted * 6 + 256; tokens.size() < wanted; bytes *= 2) {
      tokens = tokenize(host.vocab(), make_prose(bytes, 1), true, false);
    }
  } else {
    tokens = tokenize(host.vocab(), read_text(options.file), true, false);
    if (tokens.empty()) throw CommandError(options.file + " has no text");
    if (tokens.size() < wanted) {
      std::fprintf(stderr, "tactic: note: %s has %zu tokens; it is repeated to make %zu\n", options.file.c_str(),
                   tokens.size(), wanted);
      for (size_t i = 0; tokens.size() < wanted; ++i) tokens.push_back(tokens[i]);
    }
  }
  tokens.resize(wanted);
  return tokens;
}

// One turn of a mode: `begin_step` is its first step, counted from the start of the warm-up.
void decode_turn(ModeRun& run, Host& host, std::span<const llama_token> tokens, int64_t begin_step, int64_t count,
                 LogitStore* exact) {
  run.session->decode(tokens[static_cast<size_t>(begin_step)]);
  host.take_totals();
  double seconds = 0;
  for (int64_t i = begin_step + 1; i <= begin_step + count; ++i) {
    const auto begin = Clock::now();
    const float* logits = run.session->decode(tokens[static_cast<size_t>(i)]);
    const double step = seconds_since(begin);
    seconds += step;
    run.step_seconds.push_back(step);
    if (exact == nullptr) continue;
    const TokenComparison c =
        compare_logits(exact->row(i), logits, host.vocab_size(), 0);  // the text's next token is not asked for
    run.kl.push_back(c.kl);
    run.same_top += c.top == c.exact_top ? 1 : 0;
  }
  run.round_rates.push_back(static_cast<double>(count) / seconds);
  add_totals(run.totals, host.take_totals());
}

void warm_up(Session& session, std::span<const llama_token> tokens) {
  if (session.kv_len() == 0) {
    // The plug-in declines a cache that holds nothing yet, and llama.cpp would reuse that graph for the next tokens.
    // Two tokens at once have another graph.
    session.prefill(tokens.first(2));
    tokens = tokens.subspan(2);
  }
  for (const llama_token token : tokens) session.decode(token);
}

// `tokens`: those decoded at this depth. Starts from `state`; nothing is left behind for the next call.
std::vector<ModeRun> measure(Host& host, const BenchOptions& options, const std::vector<Mode>& modes,
                             std::span<const llama_token> tokens, std::span<const uint8_t> state, int64_t depth,
                             const SessionOptions& session_options, LogitStore* exact) {
  std::vector<ModeRun> runs(modes.size());
  Progress progress(format("decode at %lld, %d threads", static_cast<long long>(depth), session_options.threads),
                    static_cast<int64_t>(modes.size()) * options.decoded(), "tok");
  int64_t done = 0;
  const auto report = [&](int64_t steps) { progress.update(done += steps); };
  host.forget_indexes();
  for (size_t m = 0; m < modes.size(); ++m) {
    runs[m].session = std::make_unique<Session>(host, modes[m], session_options);
    if (depth > 0) runs[m].session->restore(state, depth);
  }
  for (size_t m = 0; m < modes.size(); ++m) {
    ModeRun& run = runs[m];
    host.configure(modes[m]);
    host.take_totals();
    const auto begin = Clock::now();
    warm_up(*run.session, tokens.first(static_cast<size_t>(options.warmup)));
    run.warmup_seconds = seconds_since(begin);
    run.warmup_totals = host.take_totals();
    report(options.warmup);
  }
  for (int32_t round = 0; round < options.rounds; ++round) {
    for (size_t turn = 0; turn < modes.size(); ++turn) {
      ModeRun& run = runs[(turn + static_cast<size_t>(round)) % modes.size()];  // nobody is always first
      decode_turn(run, host, tokens, options.turn_begin(round), options.steps, exact);
      report(options.steps + 1);
    }
  }
  return runs;
}

std::vector<double> paired_ratios(const ModeRun& run, const ModeRun& stock) {
  std::vector<double> ratios;
  for (size_t r = 0; r < run.round_rates.size(); ++r) ratios.push_back(run.round_rates[r] / stock.round_rates[r]);
  return ratios;
}

struct Place {
  int64_t depth = 0;
  int32_t threads = 0;
  std::string cache_type;
  double prefill_seconds = 0;
};

void report(const Host& host, const BenchOptions& options, const Place& place, const std::vector<Mode>& modes,
            const std::vector<ModeRun>& runs, JsonLines& json) {
  const ModeRun* stock = nullptr;
  for (size_t m = 0; m < modes.size(); ++m) {
    if (modes[m].is_stock()) stock = &runs[m];
  }
  std::vector<std::string> header = {"mode",           "tok/s",        "min-max", "vs stock",   "read fraction",
                                     "tokens/KV head", "longest step", "dense",   "index build"};
  if (options.kl) header.insert(header.end(), {"mean KL", "same top"});
  Table table(header);
  for (size_t m = 0; m < modes.size(); ++m) {
    const ModeRun& run = runs[m];
    // Mean over the timed steps, each counting its own token.
    const double kv_len = static_cast<double>(place.depth + options.warmup + 1) +
                          static_cast<double>((options.steps + 1) * options.rounds) / 2;
    const ReadFigures read(run.totals, kv_len);
    const auto [low, high] = std::minmax_element(run.round_rates.begin(), run.round_rates.end());
    const double stall = *std::max_element(run.step_seconds.begin(), run.step_seconds.end()) / median(run.step_seconds);
    const double ratio = stock != nullptr ? median(paired_ratios(run, *stock)) : 0.0;
    const double build = 1e-9 * static_cast<double>(run.warmup_totals.cluster_ns);
    const double build_share = place.depth > 0 ? build / place.prefill_seconds : 0.0;
    std::vector<std::string> row = {modes[m].name,
                                    format("%.2f", median(run.round_rates)),
                                    format("%.2f-%.2f", *low, *high),
                                    stock != nullptr ? format("%.2f", ratio) : "-",
                                    format("%.3f", read.read_fraction),
                                    format("%.0f", read.tokens_per_kv_head),
                                    format("%.1fx", stall),
                                    read.taken ? format("%.1f%%", 100 * read.dense_share) : "llama.cpp",
                                    build <= 0         ? "-"
                                    : place.depth == 0 ? format("%.2f s", build)
                                                       : format("%.2f s, %.1f%%", build, 100 * build_share)};
    const double same_top =
        run.kl.empty() ? 0.0 : static_cast<double>(run.same_top) / static_cast<double>(run.kl.size());
    if (options.kl) row.insert(row.end(), {format("%.5f", mean(run.kl)), format("%.1f%%", 100 * same_top)});
    table.add(row);

    Json line = record_header(host, "bench");
    line.update({{"text", options.file.empty() ? "generated" : options.file.substr(options.file.rfind('/') + 1)},
                 {"mode", modes[m].name},
                 {"options", modes[m].options},
                 {"depth", place.depth},
                 {"threads", place.threads},
                 {"cache_type", place.cache_type},
                 {"tokens_per_round", options.steps},
                 {"warmup_tokens", options.warmup},
                 {"round_tokens_per_second", run.round_rates},
                 {"tokens_per_second", median(run.round_rates)},
                 {"longest_step_ratio", stall},
                 {"tokens_per_kv_head", read.tokens_per_kv_head},
                 {"read_fraction", read.read_fraction},
                 {"mass_std_error", read.mass_std_error},
                 {"dense_share", read.dense_share},
                 {"taken", read.taken},
                 {"prefill_seconds", place.prefill_seconds},
                 {"index_build_seconds", build},
                 {"totals", totals_json(run.totals)}});
    if (stock != nullptr) line["ratio_to_stock"] = ratio;
    if (options.kl)
      line.update({{"mean_kl", mean(run.kl)}, {"kl_p99", quantile(run.kl, 0.99)}, {"same_top", same_top}});
    json.write(line);
  }
  std::printf("\ndepth %lld, %d threads, cache %s, prefill %.1f tok/s\n", static_cast<long long>(place.depth),
              place.threads, place.cache_type.c_str(),
              place.depth > 0 ? static_cast<double>(place.depth) / place.prefill_seconds : 0.0);
  table.print(stdout);
}

void report_watched(const Host& host, const Prefill& plain, const Prefill& watched, const std::string& cache_type,
                    JsonLines& json) {
  const double clustering = 1e-9 * static_cast<double>(watched.totals.cluster_ns);
  const double storing = 1e-9 * static_cast<double>(watched.totals.write_ns);
  std::printf(
      "\nprefill to %lld, cache %s: %.2f s plain, %.2f s watched by '%s': clustering %.2f s (%.1f%%), storing rows "
      "%.2f s\n",
      static_cast<long long>(plain.session->kv_len()), cache_type.c_str(), plain.seconds, watched.seconds,
      watched.session->mode().name.c_str(), clustering, 100 * clustering / watched.seconds, storing);
  Json line = record_header(host, "bench-prefill");
  line.update({{"mode", watched.session->mode().name},
               {"depth", plain.session->kv_len()},
               {"cache_type", cache_type},
               {"plain_seconds", plain.seconds},
               {"watched_seconds", watched.seconds},
               {"totals", totals_json(watched.totals)}});
  json.write(line);
}

// The exact distributions of the tokens that the modes will decode, those of the warm-up left out.
std::unique_ptr<LogitStore> exact_logits(Host& host, const BenchOptions& options, std::span<const llama_token> tokens,
                                         std::span<const uint8_t> state, int64_t depth,
                                         const SessionOptions& session_options) {
  const auto count = static_cast<int64_t>(tokens.size());
  auto store = std::make_unique<LogitStore>(count, host.vocab_size());
  Session session(host, parse_mode("dense"), session_options);
  if (depth > 0) session.restore(state, depth);
  warm_up(session, tokens.first(static_cast<size_t>(options.warmup)));
  host.take_totals();
  Progress progress("exact attention", count, "tok");
  for (int64_t i = options.warmup; i < count; ++i) {
    store->set(i, session.decode(tokens[static_cast<size_t>(i)]));
    progress.update(i + 1);
  }
  require_exact(host.take_totals(), session_options.cache_type);
  return store;
}

void bench(const BenchOptions& options) {
  const std::vector<Mode> modes = parse_modes(options.modes);
  std::vector<int64_t> depths = parse_numbers(options.depths, "--depth", 0, 1 << 28);
  std::sort(depths.begin(), depths.end());
  depths.erase(std::unique(depths.begin(), depths.end()), depths.end());
  std::vector<int64_t> threads = parse_numbers(options.threads, "--threads", 0, 512);
  std::replace(threads.begin(), threads.end(), int64_t{0}, int64_t{default_threads()});
  for (const std::string& type : options.cache_types) parse_cache_type(type);
  const auto watcher =
      std::find_if(modes.begin(), modes.end(), [](const Mode& mode) { return !mode.is_dense() && !mode.is_stock(); });
  if (options.watch_prefill && watcher == modes.end())
    throw CommandError("--watch-prefill needs a mode other than stock and dense");
  JsonLines json(options.json, {options.file});

  std::vector<Mode> all_modes = modes;
  if (options.kl) all_modes.push_back(parse_mode("dense"));
  Host host(options.host, all_modes);
  const int64_t kv_len_max = depths.back() + options.decoded();
  if (kv_len_max > host.context_tokens()) {
    std::fprintf(stderr,
                 "tactic: note: depth %lld and %lld decoded tokens are beyond the model's context of %lld tokens\n",
                 static_cast<long long>(depths.back()), static_cast<long long>(options.decoded()),
                 static_cast<long long>(host.context_tokens()));
  }
  std::vector<llama_token> tokens;
  const auto prefill_threads = static_cast<int32_t>(*std::max_element(threads.begin(), threads.end()));

  for (const std::string& type : options.cache_types) {
    SessionOptions session_options = {
        .kv_len_max = kv_len_max, .threads = prefill_threads, .cache_type = parse_cache_type(type)};
    Prefill plain{std::make_unique<Session>(host, parse_mode("stock"), session_options)};
    if (tokens.empty()) tokens = bench_tokens(host, options, kv_len_max);  // minutes of it, if the context is possible
    for (const int64_t depth : depths) {
      plain.advance(host, tokens, depth, format("prefill to %lld", static_cast<long long>(depth)));
      const std::vector<uint8_t> state = depth > 0 ? plain.session->save() : std::vector<uint8_t>{};
      const std::span decoded(tokens.data() + depth, static_cast<size_t>(options.decoded()));
      session_options.kv_len_max = depth + options.decoded();
      std::unique_ptr<LogitStore> exact;
      if (options.kl) exact = exact_logits(host, options, decoded, state, depth, session_options);
      for (const int64_t count : threads) {
        session_options.threads = static_cast<int32_t>(count);
        const auto runs = measure(host, options, modes, decoded, state, depth, session_options, exact.get());
        report(host, options, {depth, session_options.threads, type, plain.seconds}, modes, runs, json);
      }
      session_options.threads = prefill_threads;
    }
    if (options.watch_prefill) {
      host.forget_indexes();
      session_options.kv_len_max = kv_len_max;
      Prefill watched{std::make_unique<Session>(host, *watcher, session_options)};
      watched.advance(host, tokens, depths.back(), "watched prefill");
      report_watched(host, plain, watched, type, json);
    }
  }
  json.finish();
}

}  // namespace

void add_bench(CLI::App& app) {
  auto options = std::make_shared<BenchOptions>();
  CLI::App* verb = app.add_subcommand("bench", "Decode speed of several modes at several depths");
  add_host_options(*verb, options->host);
  verb->add_option("-d,--depth", options->depths, "tokens in the cache: 0,2000 or 1000-8000:1000 or 1024-32768x2")
      ->capture_default_str();
  verb->add_option("-t,--threads", options->threads, "threads, a list; 0: all processors")->capture_default_str();
  verb->add_option("--modes", options->modes, "modes separated by ';'")->capture_default_str();
  verb->add_option("-n,--tokens", options->steps, "tokens per round and mode")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  verb->add_option("--rounds", options->rounds, "rounds; the modes take turns in each")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  verb->add_option("--warmup", options->warmup, "first tokens, not timed")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  verb->add_option("--cache-type", options->cache_types, "K and V cache types, a list")
      ->delimiter(',')
      ->capture_default_str();
  verb->add_option("--file", options->file, "text to fill the cache with; default: generated sentences")
      ->type_name("FILE");
  verb->add_flag("--kl", options->kl, "measure the error too: KL of the next token against exact attention");
  verb->add_flag("--watch-prefill", options->watch_prefill,
                 "prefill once more under the first mode that clusters, and say what that costs");
  verb->add_option("--json", options->json, "append one JSON object per mode and depth")->type_name("FILE");
  verb->footer(
      "Example:\n  tactic bench -m model.gguf -d 2048-8192x2 -t 2 --modes 'stock;sample,error=0.03;fit,mass=0.9' --kl "
      "--json out.jsonl\n"
      "Read fraction: bytes of K, V and index read over bytes of K and V present. Longest step: over the median step.\n"
      "Index build: clustering a restored cache at the first step, and its share of the prefill time.");
  verb->callback([options] { bench(*options); });
}

}  // namespace tactic::tool
