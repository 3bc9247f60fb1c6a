// score: all clusters of one KV head at 8K, index in cache or not.
#include <benchmark/benchmark.h>

#include "cpu/steps.h"
#include "support.h"

namespace tactic::bench {
namespace {

void score(benchmark::State& state) {
  const auto group = static_cast<int32_t>(state.range(0));
  const Cache cache(1, 3, 64, 8192);
  KvIndex index({}, {3, 64, 64});
  index.write(0, 8192);
  index.maintain(cache.view(0));
  const std::vector<float> q = random_queries(group, 64, 3);
  const RowFilter filter{nullptr, 8192, &index.state().indexed};
  ClusterScores scores;
  scores.num_clusters = index.state().total_clusters();
  scores.dots.resize(static_cast<size_t>(group * scores.num_clusters));
  scores.spreads.resize(static_cast<size_t>(scores.num_clusters));
  scores.sizes.resize(static_cast<size_t>(scores.num_clusters));
  for (auto _ : state) {
    for (int32_t head = 0; head < 3; ++head) cpu::score(index.state(), head, filter, q.data(), group, 0, scores.num_clusters, scores);
  }
  state.SetBytesProcessed(state.iterations() * 3 * index.num_clusters() * (64 + 10));
}

BENCHMARK(score)->ArgName("group")->Arg(1)->Arg(3)->Arg(4)->Arg(8);

}  // namespace
}  // namespace tactic::bench
