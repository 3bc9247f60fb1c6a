// tactic run: answer a prompt, and say what it cost; --compare answers twice from one prefill.
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <memory>
#include <optional>
#include <utility>

#include "kl.h"
#include "report.h"
#include "text.h"
#include "verbs.h"

namespace tactic::tool {
namespace {

struct RunOptions {
  HostOptions host;
  std::string file, prompt, mode = "default", cache_type = "f16";
  int64_t max_tokens = 128, context = 0;
  int32_t threads = 0;
  float temperature = 0;
  uint32_t seed = 1;
  bool compare = false, no_chat = false;
};

struct Choice {
  llama_token token;
  double probability;
};
using BestTwo = std::array<Choice, 2>;

struct Answer {
  std::vector<llama_token> tokens;
  std::vector<BestTwo> best;  // of each step, for --compare
  double first_seconds = 0;   // the last prompt token, and the index if it was not built during the prefill
  double seconds = 0;         // the steps after it
  int64_t steps = 0;
  double mean_kv_len = 0;
  tactic_totals totals = {};

  double tokens_per_second() const { return seconds > 0 ? static_cast<double>(steps) / seconds : 0.0; }
};

BestTwo best_two(const float* logits, int32_t vocab_size) {
  const Normalizer all = normalize(logits, vocab_size);
  llama_token second = all.top == 0 && vocab_size > 1 ? 1 : 0;
  for (llama_token i = 0; i < vocab_size; ++i) {
    if (i != all.top && logits[i] > logits[second]) second = i;
  }
  const auto choice = [&](llama_token token) { return Choice{token, std::exp(double{logits[token]} - all.lse)}; };
  return {choice(all.top), choice(second)};
}

struct FreeSampler {
  void operator()(llama_sampler* sampler) const { llama_sampler_free(sampler); }
};

std::unique_ptr<llama_sampler, FreeSampler> make_sampler(const RunOptions& options) {
  llama_sampler* chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
  if (options.temperature <= 0) {
    llama_sampler_chain_add(chain, llama_sampler_init_greedy());
  } else {
    llama_sampler_chain_add(chain, llama_sampler_init_min_p(0.05f, 1));  // llama.cpp's own default
    llama_sampler_chain_add(chain, llama_sampler_init_temp(options.temperature));
    llama_sampler_chain_add(chain, llama_sampler_init_dist(options.seed));
  }
  return std::unique_ptr<llama_sampler, FreeSampler>(chain);
}

Answer generate(Host& host, Session& session, llama_token last_prompt_token, const RunOptions& options,
                int64_t max_tokens) {
  using Clock = std::chrono::steady_clock;
  const auto sampler = make_sampler(options);
  Answer answer;
  Utf8Stream stream;
  llama_token token = last_prompt_token;
  host.configure(session.mode());
  host.take_totals();
  for (int64_t step = 0; step < max_tokens; ++step) {
    const auto begin = Clock::now();
    session.decode(token);
    token = llama_sampler_sample(sampler.get(), session.context(), -1);
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    if (step == 0) {
      answer.first_seconds = seconds;
    } else {
      answer.seconds += seconds;
      ++answer.steps;
    }
    answer.mean_kv_len += static_cast<double>(session.kv_len());
    answer.tokens.push_back(token);
    if (options.compare) {
      answer.best.push_back(best_two(llama_get_logits_ith(session.context(), -1), llama_vocab_n_tokens(host.vocab())));
    }
    if (llama_vocab_is_eog(host.vocab(), token)) break;
    std::fputs(stream.push(token_piece(host.vocab(), token)).c_str(), stdout);
    std::fflush(stdout);
  }
  std::printf("%s\n", stream.flush().c_str());
  std::fflush(stdout);
  answer.mean_kv_len /= static_cast<double>(answer.tokens.size());
  answer.totals = host.take_totals();
  return answer;
}

std::string prompt_text(const RunOptions& options) {
  std::string text;
  if (!options.file.empty()) text = read_text(options.file);
  if (!options.file.empty() && text.find_first_not_of(" \t\r\n") == std::string::npos)
    throw CommandError(options.file + " has no text");
  std::string prompt = options.prompt;
  size_t first = 0;
  if (repair_utf8(prompt, &first) > 0) {
    std::fprintf(stderr,
                 "tactic: warning: the prompt is not UTF-8 text; bytes replaced by U+FFFD, the first at offset %zu\n",
                 first);
  }
  if (!text.empty() && !prompt.empty()) text += "\n\n";
  text += prompt;
  if (text.find_first_not_of(" \t\r\n") == std::string::npos)
    throw CommandError("the prompt is empty; give --prompt or --file");
  return text;
}

// Tokens the context must hold. Sets `max_tokens` to what fits.
int64_t context_tokens(const Host& host, const RunOptions& options, int64_t prompt_tokens, int64_t* max_tokens) {
  const int64_t trained = host.context_tokens();
  const int64_t limit = options.context > 0 ? options.context : trained;
  if (prompt_tokens >= limit) {
    throw CommandError(format("the prompt has %lld tokens and the context holds %lld%s",
                              static_cast<long long>(prompt_tokens), static_cast<long long>(limit),
                              options.context > 0 ? " (-c)" : ", the model's training context; -c sets another"));
  }
  if (limit > trained) {
    std::fprintf(stderr, "tactic: note: the model was trained on contexts of %lld tokens\n",
                 static_cast<long long>(trained));
  }
  if (*max_tokens > limit - prompt_tokens) {
    *max_tokens = limit - prompt_tokens;
    std::fprintf(stderr, "tactic: note: the context leaves room for %lld tokens of answer\n",
                 static_cast<long long>(*max_tokens));
  }
  return options.context > 0 ? options.context : prompt_tokens + *max_tokens;
}

void print_figures(const std::vector<std::string>& names, const std::vector<Answer>& answers, double prefill_seconds,
                   int64_t prefill_tokens, const tactic_totals& prefill_totals) {
  std::vector<std::string> header = {""}, rate = {"decode tok/s"}, first = {"first token s"},
                           tokens = {"tokens read per KV head"}, fraction = {"read fraction"},
                           error = {"estimated error of the mass"}, dense = {"dense queries"};
  for (size_t i = 0; i < answers.size(); ++i) {
    const Answer& a = answers[i];
    const ReadFigures read(a.totals, a.mean_kv_len);
    header.push_back(names[i]);
    rate.push_back(a.steps > 0 ? format("%.2f", a.tokens_per_second()) : "-");
    first.push_back(format("%.2f", a.first_seconds));
    tokens.push_back(format("%.0f of %.0f", read.tokens_per_kv_head, a.mean_kv_len));
    fraction.push_back(format("%.3f", read.read_fraction));
    error.push_back(read.taken && a.totals.sparse_queries > 0 ? format("%.4f", read.mass_std_error) : "-");
    dense.push_back(read.taken ? format("%.1f%%", 100 * read.dense_share) : "all, by llama.cpp");
  }
  std::fputs("\n", stderr);
  if (prefill_tokens > 0) {
    std::fprintf(stderr, "prefill: %lld tokens, %.1f tok/s, of which clustering %.1f%%\n",
                 static_cast<long long>(prefill_tokens), static_cast<double>(prefill_tokens) / prefill_seconds,
                 1e-7 * static_cast<double>(prefill_totals.cluster_ns) / prefill_seconds);
  }
  Table table(header);
  for (auto& row : {rate, first, tokens, fraction, error, dense}) table.add(row);
  table.print(stderr);
}

void print_difference(const Host& host, const Answer& stock, const Answer& tactic) {
  const auto common = static_cast<size_t>(
      std::mismatch(stock.tokens.begin(), stock.tokens.end(), tactic.tokens.begin(), tactic.tokens.end()).first -
      stock.tokens.begin());
  if (common == stock.tokens.size() && common == tactic.tokens.size()) {
    std::fprintf(stderr, "the answers are equal, %zu tokens\n", common);
    return;
  }
  const auto piece = [&](llama_token token) {
    return "'" + escape_controls(token_piece(host.vocab(), token, true)) + "'";
  };
  const auto shown = [&](const Answer& answer) -> std::string {
    if (common >= answer.tokens.size()) return "(end)";
    const BestTwo& best = answer.best[common];
    return format("%s (best: %s %.2f, %s %.2f)", piece(answer.tokens[common]).c_str(), piece(best[0].token).c_str(),
                  best[0].probability, piece(best[1].token).c_str(), best[1].probability);
  };
  std::fprintf(stderr, "the answers first differ at token %zu: stock %s, tactic %s\n", common + 1, shown(stock).c_str(),
               shown(tactic).c_str());
}

void run(const RunOptions& options) {
  if (!(options.temperature >= 0)) throw CommandError("--temp must be a number in 0..10");  // nan passes as in range
  const Mode mode = parse_mode(options.mode);
  const Mode stock = stock_beside(mode);
  const ggml_type cache_type = parse_cache_type(options.cache_type);
  const std::string text = prompt_text(options);
  std::vector<Mode> modes = {mode};
  if (options.compare) modes.push_back(stock);
  Host host(options.host, modes);

  const std::string formatted = options.no_chat ? text : format_chat(host.model(), text);
  const std::vector<llama_token> tokens = tokenize(host.vocab(), formatted, true, !options.no_chat);
  const auto prompt_tokens = static_cast<int64_t>(tokens.size());
  if (prompt_tokens == 0) throw CommandError("the prompt has no tokens");
  int64_t max_tokens = options.max_tokens;
  const int64_t context = context_tokens(host, options, prompt_tokens, &max_tokens);
  const SessionOptions session_options = {.kv_len_max = context, .threads = options.threads, .cache_type = cache_type};

  // The last prompt token is each mode's first step: its scores choose the first token of the answer.
  Session session(host, mode, session_options);
  const std::span<const llama_token> body(tokens.data(), tokens.size() - 1);
  host.take_totals();
  double prefill_seconds = 0;
  {
    Progress progress("prefill", static_cast<int64_t>(body.size()), "tok");
    session.prefill(body, [&](int64_t done) { progress.update(done); });
    prefill_seconds = progress.seconds();
  }
  const tactic_totals prefill_totals = host.take_totals();

  std::vector<Answer> answers;
  std::vector<std::string> names;
  if (options.compare) {
    Session stock_session(host, stock, session_options);
    if (!body.empty()) stock_session.restore(session.save(), static_cast<int64_t>(body.size()));
    std::printf("--- %s\n", stock.name.c_str());
    answers.push_back(generate(host, stock_session, tokens.back(), options, max_tokens));
    names.push_back(stock.name);
    std::printf("--- %s\n", mode.name.c_str());
  }
  answers.push_back(generate(host, session, tokens.back(), options, max_tokens));
  names.push_back(mode.name);
  print_figures(names, answers, prefill_seconds, static_cast<int64_t>(body.size()), prefill_totals);
  if (!options.compare) return;
  const tactic_totals& totals = answers[1].totals;
  if (mode.is_stock()) {
    std::fprintf(stderr, "both answers are llama.cpp's own\n");
  } else if (totals.dense_queries == totals.queries && !mode.is_dense()) {  // none at all, too
    std::fprintf(stderr,
                 "nothing was sparse, so that there is no speed to compare: the context is below min_sparse (%d), or "
                 "the model's attention or the cache type is left to llama.cpp\n",
                 min_sparse_of(mode));
  } else if (answers[0].steps > 0 && answers[1].steps > 0) {
    // One answers after the other: other work on the machine tells more than so few tokens. `bench` takes turns.
    const bool few = std::min(answers[0].steps, answers[1].steps) < 8;
    std::fprintf(stderr, "decode speed against stock: %.2f%s\n",
                 answers[1].tokens_per_second() / answers[0].tokens_per_second(),
                 few ? " (of so few tokens: says little; tactic bench measures)" : "");
  }
  print_difference(host, answers[0], answers[1]);
}

}  // namespace

void add_run(CLI::App& app) {
  auto options = std::make_shared<RunOptions>();
  CLI::App* verb = app.add_subcommand("run", "Answer a prompt over a long text and say what was read");
  add_host_options(*verb, options->host);
  verb->add_option("--file", options->file, "text that comes before the prompt")->type_name("FILE");
  verb->add_option("--prompt", options->prompt, "the question")->type_name("TEXT");
  verb->add_option("-n,--tokens", options->max_tokens, "longest answer")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  verb->add_option("-c,--context", options->context, "tokens the context holds; 0: what is needed")
      ->check(CLI::Range(0, 1 << 28));
  verb->add_option("-t,--threads", options->threads, "0: all processors")->check(CLI::Range(0, 512));
  verb->add_option("--cache-type", options->cache_type, "f32, f16, bf16, q8_0, q4_0 ...")->capture_default_str();
  verb->add_option("--tactic", options->mode,
                   "mode, as in 'sample,error=0.03'; default: what TACTIC says, else the plug-in's own")
      ->envname("TACTIC")
      ->type_name("MODE");
  verb->add_flag("--compare", options->compare, "answer with llama.cpp's own attention too, from the same prefill");
  verb->add_flag("--no-chat", options->no_chat, "use the text as it is, without the chat template");
  verb->add_option("--temp", options->temperature, "0: always the most probable token")->check(CLI::Range(0.0f, 10.0f));
  verb->add_option("--seed", options->seed, "of the token choice when --temp is above 0")->capture_default_str();
  verb->footer("Example:\n  tactic run -m model.gguf --file book.txt --prompt 'Who is the author?' --compare");
  verb->callback([options] { run(*options); });
}

}  // namespace tactic::tool
