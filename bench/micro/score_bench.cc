// score: all clusters of one KV head at 8K, index in cache or not.
#include <benchmark/benchmark.h>

#include "cpu/steps.h"
#include "support.h"

namespace tactic::bench {
namespace {

void score(benchmark::State& state) {
  const auto group = static_cast<int32_t>(state.range(0));
  IndexedLayer layer(3, 64, 8192, group);
  const std::vector<float> q = random_queries(group, 64, 3);
  for (auto _ : state) {
    for (int32_t head = 0; head < 3; ++head)
      cpu::score(layer.index.state(), head, layer.filter, q.data(), group, 0, layer.scores.num_clusters, layer.scores);
  }
  state.SetBytesProcessed(state.iterations() * 3 * layer.index.num_clusters() * (64 + 10));
}

BENCHMARK(score)->ArgName("group")->Arg(1)->Arg(3)->Arg(4)->Arg(8);

}  // namespace
}  // namespace tactic::bench
