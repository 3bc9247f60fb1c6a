#include "baseline_run.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace tactic::tool {

namespace {

RowsView rows_of(const tactic_rows& r) {
  return {r.data,        static_cast<DType>(r.dtype), r.token_stride_bytes, r.head_stride_bytes, r.page_table,
          r.page_tokens, r.page_stride_bytes};
}

// Whether the query sees rows [0, position) without a gap, as a layer with a window does not in a longer context.
bool sees_all(const tactic_query& query) {
  for (int64_t row = 0; query.visible != nullptr && row < query.position; ++row) {
    if ((query.visible[row / 64] >> (row % 64) & 1) == 0) return false;
  }
  return true;
}

KvView visible_rows(const tactic_query& query) {
  if (query.bias != nullptr) throw CommandError("baselines need a mask without bias");
  const tactic_kv& kv = query.kv;
  return {rows_of(kv.k), rows_of(kv.v), kv.num_kv_heads, kv.head_dim, kv.v_head_dim, query.position};
}

}  // namespace

HostDecoder::HostDecoder(Host& host) : host_(host) { host_.set_decoder(&HostDecoder::call, this); }
HostDecoder::~HostDecoder() { host_.set_decoder(nullptr, nullptr); }

void HostDecoder::rethrow() {
  if (error_ != nullptr) std::rethrow_exception(std::exchange(error_, nullptr));
}

int HostDecoder::call(void* self, const tactic_query* query, tactic_step_stats* stats) {
  auto* decoder = static_cast<HostDecoder*>(self);
  try {
    return decoder->error_ == nullptr && decoder->answer(*query, *stats) ? 0 : 1;
  } catch (...) {
    decoder->error_ = std::current_exception();
    return 1;
  }
}

QueryRecorder::QueryRecorder(Host& host)
    : HostDecoder(host), queries_(static_cast<size_t>(llama_model_n_layer(host.model()))) {}

bool QueryRecorder::answer(const tactic_query& query, tactic_step_stats&) {
  PromptLayer& layer = queries_.at(static_cast<size_t>(query.layer));
  layer.sees_all = sees_all(query);
  for (int32_t h = 0; h < query.num_q_heads; ++h) {
    const float* q = query.q + h * query.q_head_stride;
    layer.q.insert(layer.q.end(), q, q + query.kv.head_dim);
  }
  return false;
}

BaselineDecoder::BaselineDecoder(Host& host, const eval::BaselineSpec& spec, const PromptQueries& prompt,
                                 int64_t prompt_len, uint64_t seed)
    : HostDecoder(host), spec_(spec), prompt_(prompt), prompt_len_(prompt_len), seed_(seed), layers_(prompt.size()) {}

BaselineDecoder::LayerState& BaselineDecoder::prepare(const tactic_query& query, const KvView& kv) {
  LayerState& layer = layers_.at(static_cast<size_t>(query.layer));
  layer.rows.extend(kv);
  if (layer.baseline == nullptr) {
    const auto answered = [](const PromptLayer& l) { return l.sees_all; };
    const auto here = prompt_.begin() + query.layer;
    layer.baseline = eval::make_baseline(
        spec_, {.rows = &layer.rows,
                .kv = kv,
                .prompt_len = prompt_len_,
                .num_q_heads = query.num_q_heads,
                .sm_scale = query.sm_scale,
                .prompt_q = here->q,
                .layer = static_cast<int32_t>(std::count_if(prompt_.begin(), here, answered)),
                .num_layers = static_cast<int32_t>(std::count_if(prompt_.begin(), prompt_.end(), answered)),
                .seed = seed_});
  }
  return layer;
}

bool BaselineDecoder::answer(const tactic_query& query, tactic_step_stats& stats) {
  if (!sees_all(query)) return false;
  const KvView kv = visible_rows(query);
  LayerState& layer = prepare(query, kv);
  const eval::Rows& rows = layer.rows;
  const eval::Step step(rows, query.q, query.q_head_stride, query.num_q_heads, query.sm_scale, kv.kv_len);
  eval::Choice choice;
  layer.baseline->select(step, choice);
  std::vector<float> out(static_cast<size_t>(query.num_q_heads * kv.v_head_dim));
  eval::attend(step, choice, out.data());
  for (int32_t h = 0; h < query.num_q_heads; ++h) {
    std::copy_n(out.data() + h * kv.v_head_dim, kv.v_head_dim, query.out + h * query.out_head_stride);
  }
  if (query.position % 4 == 0) add_errors(step, out);
  const int64_t row_bytes = rows.k_bytes() + rows.v_bytes();
  stats.kv_len = kv.kv_len;
  stats.tokens_sampled = choice.sampled();
  stats.tokens_certain = choice.tokens() - stats.tokens_sampled;
  stats.index_bytes = choice.summary_bytes;
  stats.kv_bytes = choice.bytes(rows) - choice.summary_bytes;
  stats.kv_bytes_present = kv.kv_len * kv.num_kv_heads * row_bytes;
  totals_.queries += 1;
  totals_.sparse_queries += 1;
  totals_.kv_heads += kv.num_kv_heads;
  totals_.tokens_certain += stats.tokens_certain;
  totals_.tokens_sampled += stats.tokens_sampled;
  totals_.index_bytes += stats.index_bytes;
  totals_.kv_bytes += stats.kv_bytes;
  totals_.kv_bytes_present += stats.kv_bytes_present;
  return true;
}

void BaselineDecoder::add_errors(const eval::Step& step, const std::vector<float>& out) {
  std::vector<float> exact(out.size());
  eval::attend_dense(step, exact.data());
  const size_t dim = out.size() / static_cast<size_t>(step.num_q_heads());
  for (size_t begin = 0; begin < out.size(); begin += dim) {
    double difference = 0, norm = 0;
    for (size_t i = begin; i < begin + dim; ++i) {
      difference += std::pow(static_cast<double>(out[i]) - exact[i], 2);
      norm += std::pow(static_cast<double>(exact[i]), 2);
    }
    error_sum_ += norm > 0 ? std::sqrt(difference / norm) : 0;
    errors_ += 1;
  }
}

}  // namespace tactic::tool
