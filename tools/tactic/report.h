// How results are summed up and shown: statistics, a table, JSON lines, a progress bar.
#pragma once

#include <chrono>
#include <cstdint>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "plugin_api.h"

namespace tactic::tool {

class Host;

using Json = nlohmann::ordered_json;

struct Interval {
  double low = 0, high = 0;
};

double mean(std::span<const double> values);
/// Linear between the two nearest ranks; q from 0 to 1; NaN for no values.
double quantile(std::span<const double> values, double q);
inline double median(std::span<const double> values) { return quantile(values, 0.5); }
/// 95% percentile interval of the mean of several series of `series_length` values one after the other. Resamples
/// blocks of `block` neighbors of one series, since neighboring tokens are correlated. Fewer than eight blocks: none.
std::optional<Interval> bootstrap_mean(std::span<const double> values, size_t series_length, size_t block,
                                       int resamples = 2000, uint64_t seed = 1);
/// 95% interval of a rate.
Interval wilson(double successes, double trials);
/// The same for the rate of trials that come in series in which neighbors vary together: so many fewer of them count as
/// the rates of blocks scatter more than those of independent trials. With fewer than eight blocks all count.
Interval wilson_of_series(std::span<const double> successes, size_t series_length, size_t block);

/// What the plug-in read, over some steps of a mode. A mode that took no node read everything.
struct ReadFigures {
  explicit ReadFigures(const tactic_totals& totals, double kv_len);
  double tokens_per_kv_head = 0;
  double read_fraction = 1;
  double mass_std_error = 0;  // of one head's mass, as estimated by the step itself
  double dense_share = 1;     // of the queries
  bool taken = false;
};
void add_totals(tactic_totals& sum, const tactic_totals& part);
Json totals_json(const tactic_totals& totals);

std::string format(const char* printf_format, ...) __attribute__((format(printf, 1, 2)));

/// Left-aligned first column, right-aligned others.
class Table {
 public:
  explicit Table(std::vector<std::string> header) : rows_{std::move(header)} {}
  void add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  void print(std::FILE* file) const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

/// One line, with its end; bytes that are no UTF-8 are replaced.
std::string to_line(const Json& object);

/// Appends one JSON object a line to a file; no path: does nothing. A new file is made with the first line, so that a
/// run that ends before it leaves none. A last line that was cut short is closed first, so that it spoils no other.
class JsonLines {
 public:
  /// Throws CommandError if the file could not be written, is one of the `inputs`, or holds something else.
  JsonLines(const std::string& path, const std::vector<std::string>& inputs);
  bool is_wanted() const { return !path_.empty(); }
  /// What cannot be written is lost with all that follows; finish() says so, when everything was measured and shown.
  void write(const Json& object);
  /// Throws CommandError if a line could not be written.
  void finish() const;

 private:
  void open();

  std::ofstream file_;
  std::string path_;
};

/// date, commit, machine: what every line starts with.
Json record_header(const std::string& verb);
/// And the host and its model.
Json record_header(const Host& host, const std::string& verb);

/// On a terminal a bar that redraws itself; else a line now and then.
class Progress {
 public:
  Progress(std::string label, int64_t total, const char* unit);
  ~Progress();
  void update(int64_t done);
  /// So many were done before: they took no time.
  void begin_at(int64_t done) { before_ = done_ = done; }
  /// Takes the bar off a terminal, so that a line can be printed.
  void clear() const;
  double seconds() const;

 private:
  using Clock = std::chrono::steady_clock;
  void draw();

  std::string label_, unit_;
  int64_t total_ = 0, done_ = 0, before_ = 0;
  bool is_terminal_ = false;
  Clock::time_point start_, drawn_;
};

}  // namespace tactic::tool
