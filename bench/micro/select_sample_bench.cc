// select_sample and draw: one KV head at 8K.
#include <benchmark/benchmark.h>

#include "cpu/steps.h"
#include "support.h"

namespace tactic::bench {
namespace {

void select_sample(benchmark::State& state) {
  const int32_t group = 3;
  const Cache cache(1, 1, 64, 8192);
  KvIndex index({}, {1, 64, 64});
  index.write(0, 8192);
  index.maintain(cache.view(0));
  const std::vector<float> q = random_queries(group, 64, 3);
  const RowFilter filter{nullptr, 8192, &index.state().indexed};
  ClusterScores scores;
  scores.num_clusters = index.state().total_clusters();
  scores.dots.resize(static_cast<size_t>(group * scores.num_clusters));
  scores.spreads.resize(static_cast<size_t>(scores.num_clusters));
  scores.sizes.resize(static_cast<size_t>(scores.num_clusters));
  cpu::score(index.state(), 0, filter, q.data(), group, 0, scores.num_clusters, scores);
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
  for (auto _ : state) {
    cpu::select_sample(scores, params, options, inclusion);
    if (state.range(0) != 0) cpu::draw(index.state(), 0, filter, scores, inclusion, 0.5, selection);
  }
  state.counters["tokens"] = static_cast<double>(selection.tokens.size());
}

BENCHMARK(select_sample)->ArgName("with_draw")->Arg(0)->Arg(1);

}  // namespace
}  // namespace tactic::bench
