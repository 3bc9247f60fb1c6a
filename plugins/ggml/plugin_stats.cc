#include "plugin_stats.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "log.h"

namespace tactic::plugin {

namespace {

void add(tactic_totals& totals, const StepStats& s) {
  ++totals.queries;
  totals.kv_heads += s.num_kv_heads;
  totals.tokens_certain += s.tokens_certain;
  totals.tokens_sampled += s.tokens_sampled;
  totals.tokens_value += s.tokens_value;
  totals.refined_clusters += s.refined_clusters;
  totals.index_bytes += s.index_bytes;
  totals.kv_bytes += s.kv_bytes;
  totals.kv_bytes_present += s.kv_bytes_present;
  totals.dense_queries += s.dense != DenseReason::kNone;
  totals.changed_queries += s.dense == DenseReason::kRowChanged;
  if (s.dense == DenseReason::kNone) {
    ++totals.sparse_queries;
    totals.estimated_mass += s.estimated_mass;
    totals.mass_variance += s.mass_std_error * s.mass_std_error;
  }
}

}  // namespace

PluginStats::~PluginStats() { open(""); }

void PluginStats::open(const std::string& path) {
  const std::lock_guard lock(mutex_);
  if (file_ != nullptr) {
    write_line();
    if (file_ != nullptr) std::fclose(file_);
    file_ = nullptr;
  }
  path_ = path;
  if (path.empty()) return;
  // A pipe without a reader is refused; the host must not wait for one.
  const int descriptor = ::open(path.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | O_NONBLOCK, 0666);
  if (descriptor >= 0) {
    ::fcntl(descriptor, F_SETFL, ::fcntl(descriptor, F_GETFL) & ~O_NONBLOCK);
    file_ = ::fdopen(descriptor, "a");
  }
  if (file_ == nullptr) log_error("cannot write statistics to %s: %s", path.c_str(), std::strerror(errno));
}

void PluginStats::add_node(const StepStats* stats, int64_t num_queries, int32_t layer, int64_t attend_ns) {
  const std::lock_guard lock(mutex_);
  if (layer <= last_layer_) end_step();
  last_layer_ = layer;
  for (tactic_totals* totals : {&totals_, &step_}) {
    ++totals->nodes;
    totals->attend_ns += attend_ns;
    for (int64_t i = 0; i < num_queries; ++i) add(*totals, stats[i]);
  }
  if (layer == deepest_layer_) end_step();
}

void PluginStats::end_step() {
  deepest_layer_ = std::max(deepest_layer_, last_layer_);
  last_layer_ = -1;
  if (file_ != nullptr) write_line();
}

void PluginStats::add_write(int64_t ns) {
  const std::lock_guard lock(mutex_);
  totals_.write_ns += ns;
  step_.write_ns += ns;
}

void PluginStats::add_clustering(int64_t ns) {
  const std::lock_guard lock(mutex_);
  totals_.cluster_ns += ns;
  step_.cluster_ns += ns;
}

tactic_totals PluginStats::take() {
  const std::lock_guard lock(mutex_);
  const tactic_totals result = totals_;
  totals_ = {};
  return result;
}

// The step that ended. A file that can no longer be written is given up, decoding goes on.
void PluginStats::write_line() {
  if (step_.nodes > 0) {
    const tactic_totals& s = step_;
    const double sparse = s.sparse_queries > 0 ? static_cast<double>(s.sparse_queries) : 1.0;
    const double heads = s.kv_heads > 0 ? static_cast<double>(s.kv_heads) : 1.0;
    const int written = std::fprintf(
        file_,
        "{\"step\":%lld,\"layers\":%lld,\"queries\":%lld,\"dense_queries\":%lld,\"changed_queries\":%lld,\"tokens_"
        "certain\":%.1f,"
        "\"tokens_sampled\":%.1f,\"refined_clusters\":%.2f,\"kv_bytes\":%lld,\"index_bytes\":%lld,\"read_fraction\":%."
        "5f,"
        "\"estimated_mass\":%.5f,\"mass_variance\":%.3e,\"attend_us\":%.1f,\"write_us\":%.1f,\"cluster_us\":%.1f}\n",
        static_cast<long long>(step_number_), static_cast<long long>(s.nodes), static_cast<long long>(s.queries),
        static_cast<long long>(s.dense_queries), static_cast<long long>(s.changed_queries),
        static_cast<double>(s.tokens_certain) / heads, static_cast<double>(s.tokens_sampled) / heads,
        static_cast<double>(s.refined_clusters) / heads, static_cast<long long>(s.kv_bytes),
        static_cast<long long>(s.index_bytes),
        s.kv_bytes_present > 0
            ? static_cast<double>(s.kv_bytes + s.index_bytes) / static_cast<double>(s.kv_bytes_present)
            : 0.0,
        s.sparse_queries > 0 ? s.estimated_mass / sparse : 1.0, s.mass_variance / sparse,
        static_cast<double>(s.attend_ns) / 1e3, static_cast<double>(s.write_ns) / 1e3,
        static_cast<double>(s.cluster_ns) / 1e3);
    if (written < 0 || std::fflush(file_) != 0 || std::ferror(file_) != 0) {
      log_error("cannot write statistics to %s: %s; going on without them", path_.c_str(), std::strerror(errno));
      std::fclose(file_);
      file_ = nullptr;
    }
    ++step_number_;
  }
  step_ = {};
}

}  // namespace tactic::plugin
