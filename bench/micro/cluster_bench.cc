// cluster: one segment of one KV head.
#include <benchmark/benchmark.h>

#include "cpu/steps.h"
#include "support.h"

namespace tactic::bench {
namespace {

void cluster(benchmark::State& state) {
  const Cache cache(1, 1, 64, 2048);
  ClusterTask task;
  task.kv = cache.view(0);
  task.num_rows = static_cast<int32_t>(state.range(1));
  task.num_clusters = static_cast<int32_t>(state.range(1) / state.range(2));
  task.iterations = 4;
  HeadClusters out;
  for (auto _ : state) cpu::cluster(task, static_cast<int32_t>(state.range(0)), out);
  const double flops = 2.0 * task.num_rows * task.num_clusters * 64 * (task.iterations + 1);
  state.counters["GFLOP/s"] =
      benchmark::Counter(flops, benchmark::Counter::kIsIterationInvariantRate, benchmark::Counter::kIs1000);
}

BENCHMARK(cluster)
    ->ArgNames({"threads", "rows", "cluster_tokens"})
    ->Args({1, 2048, 16})
    ->Args({2, 2048, 16})
    ->Args({1, 256, 4})
    ->UseRealTime();

}  // namespace
}  // namespace tactic::bench
