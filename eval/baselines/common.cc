#include "baselines/common.h"

#include <algorithm>
#include <numeric>

#include "core/random.h"
#include "cpu/steps.h"

namespace tactic::eval {

namespace {

void set_means(const Layer& layer, int32_t kv_head, Clusters& clusters) {
  const auto dim = static_cast<size_t>(layer.rows->head_dim());
  clusters.head_dim = layer.rows->head_dim();
  clusters.centroids.assign(clusters.members.size() * dim, 0.0f);
  for (size_t c = 0; c < clusters.members.size(); ++c) {
    for (const int32_t row : clusters.members[c]) {
      const float* key = layer.rows->k(kv_head, row);
      for (size_t d = 0; d < dim; ++d)
        clusters.centroids[c * dim + d] += key[d] / static_cast<float>(clusters.members[c].size());
    }
  }
}

}  // namespace

Range open_rows(const BaselineSpec& spec, int64_t kv_len) {
  const int64_t end = std::max<int64_t>(0, kv_len - spec.count("recent"));
  return {std::min(spec.count("sinks"), end), end};
}

Range prompt_rows(const BaselineSpec& spec, const Layer& layer) { return open_rows(spec, layer.prompt_len); }

Marks::Marks(const Step& step, Range open) {
  marked_.assign(static_cast<size_t>(step.rows().num_kv_heads()),
                 std::vector<uint8_t>(static_cast<size_t>(step.kv_len()), 1));
  for (std::vector<uint8_t>& head : marked_)
    std::fill(head.begin() + open.begin, head.begin() + std::min(open.end, step.kv_len()), uint8_t{0});
}

void Marks::write(Choice& out) const {
  out = {};
  out.selection.heads.resize(marked_.size());
  for (size_t head = 0; head < marked_.size(); ++head) {
    HeadSelection& selection = out.selection.heads[head];
    for (size_t row = 0; row < marked_[head].size(); ++row) {
      if (marked_[head][row] != 0) selection.tokens.push_back(static_cast<int32_t>(row));
    }
    selection.log_weights.assign(selection.tokens.size(), 0.0f);
    selection.clusters.assign(selection.tokens.size(), -1);
    selection.num_certain = static_cast<int64_t>(selection.tokens.size());
  }
}

std::vector<int32_t> largest(std::span<const float> values, int64_t count) {
  std::vector<int32_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  const auto end = order.begin() + std::min<int64_t>(std::max<int64_t>(count, 0), static_cast<int64_t>(order.size()));
  std::partial_sort(order.begin(), end, order.end(), [&](int32_t a, int32_t b) {
    const float x = values[static_cast<size_t>(a)], y = values[static_cast<size_t>(b)];
    return x > y || (x == y && a < b);
  });
  order.erase(end, order.end());
  return order;
}

std::vector<float> Clusters::dots(const float* q) const {
  std::vector<float> result;
  for (int64_t c = 0; c < size(); ++c) result.push_back(dot(q, centroids.data() + c * head_dim, head_dim));
  return result;
}

Clusters cluster_keys(const Layer& layer, int32_t kv_head, Range range, int64_t cluster_tokens, int32_t iterations,
                      int64_t segment) {
  const ClusterCache::Key key = {kv_head, range.begin, range.end, cluster_tokens, iterations, segment};
  if (layer.clusterings != nullptr && layer.clusterings->found.contains(key)) return layer.clusterings->found.at(key);
  Clusters clusters;
  for (int64_t begin = range.begin; begin < range.end; begin += segment) {
    ClusterTask task;
    task.kv = layer.kv;
    task.head = kv_head;
    task.row_begin = begin;
    task.num_rows = static_cast<int32_t>(std::min(segment, range.end - begin));
    task.num_clusters = static_cast<int32_t>((task.num_rows + cluster_tokens - 1) / cluster_tokens);
    task.iterations = iterations;
    task.seed =
        hash64(layer.seed + static_cast<uint64_t>(begin) * 0x9E3779B97F4A7C15u + static_cast<uint64_t>(kv_head));
    HeadClusters found;
    cpu::cluster(task, 1, found);
    size_t next = 0;
    for (int32_t c = 0; c < task.num_clusters; ++c) {
      std::vector<int32_t> members;
      for (uint16_t i = 0; i < found.sizes[static_cast<size_t>(c)]; ++i)
        members.push_back(static_cast<int32_t>(begin + found.members[next++]));
      if (!members.empty()) clusters.members.push_back(std::move(members));
    }
    // Rows that cannot be clustered (not finite) stand alone.
    for (const uint16_t row : found.not_finite) clusters.members.push_back({static_cast<int32_t>(begin + row)});
  }
  set_means(layer, kv_head, clusters);
  if (layer.clusterings != nullptr) layer.clusterings->found[key] = clusters;
  return clusters;
}

Clusters cluster_positions(const Layer& layer, int32_t kv_head, Range range, int64_t cluster_tokens) {
  Clusters clusters;
  for (int64_t begin = range.begin; begin < range.end; begin += cluster_tokens) {
    std::vector<int32_t> members(static_cast<size_t>(std::min(cluster_tokens, range.end - begin)));
    std::iota(members.begin(), members.end(), static_cast<int32_t>(begin));
    clusters.members.push_back(std::move(members));
  }
  set_means(layer, kv_head, clusters);
  return clusters;
}

}  // namespace tactic::eval
