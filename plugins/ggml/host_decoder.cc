#include "host_decoder.h"

namespace tactic::plugin {

namespace {

tactic_rows rows_of(const RowsView& rows) {
  return {rows.data,
          static_cast<tactic_dtype>(rows.dtype),
          rows.token_stride_bytes,
          rows.head_stride_bytes,
          rows.page_table,
          rows.page_tokens,
          rows.page_stride_bytes,
          rows.num_pages};
}

tactic_query query_of(const DecodeQuery& q) {
  return {sizeof(tactic_query),
          q.q,
          q.q_head_stride,
          q.num_q_heads,
          q.sm_scale,
          {rows_of(q.kv.k), rows_of(q.kv.v), q.kv.num_kv_heads, q.kv.head_dim, q.kv.v_head_dim, q.kv.kv_len},
          nullptr,
          q.visible,
          q.bias,
          q.stream_id,
          q.layer,
          q.position,
          q.out,
          q.out_head_stride,
          q.lse,
          nullptr,
          0,
          1,
          nullptr};
}

StepStats stats_of(const tactic_step_stats& s, int32_t num_kv_heads) {
  return {.kv_len = s.kv_len,
          .num_kv_heads = num_kv_heads,
          .tokens_certain = s.tokens_certain,
          .tokens_sampled = s.tokens_sampled,
          .tokens_value = s.tokens_certain + s.tokens_sampled,
          .refined_clusters = s.refined_clusters,
          .index_bytes = s.index_bytes,
          .kv_bytes = s.kv_bytes,
          .kv_bytes_present = s.kv_bytes_present,
          .estimated_mass = s.estimated_mass,
          .mass_std_error = s.mass_std_error,
          .dense = static_cast<DenseReason>(s.dense)};
}

}  // namespace

void HostDecoder::set(tactic_decode_fn decode, void* user) {
  const std::lock_guard lock(mutex_);
  decode_ = decode;
  user_ = user;
}

bool HostDecoder::is_set() const {
  const std::lock_guard lock(mutex_);
  return decode_ != nullptr;
}

bool HostDecoder::answer(std::span<const DecodeQuery> queries, StepStats* stats) const {
  tactic_decode_fn decode = nullptr;
  void* user = nullptr;
  {
    const std::lock_guard lock(mutex_);
    decode = decode_;
    user = user_;
  }
  if (decode == nullptr) return false;
  for (size_t i = 0; i < queries.size(); ++i) {
    const tactic_query query = query_of(queries[i]);
    tactic_step_stats filled = {};
    if (decode(user, &query, &filled) != 0) return false;
    stats[i] = stats_of(filled, queries[i].kv.num_kv_heads);
  }
  return true;
}

}  // namespace tactic::plugin
