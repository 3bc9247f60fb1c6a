#include "shared.h"

#include <cmath>
#include <sstream>

namespace tactic::plugin {

std::shared_ptr<const PluginOptions> Shared::options() const {
  const std::lock_guard lock(mutex_);
  return options_;
}

void Shared::set_options(const PluginOptions& options) {
  const std::lock_guard lock(mutex_);
  if (!(options.index == options_->index)) watch.clear();
  else if (options.enabled && !options_->enabled) watch.compare_again();  // the host wrote meanwhile
  options_ = std::make_shared<PluginOptions>(options);
}

Shared& shared() {
  static Shared* instance = new Shared;  // outlives static destruction of the host
  return *instance;
}

std::string inspect_json() {
  std::ostringstream json;
  json << "{\"layers\": [";
  const char* separator = "";
  shared().watch.for_each([&](const CacheLayer& layer) {
    if (layer.last_step.empty()) return;
    const KvIndex& index = layer.streams[layer.last_stream]->index;
    json << separator << "{\"layer\": " << layer.layer << ", \"stream\": " << layer.last_stream
         << ", \"kv_len\": " << layer.last_kv_len << ", \"heads\": [";
    separator = ", ";
    for (size_t head = 0; head < layer.last_step.size(); ++head) {
      const HeadStats& s = layer.last_step[head];
      json << (head > 0 ? ", " : "") << "{\"clusters\": " << index.num_clusters()
           << ", \"mean_spread\": " << index.mean_spread(static_cast<int32_t>(head)) << ", \"beta\": " << s.beta
           << ", \"tokens\": " << s.tokens << ", \"exact_tokens\": " << s.exact_tokens
           << ", \"exact_mass\": " << s.exact_mass << ", \"estimated_mass\": " << s.estimated_mass
           << ", \"tau\": " << (std::isfinite(s.tau) ? s.tau : 0) << "}";
    }
    json << "]}";
  });
  json << "]}";
  return json.str();
}

}  // namespace tactic::plugin
