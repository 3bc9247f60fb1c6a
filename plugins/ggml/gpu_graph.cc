#include "gpu_graph.h"

#include <algorithm>

#include "passages.h"

namespace tactic::plugin {

namespace {

constexpr int32_t kMaxGroup = 8;    // query heads that share a KV head, of the kernels
constexpr int32_t kMaxLonger = 64;  // rows after which a text counts as another

bool is_view(const ggml_tensor* node) {
  switch (node->op) {
    case GGML_OP_NONE:
    case GGML_OP_RESHAPE:
    case GGML_OP_VIEW:
    case GGML_OP_PERMUTE:
    case GGML_OP_TRANSPOSE: return true;
    default: return false;
  }
}

bool has_kernels(const AttentionMatch& match) {
  const ggml_tensor *q = match.q, *k = match.k, *v = match.v, *mask = match.mask, *out = match.out;
  const int64_t dims[] = {64, 80, 96, 128, 256};
  if (std::find(std::begin(dims), std::end(dims), k->ne[0]) == std::end(dims)) return false;
  if (v->ne[0] != k->ne[0] || v->type != k->type || k->type == GGML_TYPE_F32) return false;
  if (q->ne[2] / k->ne[2] > kMaxGroup) return false;
  // One step's queries and outputs, [streams, heads, head_dim] without gaps.
  const auto head_bytes = static_cast<size_t>(q->ne[0]) * sizeof(float);
  const auto stream_bytes = head_bytes * static_cast<size_t>(q->ne[2]);
  if (q->nb[2] != head_bytes || (q->ne[3] > 1 && q->nb[3] != stream_bytes)) return false;
  if (out->nb[1] != head_bytes || (q->ne[3] > 1 && out->nb[3] != stream_bytes)) return false;
  // Masks are read 16 bytes at a time, before any part of the graph is computed.
  return mask != nullptr && mask->op == GGML_OP_NONE && mask->ne[3] == q->ne[3] && k->ne[1] % 8 == 0 &&
         mask->nb[3] % 16 == 0 && reinterpret_cast<uintptr_t>(mask->data) % 16 == 0;
}

}  // namespace

GpuGraph look_at(ggml_cgraph* graph, const PluginOptions& options) {
  GpuGraph found;
  found.uid = graph->uid;
  std::vector<const ggml_tensor*> writes;  // one row per token, as yet without attention
  const int num_nodes = ggml_graph_n_nodes(graph);
  for (int i = 0; i < num_nodes; ++i) {
    ggml_tensor* node = ggml_graph_node(graph, i);
    found.may_wait = found.may_wait || node->op == GGML_OP_MUL_MAT_ID;
    if (node->op == GGML_OP_SET_ROWS) {
      writes.push_back(node);
    } else if (node->op == GGML_OP_FLASH_ATTN_EXT) {
      const std::optional<AttentionMatch> match = readable_attention(node);
      if (!options.enabled || !match || match->rows() != 1 || match->k->ne[1] < options.min_context) continue;
      if (!has_kernels(*match) || (node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) continue;
      const std::optional<CacheGeometry> cache = cache_geometry(*match);
      if (!cache || cache->cells > INT32_MAX) continue;
      // Both of the cache's writes are this step's rows.
      const auto write_to = [&](const void* memory) {
        return std::find_if(writes.begin(), writes.end(), [&](const ggml_tensor* write) {
          const ggml_tensor *rows = write->src[0], *cells = write->src[1];
          return write->data == memory && rows->ne[1] == match->streams() && rows->ne[2] * rows->ne[3] == 1 &&
                 cells->type == GGML_TYPE_I64 && cells->op == GGML_OP_NONE && ggml_is_contiguous(cells);
        });
      };
      const auto k = write_to(cache->k_cache), v = write_to(cache->v_cache);
      if (k == writes.end() || v == writes.end()) continue;
      const auto number = layer_number(match->k->view_src, found.decode.size());
      found.decode.push_back({i, *match, *cache, (*k)->src[1], number});
      *k = *v = nullptr;
      std::erase(writes, nullptr);
    } else if (node->view_src != nullptr && !is_view(node)) {
      found.rewritten.insert(node->view_src->data);
    }
  }
  for (const ggml_tensor* write : writes)
    found.rewritten.insert(write->view_src != nullptr ? write->view_src->data : write->data);
  return found;
}

GpuPassage::Step GpuPassage::step(int32_t kv_len, uint32_t rows, uint32_t rows_before) {
  const int32_t more = kv_len - kv_len_;
  const bool other_rows = more == 1 && rows_before != rows_;
  const Step step = kv_len_ == 0 || more < 1 || more > kMaxLonger || other_rows ? Step::kBegins
                    : more == 1 && !doubtful_                                   ? Step::kGoesOn
                                                                                : Step::kLonger;
  kv_len_ = kv_len;
  rows_ = rows;
  doubtful_ = false;
  steps_ = step == Step::kBegins ? 1 : steps_ + 1;
  begun_ = step == Step::kBegins ? begun_ + 1 : 0;
  return step;
}

float GpuPassage::tau_factor() const { return first_steps_factor(steps_); }

}  // namespace tactic::plugin
