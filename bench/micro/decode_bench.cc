// A whole decode step of one layer: score, select, attend, learn. Layers take turns, so that their rows come from
// memory.
#include <benchmark/benchmark.h>

#include "support.h"
#include "tactic/attention.h"

namespace tactic::bench {
namespace {

constexpr int32_t kLayers = 30, kHeads = 3, kGroup = 3, kDim = 64;
constexpr int64_t kLen = 7168;

struct Model {
  Cache cache{kLayers, kHeads, kDim, kLen};
  std::vector<KvIndex> indexes;

  Model() {
    for (size_t layer = 0; layer < kLayers; ++layer) {
      indexes.emplace_back(IndexOptions{}, KvShape{kHeads, kDim, kDim});
      indexes.back().write(0, kLen);
      indexes.back().maintain(cache.view(layer));
    }
  }
};

// Arguments: threads, a thousandth of the target error (0: dense).
void decode(benchmark::State& state) {
  static Model model;
  const size_t num_queries = 64;
  const std::vector<float> q = random_queries(num_queries * kHeads * kGroup, kDim, 5);
  std::vector<float> out(static_cast<size_t>(kHeads * kGroup * kDim));
  DecodeOptions options;
  options.select = state.range(1) == 0 ? Select::kDense : Select::kSample;
  if (state.range(1) != 0) options.target_error = static_cast<float>(state.range(1)) / 1000;
  Attention attention;
  attention.set_options(options);
  attention.set_num_threads(static_cast<int32_t>(state.range(0)));
  for (KvIndex& index : model.indexes) index.forget_learned();
  StepStats stats;
  int64_t step = 0;
  double tokens = 0;
  for (auto _ : state) {
    const auto layer = static_cast<size_t>(step % kLayers);
    DecodeQuery query;
    query.q = q.data() + static_cast<size_t>(step / kLayers % num_queries) * kHeads * kGroup * kDim;
    query.q_head_stride = kDim;
    query.num_q_heads = kHeads * kGroup;
    query.sm_scale = 1;
    query.kv = model.cache.view(layer);
    query.index = &model.indexes[layer];
    query.position = kLen + step / kLayers;
    query.layer = static_cast<int32_t>(layer);
    query.out = out.data();
    query.out_head_stride = kDim;
    attention.run({&query, 1}, &stats);
    tokens += static_cast<double>(stats.tokens_certain + stats.tokens_sampled) / kHeads;
    ++step;
  }
  state.counters["tokens"] = tokens / static_cast<double>(step);
}

BENCHMARK(decode)->ArgNames({"threads", "error_1000"})->ArgsProduct({{1, 2}, {0, 25, 60}})->UseRealTime();

}  // namespace
}  // namespace tactic::bench
