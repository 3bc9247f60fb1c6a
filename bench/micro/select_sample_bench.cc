// select_sample and draw: one KV head at 8K.
#include <benchmark/benchmark.h>

#include "cpu/steps.h"
#include "support.h"

namespace tactic::bench {
namespace {

void select_sample(benchmark::State& state) {
  const int32_t group = 3;
  IndexedLayer layer(1, 64, 8192, group);
  const std::vector<float> q = random_queries(group, 64, 3);
  cpu::score(layer.index.state(), 0, layer.filter, q.data(), group, 0, layer.scores.num_clusters, layer.scores);
  const float norms[group] = {1, 1, 1};
  const SoftmaxState exact[group] = {{0, 1}, {0, 1}, {0, 1}};
  SelectParams params;
  params.group_size = group;
  params.q_norms2 = norms;
  params.exact = exact;
  params.beta = 0.75f;
  DecodeOptions options;
  options.target_error = 0.01f;
  Inclusion inclusion;
  HeadSelection selection;
  Undrawn undrawn;
  for (auto _ : state) {
    cpu::select_sample(layer.scores, params, options, inclusion);
    if (state.range(0) != 0)
      cpu::draw(layer.index.state(), 0, layer.filter, layer.scores, inclusion, 0.5, selection, undrawn);
  }
  state.counters["tokens"] = static_cast<double>(selection.tokens.size());
}

BENCHMARK(select_sample)->ArgName("with_draw")->Arg(0)->Arg(1);

}  // namespace
}  // namespace tactic::bench
