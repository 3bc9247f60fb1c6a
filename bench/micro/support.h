// Rows, queries and indexes for the micro benchmarks: keys in topics, so that clusters mean something.
#pragma once

#include <omp.h>

#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "core/index_state.h"
#include "core/steps.h"
#include "tactic/kv_index.h"

namespace tactic::bench {

struct AlignedFree {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<std::byte[], AlignedFree>;

inline Buffer aligned_buffer(size_t bytes) {
  return Buffer(static_cast<std::byte*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096)));
}

/// A token-major f16 cache of several layers, larger than the last-level cache when layers are many.
struct Cache {
  int32_t num_kv_heads, head_dim;
  int64_t kv_len;
  std::vector<Buffer> k, v;

  Cache(int32_t layers, int32_t heads, int32_t dim, int64_t len) : num_kv_heads(heads), head_dim(dim), kv_len(len) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> topics(static_cast<size_t>(64 * dim));
    for (float& x : topics) x = 1.5f * normal(random);
    std::vector<float> noise(1 << 16);
    for (float& x : noise) x = normal(random);
    const size_t row_elements = static_cast<size_t>(heads) * static_cast<size_t>(dim);
    for (int32_t layer = 0; layer < layers; ++layer) {
      k.push_back(aligned_buffer(static_cast<size_t>(len) * row_elements * 2));
      v.push_back(aligned_buffer(static_cast<size_t>(len) * row_elements * 2));
      auto* keys = reinterpret_cast<_Float16*>(k.back().get());
      auto* values = reinterpret_cast<_Float16*>(v.back().get());
      size_t topic = 0;
      for (int64_t t = 0; t < len; ++t) {
        if (random() % 8 == 0) topic = random() % 64;
        for (size_t i = 0; i < row_elements; ++i) {
          const size_t at = random() % noise.size();
          keys[static_cast<size_t>(t) * row_elements + i] = static_cast<_Float16>(
              topics[topic * static_cast<size_t>(dim) + i % static_cast<size_t>(dim)] + 0.6f * noise[at]);
          values[static_cast<size_t>(t) * row_elements + i] = static_cast<_Float16>(noise[(at * 7) % noise.size()]);
        }
      }
    }
  }

  KvView view(size_t layer) const {
    KvView kv;
    kv.num_kv_heads = num_kv_heads;
    kv.head_dim = kv.v_head_dim = head_dim;
    kv.kv_len = kv_len;
    const int64_t head_bytes = head_dim * 2;
    kv.k = {k[layer].get(), DType::kF16, head_bytes * num_kv_heads, head_bytes};
    kv.v = {v[layer].get(), DType::kF16, head_bytes * num_kv_heads, head_bytes};
    return kv;
  }
};

inline std::vector<float> random_queries(int32_t rows, int32_t dim, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, 0.15f);
  std::vector<float> q(static_cast<size_t>(rows) * static_cast<size_t>(dim));
  for (float& x : q) x = normal(random);
  return q;
}

/// Every row of one layer in an index, and room for its scores against `group` queries.
struct IndexedLayer {
  Cache cache;
  KvIndex index;
  RowFilter filter;
  ClusterScores scores;

  IndexedLayer(int32_t heads, int32_t dim, int64_t len, int32_t group)
      : cache(1, heads, dim, len), index({}, {heads, dim, dim}) {
    index.write(0, len);
    index.maintain(cache.view(0));
    filter = {nullptr, len, &index.state().indexed};
    scores.num_clusters = index.state().total_clusters();
    scores.dots.resize(static_cast<size_t>(group * scores.num_clusters));
    scores.spreads.resize(static_cast<size_t>(scores.num_clusters));
    scores.sizes.resize(static_cast<size_t>(scores.num_clusters));
  }
};

}  // namespace tactic::bench
