#include "report.h"

#include <llama.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <limits>
#include <random>
#include <thread>

#include "commit.h"
#include "host.h"
#include "text.h"

namespace tactic::tool {
namespace {

std::string cpu_model() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown";
}

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm parts = {};
  gmtime_r(&now, &parts);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text;
}

// Code points, which is what a terminal's columns are for the text we print.
size_t display_width(const std::string& text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

}  // namespace

double mean(std::span<const double> values) {
  double sum = 0;
  for (const double v : values) sum += v;
  return values.empty() ? std::numeric_limits<double>::quiet_NaN() : sum / static_cast<double>(values.size());
}

double quantile(std::span<const double> values, double q) {
  if (values.empty()) return std::numeric_limits<double>::quiet_NaN();
  std::vector<double> sorted(values.begin(), values.end());
  std::sort(sorted.begin(), sorted.end());
  const double rank = q * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(rank);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (rank - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}

namespace {

constexpr size_t kFewestBlocks = 8;  // of one or two, all resamples would be nearly the same

struct Block {
  double sum, count;
};

std::vector<Block> blocks_of(std::span<const double> values, size_t series_length, size_t block) {
  std::vector<Block> blocks;
  for (size_t begin = 0; begin < values.size();) {
    const size_t series_end = std::min(values.size(), (begin / series_length + 1) * series_length);
    const auto part = values.subspan(begin, std::min(block, series_end - begin));
    blocks.push_back({mean(part) * static_cast<double>(part.size()), static_cast<double>(part.size())});
    begin += part.size();
  }
  return blocks;
}

}  // namespace

std::optional<Interval> bootstrap_mean(std::span<const double> values, size_t series_length, size_t block,
                                       int resamples, uint64_t seed) {
  const std::vector<Block> blocks = blocks_of(values, series_length, block);
  if (blocks.size() < kFewestBlocks) return std::nullopt;
  std::mt19937_64 random(seed);
  std::uniform_int_distribution<size_t> pick(0, blocks.size() - 1);
  std::vector<double> means;
  for (int r = 0; r < resamples; ++r) {
    double sum = 0, count = 0;
    for (size_t i = 0; i < blocks.size(); ++i) {
      const Block& b = blocks[pick(random)];
      sum += b.sum;
      count += b.count;
    }
    means.push_back(sum / count);
  }
  return Interval{quantile(means, 0.025), quantile(means, 0.975)};
}

Interval wilson(double successes, double trials) {
  if (!(trials > 0)) return {0, 1};
  constexpr double z = 1.959964;
  const double n = trials, p = successes / n;
  const double center = (p + z * z / (2 * n)) / (1 + z * z / n);
  const double half = z * std::sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n);
  return {std::max(0.0, center - half), std::min(1.0, center + half)};
}

Interval wilson_of_series(std::span<const double> successes, size_t series_length, size_t block) {
  const auto n = static_cast<double>(successes.size());
  const std::vector<Block> blocks = blocks_of(successes, series_length, block);
  if (successes.empty()) return wilson(0, 0);
  const double rate = mean(successes), independent = n * rate * (1 - rate);  // variance of the sum
  double variance = 0;
  for (const Block& b : blocks) variance += (b.sum - rate * b.count) * (b.sum - rate * b.count);
  const auto count = static_cast<double>(blocks.size());
  const bool known = blocks.size() >= kFewestBlocks && independent > 0;
  const double effect = known ? std::max(1.0, variance * count / (count - 1) / independent) : 1.0;
  return wilson(rate * n / effect, n / effect);
}

ReadFigures::ReadFigures(const tactic_totals& totals, double kv_len) : tokens_per_kv_head(kv_len) {
  if (totals.queries == 0 || totals.kv_heads == 0) return;
  taken = true;
  const auto ratio = [](auto a, auto b) { return b > 0 ? static_cast<double>(a) / static_cast<double>(b) : 0.0; };
  tokens_per_kv_head = ratio(totals.tokens_certain + totals.tokens_sampled, totals.kv_heads);
  read_fraction = ratio(totals.kv_bytes + totals.index_bytes, totals.kv_bytes_present);
  mass_std_error = std::sqrt(ratio(totals.mass_variance, totals.sparse_queries));
  dense_share = ratio(totals.dense_queries, totals.queries);
}

void add_totals(tactic_totals& sum, const tactic_totals& part) {
  sum.nodes += part.nodes;
  sum.queries += part.queries;
  sum.dense_queries += part.dense_queries;
  sum.changed_queries += part.changed_queries;
  sum.kv_heads += part.kv_heads;
  sum.tokens_certain += part.tokens_certain;
  sum.tokens_sampled += part.tokens_sampled;
  sum.tokens_value += part.tokens_value;
  sum.refined_clusters += part.refined_clusters;
  sum.index_bytes += part.index_bytes;
  sum.kv_bytes += part.kv_bytes;
  sum.kv_bytes_present += part.kv_bytes_present;
  sum.estimated_mass += part.estimated_mass;
  sum.mass_variance += part.mass_variance;
  sum.sparse_queries += part.sparse_queries;
  sum.attend_ns += part.attend_ns;
  sum.write_ns += part.write_ns;
  sum.cluster_ns += part.cluster_ns;
  sum.index_memory_bytes = part.index_memory_bytes;  // these two are states, not sums
  sum.kv_memory_bytes = part.kv_memory_bytes;
}

Json totals_json(const tactic_totals& t) {
  return {{"nodes", t.nodes},
          {"queries", t.queries},
          {"dense_queries", t.dense_queries},
          {"changed_queries", t.changed_queries},
          {"sparse_queries", t.sparse_queries},
          {"kv_heads", t.kv_heads},
          {"tokens_certain", t.tokens_certain},
          {"tokens_sampled", t.tokens_sampled},
          {"tokens_value", t.tokens_value},
          {"refined_clusters", t.refined_clusters},
          {"index_bytes", t.index_bytes},
          {"kv_bytes", t.kv_bytes},
          {"kv_bytes_present", t.kv_bytes_present},
          {"estimated_mass", t.sparse_queries > 0 ? t.estimated_mass / static_cast<double>(t.sparse_queries) : 0.0},
          {"attend_ns", t.attend_ns},
          {"write_ns", t.write_ns},
          {"cluster_ns", t.cluster_ns},
          {"index_memory_bytes", t.index_memory_bytes},
          {"kv_memory_bytes", t.kv_memory_bytes}};
}

std::string format(const char* printf_format, ...) {
  va_list arguments, again;
  va_start(arguments, printf_format);
  va_copy(again, arguments);
  std::string text(static_cast<size_t>(std::max(0, std::vsnprintf(nullptr, 0, printf_format, arguments))), '\0');
  std::vsnprintf(text.data(), text.size() + 1, printf_format, again);
  va_end(again);
  va_end(arguments);
  return text;
}

void Table::print(std::FILE* file) const {
  std::vector<size_t> widths(rows_.front().size());
  for (const auto& row : rows_) {
    for (size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], display_width(row[c]));
  }
  for (const auto& row : rows_) {
    std::string line;
    for (size_t c = 0; c < row.size(); ++c) {
      const std::string fill(widths[c] - display_width(row[c]), ' ');
      line += (c == 0 ? "" : "  ") + (c == 0 ? row[c] + fill : fill + row[c]);
    }
    std::fprintf(file, "%s\n", line.c_str());
  }
  std::fflush(file);
}

std::string to_line(const Json& object) { return object.dump(-1, ' ', false, Json::error_handler_t::replace) + '\n'; }

JsonLines::JsonLines(const std::string& path, const std::vector<std::string>& inputs) : path_(path) {
  if (!is_wanted()) return;
  check_writable(path);
  check_apart(path, inputs);
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) return;
  char first = '{';
  std::ifstream(path, std::ios::binary) >> first;
  if (first != '{') throw CommandError("cannot append to " + path + ": it is there and holds no JSON lines");
}

void JsonLines::write(const Json& object) {
  if (!is_wanted()) return;
  if (!file_.is_open()) open();
  file_ << to_line(object) << std::flush;
}

void JsonLines::finish() const {
  if (!file_) throw CommandError("cannot write " + path_);
}

void JsonLines::open() {
  std::error_code error;
  char last = '\n';
  if (std::filesystem::is_regular_file(path_, error))
    std::ifstream(path_, std::ios::binary).seekg(-1, std::ios::end).get(last);
  file_.open(path_, std::ios::app);
  if (last != '\n') file_ << '\n';
}

Json record_header(const std::string& verb) {
  const char* commit = std::getenv("TACTIC_COMMIT");
  return {{"verb", verb},
          {"date", utc_now()},
          {"commit", commit != nullptr ? commit : TACTIC_COMMIT},
          {"machine", {{"cpu", cpu_model()}, {"cores", std::thread::hardware_concurrency()}}}};
}

Json record_header(const Host& host, const std::string& verb) {
  Json header = record_header(verb);
  header.update({{"host", {{"llama", llama_version()}, {"ggml", ggml_version()}}},
                 {"model", std::filesystem::path(host.options().model_path).filename().string()},
                 {"model_description", host.model_description()},
                 {"yarn", host.options().yarn}});
  return header;
}

Progress::Progress(std::string label, int64_t total, const char* unit)
    : label_(std::move(label)),
      unit_(unit),
      total_(total),
      is_terminal_(isatty(STDERR_FILENO) == 1),
      start_(Clock::now()),
      drawn_(start_) {}

Progress::~Progress() { clear(); }

void Progress::clear() const {
  if (is_terminal_) std::fputs("\r\033[K", stderr);
}

double Progress::seconds() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }

void Progress::update(int64_t done) {
  done_ = done;
  const std::chrono::duration<double> since = Clock::now() - drawn_;
  if (since.count() < (is_terminal_ ? 0.1 : 10.0)) return;
  drawn_ = Clock::now();
  draw();
}

void Progress::draw() {
  const double share = total_ > 0 ? static_cast<double>(done_) / static_cast<double>(total_) : 1.0;
  const double rate = static_cast<double>(done_ - before_) / std::max(seconds(), 1e-9);
  const double left = rate > 0 ? static_cast<double>(total_ - done_) / rate : 0.0;
  const std::string pace = rate > 0 && rate < 1 ? format("%.3g s each", 1 / rate) : format("%.1f/s", rate);
  const std::string figures = format("%lld/%lld %s, %s, %.0f s left", static_cast<long long>(done_),
                                     static_cast<long long>(total_), unit_.c_str(), pace.c_str(), left);
  if (!is_terminal_) {
    std::fprintf(stderr, "%s: %3.0f%%, %s\n", label_.c_str(), 100 * share, figures.c_str());
    return;
  }
  constexpr int kWidth = 30;
  const auto full = static_cast<size_t>(std::clamp(share, 0.0, 1.0) * kWidth);
  std::fprintf(stderr, "\r\033[K%s [%s%s] %s", label_.c_str(), std::string(full, '#').c_str(),
               std::string(kWidth - full, '.').c_str(), figures.c_str());
}

}  // namespace tactic::tool
