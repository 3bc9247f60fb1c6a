// A whole decode step of one layer: score, select, attend, learn. Layers take turns, so that their rows come from
// memory.
#include <benchmark/benchmark.h>

#include <memory>

#include "support.h"
#include "tactic/attention.h"

namespace tactic::bench {
namespace {

constexpr int64_t kLen = 7168;

struct Model {
  int32_t heads, group, dim, layers;
  Cache cache;
  std::vector<KvIndex> indexes;

  Model(int32_t num_kv_heads, int32_t group_size, int32_t head_dim)
      : heads(num_kv_heads),
        group(group_size),
        dim(head_dim),
        layers((30 * 3 * 64 + heads * dim - 1) / (heads * dim)),
        cache(layers, heads, dim, kLen) {
    for (int32_t layer = 0; layer < layers; ++layer) {
      indexes.emplace_back(IndexOptions{}, KvShape{heads, dim, dim});
      indexes.back().write(0, kLen);
      indexes.back().maintain(cache.view(static_cast<size_t>(layer)));
    }
  }
};

// Arguments: KV heads, query heads of each, head dimension, threads, a thousandth of the target error (0: dense).
void decode(benchmark::State& state) {
  const auto argument = [&](size_t i) { return static_cast<int32_t>(state.range(i)); };
  static std::unique_ptr<Model> kept;
  if (kept == nullptr || kept->heads != argument(0) || kept->group != argument(1) || kept->dim != argument(2)) {
    kept.reset();
    kept = std::make_unique<Model>(argument(0), argument(1), argument(2));
  }
  Model& model = *kept;
  const int32_t q_heads = model.heads * model.group;
  const size_t num_queries = 64;
  const std::vector<float> q = random_queries(num_queries * static_cast<size_t>(q_heads), model.dim, 5);
  std::vector<float> out(static_cast<size_t>(q_heads * model.dim));
  DecodeOptions options;
  options.select = state.range(4) == 0 ? Select::kDense : Select::kSample;
  if (state.range(4) != 0) options.target_error = static_cast<float>(state.range(4)) / 1000;
  Attention attention;
  attention.set_options(options);
  attention.set_num_threads(argument(3));
  for (KvIndex& index : model.indexes) index.forget_learned();
  StepStats stats;
  int64_t step = 0;
  double tokens = 0;
  for (auto _ : state) {
    const auto layer = static_cast<size_t>(step % model.layers);
    DecodeQuery query;
    query.q =
        q.data() + static_cast<size_t>(step / model.layers % num_queries) * static_cast<size_t>(q_heads * model.dim);
    query.q_head_stride = model.dim;
    query.num_q_heads = q_heads;
    query.sm_scale = 1;
    query.kv = model.cache.view(layer);
    query.index = &model.indexes[layer];
    query.position = kLen + step / model.layers;
    query.layer = static_cast<int32_t>(layer);
    query.out = out.data();
    query.out_head_stride = model.dim;
    attention.run({&query, 1}, &stats);
    tokens += static_cast<double>(stats.tokens_certain + stats.tokens_sampled) / model.heads;
    ++step;
  }
  state.counters["tokens"] = tokens / static_cast<double>(step);
}

BENCHMARK(decode)
    ->ArgNames({"kv_heads", "group", "head_dim", "threads", "error_1000"})
    ->ArgsProduct({{3}, {3}, {64}, {1, 2}, {0, 25, 60}})   // SmolLM2-135M
    ->ArgsProduct({{2}, {7}, {64}, {1, 2}, {0, 25, 60}})   // Qwen2.5-0.5B
    ->ArgsProduct({{8}, {4}, {128}, {1, 2}, {0, 25, 60}})  // Llama-3.1-8B
    ->ArgsProduct({{1}, {4}, {256}, {1, 2}, {0, 25, 60}})  // Gemma-3-270M
    ->UseRealTime();

}  // namespace
}  // namespace tactic::bench
