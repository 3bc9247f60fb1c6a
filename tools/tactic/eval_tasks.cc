// tactic eval tasks: answers to task items, and how probable each mode finds the right one.
//
// An item is prefilled once by llama.cpp's own attention, of items that begin alike only the differing end. From that
// one saved state every mode decodes twice, each time in a context of its own: along the right answer (log-probability,
// KL against exact attention), and greedily. Scores and statistics are made from the lines by eval/tasks.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <utility>

#include "baselines/baseline.h"
#include "kl.h"
#include "report.h"
#include "text.h"
#include "verbs.h"

namespace tactic::tool {
namespace {

struct TasksOptions {
  HostOptions host;
  std::string items, out, modes = "stock;quality=high;quality=balanced", cache_type = "f16";
  int32_t threads = 0;
  int64_t limit = 0, max_tokens = 0, seconds = 0;
  bool bare = false;
};

struct Item {
  std::string id, task;
  std::string prompt, prefix, target;  // what the user says; how the answer begins; how it rightly goes on
  int64_t max_tokens = 0;
  std::string fingerprint;  // of all that decides the result, but the mode
};

/// FNV-1a, 64 bits.
std::string fingerprint(const std::vector<std::string>& parts) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const std::string& part : parts) {
    for (const char c : part + '\0') hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001b3;
  }
  return format("%016llx", static_cast<unsigned long long>(hash));
}

std::string text_field(const Json& json, const char* name, bool is_needed) {
  const auto found = json.find(name);
  if (found == json.end() && !is_needed) return {};
  if (found == json.end()) throw CommandError(std::string("no field ") + name);
  if (!found->is_string()) throw CommandError(std::string(name) + " (" + found->dump() + ") must be a string");
  return *found;
}

int64_t whole_field(const Json& json, const char* name) {
  const auto found = json.find(name);
  if (found == json.end()) throw CommandError(std::string("no field ") + name);
  if (!found->is_number_integer())
    throw CommandError(std::string(name) + " (" + found->dump() + ") must be a whole number");
  return *found;
}

// What the summary could not score is not worth an answer (eval/tasks/items.py has the same rules).
void check_scored(const Json& json) {
  static const std::set<std::string> kMetrics = {"all", "any", "babilong", "last_number", "f1"};
  const std::string metric = text_field(json, "metric", true);
  if (kMetrics.count(metric) == 0)
    throw CommandError("metric '" + metric + "' is none of all, any, babilong, last_number, f1");
  const auto answers = json.find("answers");
  if (answers == json.end()) throw CommandError("no field answers");
  if (!answers->is_array() || answers->empty() ||
      !std::all_of(answers->begin(), answers->end(), [](const Json& answer) { return answer.is_string(); }))
    throw CommandError("answers must be a list of at least one string");
  const std::string first = answers->front();
  if (metric == "last_number" && (first.empty() || first.find_first_not_of("0123456789") != std::string::npos))
    throw CommandError("answers[0] ('" + first + "') must be a whole number for last_number");
}

Item parse_item(const std::string& line, const TasksOptions& options) {
  const Json json = Json::parse(line);
  if (!json.is_object()) throw CommandError("not a JSON object");
  Item item{.id = text_field(json, "id", true),
            .task = text_field(json, "task", true),
            .prompt = text_field(json, "prompt", true),
            .prefix = text_field(json, "prefix", false),
            .target = text_field(json, "target", false),
            .max_tokens = whole_field(json, "max_tokens"),
            .fingerprint = {}};
  for (std::string* text : {&item.prompt, &item.prefix, &item.target}) {
    if (repair_utf8(*text, nullptr) > 0)
      std::fprintf(stderr, "tactic: warning: item %s: zero bytes are replaced by U+FFFD\n", item.id.c_str());
  }
  if (item.id.empty() || item.prompt.empty()) throw CommandError("id and prompt must not be empty");
  check_scored(json);
  if (item.max_tokens < 1 || item.max_tokens > 1 << 16) {
    throw CommandError(
        format("max_tokens (%lld) must lie between 1 and 65536", static_cast<long long>(item.max_tokens)));
  }
  if (options.max_tokens > 0) item.max_tokens = std::min(item.max_tokens, options.max_tokens);
  return item;
}

/// Name, size and kind of the model: two models may have one file name.
std::vector<std::string> model_parts(const Host& host) {
  const std::filesystem::path path = host.options().model_path;
  return {path.filename().string(), std::to_string(std::filesystem::file_size(path)), host.model_description()};
}

std::string fingerprint(const Item& item, const TasksOptions& options, const std::vector<std::string>& model) {
  std::vector<std::string> parts = {item.id,
                                    item.task,
                                    item.prompt,
                                    item.prefix,
                                    item.target,
                                    std::to_string(item.max_tokens),
                                    options.cache_type,
                                    options.bare ? "bare" : "chat"};
  parts.insert(parts.end(), model.begin(), model.end());
  if (options.host.yarn != 1) parts.push_back(format("yarn %g", options.host.yarn));
  return fingerprint(parts);
}

/// Broken lines are named on stderr, skipped and counted.
std::vector<Item> read_items(const TasksOptions& options, int64_t& broken) {
  std::ifstream file = open_input(options.items, "the items ");
  std::vector<Item> items;
  std::set<std::string> ids;
  std::string line;
  for (int64_t number = 1; std::getline(file, line); ++number) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    try {
      Item item = parse_item(line, options);
      if (!ids.insert(item.id).second) throw CommandError("the id " + item.id + " stands there twice");
      items.push_back(std::move(item));
    } catch (const std::exception& error) {
      std::fprintf(stderr, "tactic: %s:%lld: skipped: %s\n", options.items.c_str(), static_cast<long long>(number),
                   error.what());
      ++broken;
    }
  }
  if (items.empty()) throw CommandError("no items in " + options.items);
  if (options.limit > 0 && std::ssize(items) > options.limit) items.resize(static_cast<size_t>(options.limit));
  return items;
}

/// Modes that `out` has already, by item.
std::map<std::string, std::set<std::string>> read_done(const std::string& out, const std::vector<Item>& items) {
  std::map<std::string, std::string> fingerprints;
  for (const Item& item : items) fingerprints[item.id] = item.fingerprint;
  std::map<std::string, std::set<std::string>> done;
  std::ifstream file(out);
  std::string line;
  while (std::getline(file, line)) {
    const Json json = Json::parse(line, nullptr, false);
    if (!json.is_object() || json.contains("error")) continue;
    if (!json.contains("id") || !json["id"].is_string() || !json.contains("mode") || !json["mode"].is_string())
      continue;
    const std::string id = json["id"];
    const auto known = fingerprints.find(id);
    if (known == fingerprints.end()) continue;
    if (!json.contains("fingerprint") || json["fingerprint"] != known->second) {
      throw CommandError(out + " has item " + id +
                         " with another text, model or setting, or of an earlier version; give another --out");
    }
    done[id].insert(json["mode"].get<std::string>());
  }
  return done;
}

struct Answer {
  std::string output;
  int64_t output_tokens = 0;
  bool is_complete = false;  // ended by itself, not by max_tokens
  double logprob = 0, kl = 0, kl_max = 0;
  int64_t same_top = 0;  // answer tokens at which the mode's most probable token is that of exact attention
  tactic_totals totals = {};
};

struct Prefilled {
  std::vector<llama_token> tokens;
  std::vector<uint8_t> state;
};

class TaskRun {
 public:
  TaskRun(Host& host, const TasksOptions& options, const Item& item) : host_(host), item_(item) {
    const std::string text = (options.bare ? item.prompt : format_chat(host.model(), item.prompt)) + item.prefix;
    tokens_ = tokenize(host.vocab(), text, true, true);
    if (!item.target.empty()) target_ = tokenize(host.vocab(), item.target, false, false);
    session_options_ = {.kv_len_max = std::ssize(tokens_) + std::max(item.max_tokens, std::ssize(target_)) + 1,
                        .threads = options.threads,
                        .cache_type = parse_cache_type(options.cache_type)};
  }

  /// Why this item cannot be run with this model; empty if it can.
  std::string why_not() const {
    const int64_t most = host_.context_tokens();
    if (tokens_.size() < 2) return "its prompt has fewer than two tokens";
    if (session_options_.kv_len_max <= most) return {};
    return format("it needs a context of %lld tokens, the model has %lld",
                  static_cast<long long>(session_options_.kv_len_max), static_cast<long long>(most));
  }

  int64_t prompt_tokens() const { return std::ssize(tokens_); }
  int64_t target_tokens() const { return std::ssize(target_); }

  /// The last token is left out: each mode decodes it itself. Whole batches that begin like the previous item's are
  /// taken from its state, so that the bits are those of a prefill of everything.
  void prefill(Prefilled& previous) {
    const std::span<const llama_token> tokens(tokens_.data(), tokens_.size() - 1);
    const auto alike =
        std::mismatch(tokens.begin(), tokens.end(), previous.tokens.begin(), previous.tokens.end()).first;
    int64_t shared = (alike - tokens.begin()) / Session::kBatchTokens * Session::kBatchTokens;
    if (std::ssize(previous.tokens) > session_options_.kv_len_max) shared = 0;
    auto session = std::make_unique<Session>(host_, parse_mode("stock"), session_options_);
    if (shared > 0) {
      session->restore(previous.state, std::ssize(previous.tokens));
      if (!session->truncate(shared)) {  // a recurrent part remembers the whole text only
        session = std::make_unique<Session>(host_, parse_mode("stock"), session_options_);
        shared = 0;
      }
    }
    session->prefill(tokens.subspan(static_cast<size_t>(shared)));
    state_ = session->save();
    previous = {{tokens.begin(), tokens.end()}, state_};
    exact_.resize(target_.size() * static_cast<size_t>(host_.vocab_size()));
  }

  Answer answer(const Mode& mode, bool is_reference) {
    Answer answer;
    along_target(mode, is_reference, answer);
    greedily(mode, answer);
    if (is_reference) require_exact(answer.totals, session_options_.cache_type);
    return answer;
  }

 private:
  template <class Take>
  void decode(const Mode& mode, Answer& answer, Take next) {
    host_.forget_indexes();
    Session session(host_, mode, session_options_);
    session.restore(state_, prompt_tokens() - 1);
    host_.configure(mode);
    host_.take_totals();
    std::optional<llama_token> token = tokens_.back();
    while (token) token = next(session.decode(*token));
    add_totals(answer.totals, host_.take_totals());
  }

  void along_target(const Mode& mode, bool is_reference, Answer& answer) {
    if (target_.empty()) return;
    size_t i = 0;
    decode(mode, answer, [&](const float* logits) -> std::optional<llama_token> {
      float* exact = exact_.data() + i * static_cast<size_t>(host_.vocab_size());
      if (is_reference) std::copy_n(logits, host_.vocab_size(), exact);
      const TokenComparison token = compare_logits(exact, logits, host_.vocab_size(), target_[i]);
      answer.logprob -= token.nll;
      answer.kl += token.kl / static_cast<double>(target_.size());
      answer.kl_max = std::max(answer.kl_max, token.kl);
      answer.same_top += token.top == token.exact_top ? 1 : 0;
      return ++i < target_.size() ? std::optional(target_[i - 1]) : std::nullopt;
    });
  }

  void greedily(const Mode& mode, Answer& answer) {
    decode(mode, answer, [&](const float* logits) -> std::optional<llama_token> {
      const auto token = static_cast<llama_token>(std::max_element(logits, logits + host_.vocab_size()) - logits);
      answer.is_complete = llama_vocab_is_eog(host_.vocab(), token);
      if (answer.is_complete) return std::nullopt;
      answer.output += token_piece(host_.vocab(), token);
      return ++answer.output_tokens < item_.max_tokens ? std::optional(token) : std::nullopt;
    });
    repair_utf8(answer.output, nullptr);
  }

  Host& host_;
  const Item& item_;
  std::vector<llama_token> tokens_, target_;
  SessionOptions session_options_;
  std::vector<uint8_t> state_;
  std::vector<float> exact_;  // [target tokens, vocab_size]
};

Json result_line(const Json& header, const Item& item, const TaskRun& run, const Mode& mode, const Answer& answer) {
  const ReadFigures read(answer.totals, static_cast<double>(run.prompt_tokens()));
  Json line = {{"id", item.id}, {"task", item.task}, {"mode", mode.name}, {"options", mode.options}};
  line.update(header);
  line.update({{"prompt_tokens", run.prompt_tokens()},
               {"output", answer.output},
               {"output_tokens", answer.output_tokens},
               {"complete", answer.is_complete}});
  if (run.target_tokens() > 0) {
    line.update({{"answer_tokens", run.target_tokens()},
                 {"answer_logprob", answer.logprob},
                 {"kl", answer.kl},
                 {"kl_max", answer.kl_max},
                 {"same_top", answer.same_top}});
  }
  line.update({{"tokens_per_kv_head", read.tokens_per_kv_head},
               {"read_fraction", read.read_fraction},
               {"taken", read.taken},
               {"fingerprint", item.fingerprint}});
  return line;
}

void eval_tasks(const TasksOptions& options) {
  const Mode exact = parse_mode("dense");
  std::vector<Mode> modes = {exact};
  for (const Mode& mode : parse_modes(options.modes)) {
    if (eval::is_baseline(mode.name))
      throw CommandError("--modes '" + mode.name + "': other methods are of tactic eval kl and eval trace only");
    if (std::none_of(modes.begin(), modes.end(), [&](const Mode& m) { return m.name == mode.name; }))
      modes.push_back(mode);
  }
  parse_cache_type(options.cache_type);
  int64_t broken = 0, left = 0, unfit = 0;
  std::vector<Item> items = read_items(options, broken);
  check_regular(options.out);
  JsonLines out(options.out, {options.items});
  Host host(options.host, modes);
  const std::vector<std::string> model = model_parts(host);
  for (Item& item : items) item.fingerprint = fingerprint(item, options, model);
  const SoleWriter alone(options.out);
  const auto done = read_done(options.out, items);
  const Json facts = record_header(host, "eval tasks");
  const Json header = {{"commit", facts["commit"]},
                       {"model", facts["model"]},
                       {"cache_type", options.cache_type},
                       {"yarn", facts["yarn"]}};

  std::map<std::string, int64_t> sparse_steps;  // of modes that choose
  Prefilled previous;
  std::vector<std::pair<const Item*, std::vector<Mode>>> todo;
  for (const Item& item : items) {
    std::vector<Mode> wanted;
    for (const Mode& mode : modes) {
      const auto known = done.find(item.id);
      if (known == done.end() || !known->second.contains(mode.name)) wanted.push_back(mode);
    }
    if (!wanted.empty()) todo.emplace_back(&item, std::move(wanted));
  }
  int64_t finished = std::ssize(items) - std::ssize(todo);
  Progress progress("items", std::ssize(items), "items");
  progress.begin_at(finished);
  for (const auto& [next, wanted] : todo) {
    const Item& item = *next;
    if (options.seconds > 0 && progress.seconds() >= static_cast<double>(options.seconds)) {
      ++left;
      continue;
    }
    TaskRun run(host, options, item);
    const std::string reason = run.why_not();
    if (!reason.empty()) {
      progress.clear();
      std::fprintf(stderr, "tactic: %s: skipped: %s\n", item.id.c_str(), reason.c_str());
      ++unfit;
      continue;
    }
    run.prefill(previous);
    std::vector<Json> lines;
    const Answer reference = run.answer(exact, true);
    for (const Mode& mode : wanted) {
      const Answer answer = mode.name == exact.name ? reference : run.answer(mode, false);
      lines.push_back(result_line(header, item, run, mode, answer));
      if (!mode.is_stock() && !mode.is_dense()) sparse_steps[mode.name] += answer.totals.sparse_queries;
    }
    for (const Json& line : lines) out.write(line);
    out.finish();
    progress.update(++finished);
  }
  progress.clear();
  for (const auto& [name, steps] : sparse_steps) {
    if (steps == 0)
      std::fprintf(stderr, "tactic: warning: %s read everything: no item is long enough for it\n", name.c_str());
  }
  std::printf("%lld of %zu items are%s; %lld left for another run, %lld unfit, %lld broken line(s) skipped\n",
              static_cast<long long>(finished), items.size(),
              finished > 0 ? (" in " + options.out).c_str() : " answered", static_cast<long long>(left),
              static_cast<long long>(unfit), static_cast<long long>(broken));
  std::fflush(stdout);
  if (unfit > 0 || finished == 0) throw CommandError("not every item has an answer", 3);
  if (broken > 0) throw CommandError("not every line of " + options.items + " is an item", 3);
}

}  // namespace

void add_eval_tasks(CLI::App& eval) {
  auto options = std::make_shared<TasksOptions>();
  CLI::App* verb = eval.add_subcommand("tasks", "Answers to task items, each prefilled once for all modes");
  add_host_options(*verb, options->host);
  verb->add_option("--items", options->items, "JSON lines of scripts/eval_tasks.sh make")
      ->required()
      ->type_name("FILE");
  verb->add_option("-o,--out", options->out, "append one JSON object per item and mode; what it has is not done again")
      ->required()
      ->type_name("FILE");
  verb->add_option("--modes", options->modes, "modes separated by ';'; dense is always there")->capture_default_str();
  verb->add_option("--cache-type", options->cache_type, "f16, q8_0, q4_0 ...")->capture_default_str();
  verb->add_option("-t,--threads", options->threads, "0: all processors")->check(CLI::Range(0, 512));
  verb->add_option("--limit", options->limit, "only the first items; 0: all")->check(CLI::Range(0, 1 << 24));
  verb->add_option("--max-tokens", options->max_tokens, "no answer is longer; 0: as the item says")
      ->check(CLI::Range(0, 1 << 16));
  verb->add_option("--seconds", options->seconds, "begin no item after this time; 0: no limit")
      ->check(CLI::Range(0, 1 << 24));
  verb->add_flag("--bare", options->bare, "no chat template: the prompt as it is");
  verb->footer(
      "Example:\n  tactic eval tasks -m model.gguf --items items.jsonl -o results.jsonl --modes "
      "'quality=high;fit,mass=0.9'\n"
      "Then:\n  scripts/eval_tasks.sh summary --items items.jsonl results.jsonl\n"
      "docs/tasks.md tells what the lines hold.");
  verb->callback([options] { eval_tasks(*options); });
}

}  // namespace tactic::tool
