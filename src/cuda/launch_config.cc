#include "cuda/launch_config.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <string>
#include <tuple>

#include "core/check.h"
#include "core/index_state.h"
#include "cuda/segments.h"
#include "tactic/error.h"

namespace tactic::cuda {

namespace {

[[noreturn]] void fail(const char* name, int64_t value, const std::string& limit) {
  throw Error(std::string(name) + " (" + std::to_string(value) + ") must be " + limit);
}

void in_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) fail(name, value, "in " + std::to_string(low) + ".." + std::to_string(high));
}

#ifdef TACTIC_CUDA_FEW
constexpr DType kTypes[] = {DType::kF16, DType::kBF16, DType::kF8E4M3};
constexpr int32_t kDims[] = {64, 128};
#else
constexpr DType kTypes[] = {DType::kF16, DType::kBF16, DType::kF8E4M3, DType::kQ8_0, DType::kQ4_0};
constexpr int32_t kDims[] = {64, 80, 96, 128, 256};
#endif

// "a, b or c"
template <class Values, class Name>
std::string list_of(const Values& values, Name name) {
  std::string text;
  const size_t n = std::size(values);
  for (size_t i = 0; i < n; ++i) text += (i == 0 ? "" : i + 1 < n ? ", " : " or ") + std::string(name(values[i]));
  return text;
}

void check_dim(int32_t head_dim) {
  if (std::count(std::begin(kDims), std::end(kDims), head_dim) == 0)
    fail("head_dim", head_dim, list_of(kDims, [](int32_t dim) { return std::to_string(dim); }));
}

int32_t padded_count(int32_t rows, int32_t cluster_tokens) {
  return padded_clusters(std::max(1, (rows + cluster_tokens - 1) / cluster_tokens));
}

}  // namespace

bool is_compiled(DType dtype, int32_t head_dim) {
  return std::count(std::begin(kTypes), std::end(kTypes), dtype) > 0 &&
         std::count(std::begin(kDims), std::end(kDims), head_dim) > 0;
}

IndexGeometry index_geometry(const IndexOptions& options, const KvShape& shape, int32_t max_rows) {
  validate(options);
  check_dim(shape.head_dim);
  if (shape.v_head_dim != shape.head_dim)
    fail("v_head_dim", shape.v_head_dim, "head_dim (" + std::to_string(shape.head_dim) + ")");
  in_range("num_kv_heads", shape.num_kv_heads, 1, 65535);
  in_range("max_rows", max_rows, 1, 1 << 30);
  if (options.clustering != Clustering::kIncremental) throw Error("clustering=whole is not available on CUDA");
  in_range("sink_tokens", options.sink_tokens, 0, options.provisional_tokens);
  IndexGeometry g;
  g.segment_tokens = options.segment_tokens;
  g.provisional_tokens = options.provisional_tokens;
  g.full_clusters =
      padded_count(options.segment_tokens, resolved(options, shape.head_dim, shape.v_head_dim).cluster_tokens);
  g.provisional_clusters = padded_count(options.provisional_tokens, options.provisional_cluster_tokens);
  g.max_segments = (max_rows + options.segment_tokens - 1) / options.segment_tokens;
  const int32_t provisional = options.segment_tokens / options.provisional_tokens;
  g.all_segments = g.max_segments + provisional;
  g.provisional_begin = g.max_segments * g.full_clusters;
  g.max_clusters = g.provisional_begin + provisional * g.provisional_clusters;
  g.max_rows = g.max_segments * options.segment_tokens;
  g.sink_tokens = options.sink_tokens;
  g.outlier_fraction = options.outlier_fraction;
  g.code_bytes = (shape.head_dim + 63) / 64 * 64;
  return g;
}

SequenceState state_at(const IndexGeometry& geometry, int64_t rows) {
  SequenceState state;
  state.full_segments = static_cast<int32_t>(rows / geometry.segment_tokens);
  state.provisional_segments = static_cast<int32_t>(rows % geometry.segment_tokens / geometry.provisional_tokens);
  return state;
}

SequenceState uploaded_state(const KvIndex& index, const IndexOptions& options, const KvShape& shape,
                             const IndexGeometry& geometry) {
  if (!(index.options() == resolved(options, shape.head_dim, shape.v_head_dim)))
    throw Error("the index was made with other options");
  const KvShape& has = index.shape();
  for (const auto& [name, value, limit] : {std::tuple{"num_kv_heads", has.num_kv_heads, shape.num_kv_heads},
                                           {"head_dim", has.head_dim, shape.head_dim},
                                           {"v_head_dim", has.v_head_dim, shape.v_head_dim}}) {
    if (value != limit) fail(name, value, "the device index's " + std::to_string(limit));
  }
  SequenceState state;
  int64_t next_row = 0;
  for (const Segment& segment : index.state().segments) {
    const int64_t end = next_row + segment.num_rows;
    const bool has_room = segment.provisional
                              ? state.provisional_segments < geometry.all_segments - geometry.max_segments
                              : state.provisional_segments == 0 && state.full_segments < geometry.max_segments;
    if (segment.row_begin != next_row || !has_room || end > geometry.max_rows) {
      throw Error("segment at row " + std::to_string(segment.row_begin) + " must follow the last and lie below " +
                  std::to_string(geometry.max_rows) + ", full ones before at most " +
                  std::to_string(geometry.all_segments - geometry.max_segments) + " provisional ones");
    }
    if (index.state().indexed.count_range(next_row + segment.num_sinks, end) < segment.num_rows - segment.num_sinks)
      break;
    next_row = end;
    ++(segment.provisional ? state.provisional_segments : state.full_segments);
  }
  return state;
}

size_t table_bytes(int32_t own_clusters, int32_t own_segments, int32_t heads) {
  const auto clusters = static_cast<size_t>(own_clusters), segments = static_cast<size_t>(own_segments),
             h = static_cast<size_t>(heads);
  const size_t bytes =
      (clusters + kTablePadding) * h * 4 + clusters * (8 + 3 * 4) + (clusters / 32 + 1) * 2 * 4 + (segments + 1) * 4;
  return (bytes + 127) / 128 * 128;
}

DecodeConfig decode_config(const DeviceFacts& device, const IndexGeometry& geometry, int32_t num_sequences,
                           int32_t num_kv_heads, int32_t head_dim, int32_t group_size) {
  DecodeConfig config;
  const int64_t pairs = int64_t{num_sequences} * num_kv_heads;
  for (int32_t splits = kMaxSplits; splits > 1 && config.splits == 1; --splits) {
    if (device.has_clusters && device.clusters_of[splits] >= pairs) config.splits = splits;
  }
  // Block 0 owns most: of the full segments, and, when their number is a multiple of the splits, of the provisional
  // ones too.
  const int32_t provisional = geometry.all_segments - geometry.max_segments;
  const auto share = [&](int32_t n) { return (n + config.splits - 1) / config.splits; };
  config.own_clusters =
      share(geometry.max_segments) * geometry.full_clusters + share(provisional) * geometry.provisional_clusters;
  in_range("clusters of one block of a step", config.own_clusters, 0, kMaxOwnClusters);
  config.own_segments = share(geometry.max_segments) + share(provisional);
  const int32_t heads = head_bucket(group_size);
  const size_t tables = table_bytes(config.own_clusters, config.own_segments, heads);
  const auto fits = [&](int32_t stages, size_t more) {
    return fixed_bytes(head_dim, heads, stages) + more <= device.shared_bytes_per_block;
  };
  const size_t in_shared = fits(1, tables) ? tables : 0;
  while (config.stages > 1 && !fits(config.stages, in_shared)) --config.stages;
  config.shared_bytes = fixed_bytes(head_dim, heads, config.stages) + in_shared;
  config.block_workspace_bytes = tables - in_shared;
  return config;
}

int32_t dense_splits(const DeviceFacts& device, int32_t num_sequences, int32_t num_kv_heads, int64_t max_rows) {
  const int64_t pairs = int64_t{num_sequences} * num_kv_heads;
  const int64_t by_device = std::max<int64_t>(1, device.num_sms / pairs),
                by_rows = std::max<int64_t>(1, max_rows / (16 * kWarps * 4));
  return static_cast<int32_t>(std::min({by_device, by_rows, int64_t{256}}));
}

size_t lay_out_rank(RankParams& params, const IndexGeometry& g, const DecodeLimits& limits, std::byte* memory) {
  const auto pairs = static_cast<size_t>(limits.max_sequences) * static_cast<size_t>(limits.num_kv_heads),
             heads = static_cast<size_t>(limits.max_sequences) * static_cast<size_t>(limits.num_q_heads),
             clusters = static_cast<size_t>(g.max_clusters);
  in_range("max_sequences * num_kv_heads of fit and topk", static_cast<int64_t>(pairs), 1, 65535);
  params.max_rows = g.max_rows;
  params.max_probes = std::max(256, g.max_rows / 50 + 2 * (g.max_rows / 100) + 32);
  size_t at = 0;
  params.dots = take<float>(memory, at, heads * clusters);
  params.places = take<uint32_t>(memory, at, pairs * clusters);
  params.entries = take<uint64_t>(memory, at, heads * clusters);
  params.order = take<int32_t>(memory, at, heads * clusters);
  params.before = take<int32_t>(memory, at, heads * clusters);
  params.totals = take<OrderTotals>(memory, at, heads);
  params.taken = take<int32_t>(memory, at, pairs * clusters);
  params.probes = take<float>(memory, at, heads * static_cast<size_t>(params.max_probes));
  params.rows = take<int32_t>(memory, at, pairs * static_cast<size_t>(params.max_rows));
  params.counts = take<int32_t>(memory, at, pairs);
  params.probed = take<int32_t>(memory, at, pairs);
  params.exact_counts = take<int32_t>(memory, at, pairs);
  params.changed = take<int32_t>(memory, at, pairs);
  return at;
}

void validate(const DecodeLimits& limits) {
  in_range("max_sequences", limits.max_sequences, 1, 1 << 16);
  in_range("num_kv_heads", limits.num_kv_heads, 1, 65535);
  in_range("num_q_heads", limits.num_q_heads, 1, 65535 * kMaxGroup);
  if (limits.num_q_heads % limits.num_kv_heads != 0) {
    fail("num_q_heads", limits.num_q_heads, "a multiple of num_kv_heads (" + std::to_string(limits.num_kv_heads) + ")");
  }
  in_range("num_q_heads / num_kv_heads", limits.num_q_heads / limits.num_kv_heads, 1, kMaxGroup);
  check_dim(limits.head_dim);
  in_range("max_rows", limits.max_rows, 1, 1 << 30);
}

void validate(const DecodeBatch& batch, const DecodeLimits& limits) {
  in_range("num_sequences", batch.num_sequences, 1, limits.max_sequences);
  const auto equal = [](const char* name, int64_t value, int64_t limit) {
    if (value != limit) fail(name, value, "the limits' " + std::to_string(limit));
  };
  equal("num_q_heads", batch.num_q_heads, limits.num_q_heads);
  equal("num_kv_heads", batch.num_kv_heads, limits.num_kv_heads);
  equal("head_dim", batch.head_dim, limits.head_dim);
  validate_rows(batch);
  if (batch.q_dtype != DType::kF32 && batch.q_dtype != DType::kF16 && batch.q_dtype != DType::kBF16) {
    throw Error(std::string("q's type (") + dtype_name(batch.q_dtype) + ") must be f32, f16 or bf16");
  }
  if (batch.likely_rows != nullptr) in_range("max_likely_rows", batch.max_likely_rows, 1, kMaxLikely);
  if (batch.kv_lens == nullptr || batch.q == nullptr || batch.out == nullptr)
    throw Error("kv_lens, q and out must not be null");
}

void validate_rows(const DecodeBatch& batch) {
  check_dim(batch.head_dim);
  if (batch.k.dtype != batch.v.dtype)
    throw Error(std::string("v's type (") + dtype_name(batch.v.dtype) + ") must be k's " + dtype_name(batch.k.dtype));
  if (!is_compiled(batch.k.dtype, batch.head_dim)) {
    throw Error(std::string("k's type (") + dtype_name(batch.k.dtype) + ") must be " + list_of(kTypes, dtype_name));
  }
  const bool quantized = batch.k.dtype == DType::kQ8_0 || batch.k.dtype == DType::kQ4_0;
  if (quantized && batch.head_dim % 32 != 0)
    fail("head_dim", batch.head_dim, std::string("a multiple of 32 for ") + dtype_name(batch.k.dtype));
  const bool f8 = batch.k.dtype == DType::kF8E4M3;
  const int64_t unit = quantized ? 2 : f8 ? 8 : 16;
  for (const auto& [name, rows] : {std::pair{"k", batch.k}, std::pair{"v", batch.v}}) {
    if (rows.data == nullptr) throw Error(std::string(name) + " must not be null");
    if (rows.head_scales != nullptr && !f8) {
      throw Error(std::string(name) + " head_scales must be null for " + dtype_name(rows.dtype));
    }
    for (const auto& [what, stride] :
         {std::pair{" address", static_cast<int64_t>(reinterpret_cast<intptr_t>(rows.data))},
          std::pair{" sequence_stride_bytes", rows.sequence_stride_bytes},
          std::pair{" head_stride_bytes", rows.head_stride_bytes},
          std::pair{" token_stride_bytes", rows.token_stride_bytes},
          std::pair{" page_stride_bytes", rows.page_stride_bytes}}) {
      if (stride % unit != 0) fail((std::string(name) + what).c_str(), stride, "a multiple of " + std::to_string(unit));
    }
    if (batch.page_tables != nullptr && rows.page_tokens < 1)
      fail((std::string(name) + " page_tokens").c_str(), rows.page_tokens, "at least 1");
    const size_t row = row_bytes(rows.dtype, batch.head_dim);
    if (batch.num_kv_heads > 1) check_stride(name, "head_stride_bytes", rows.head_stride_bytes, row, kMaxHeadStride);
    if (batch.page_tables == nullptr || rows.page_tokens > 1)
      check_stride(name, "token_stride_bytes", rows.token_stride_bytes, row, kMaxTokenStride);
    const bool paged = batch.page_tables != nullptr;  // else the device alone knows how many tokens there are
    check_overlap(name, batch.num_kv_heads, paged ? rows.page_tokens : 2, rows.head_stride_bytes,
                  rows.token_stride_bytes, row);
    if (!paged && batch.num_sequences > 1)
      check_stride(name, "sequence_stride_bytes", rows.sequence_stride_bytes, row, kMaxHeadStride);
    if (paged && batch.max_pages > 1)
      check_stride(name, "page_stride_bytes", rows.page_stride_bytes, row, kMaxTokenStride);
  }
  if (batch.page_tables != nullptr) in_range("max_pages", batch.max_pages, 1, 1 << 30);
}

int64_t check_pages(const std::string& name, const DecodeBatch& batch, int64_t kv_len) {
  if (batch.page_tables == nullptr) return 0;
  const int64_t page_tokens = std::min(batch.k.page_tokens, batch.v.page_tokens),
                pages = (kv_len + page_tokens - 1) / page_tokens;
  in_range(("pages of " + name).c_str(), pages, 0, batch.max_pages);
  return pages;
}

void validate(const HostTables& tables, const DecodeBatch& batch, int32_t max_rows) {
  if (tables.kv_lens == nullptr) throw Error("the host's kv_lens must not be null");
  if ((tables.page_tables == nullptr) != (batch.page_tables == nullptr))
    throw Error("the host must have page_tables when the batch has them, and only then");
  const auto name_at = [](const char* name, int64_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; };
  for (int64_t s = 0; s < batch.num_sequences; ++s) {
    const int64_t kv_len = tables.kv_lens[s];
    in_range(name_at("kv_lens", s).c_str(), kv_len, 0, max_rows);
    const int64_t pages = check_pages(name_at("kv_lens", s), batch, kv_len);
    for (int64_t i = 0; i < pages; ++i) {
      const int64_t at = s * batch.max_pages + i, page = tables.page_tables[at];
      if (page < 0 || page >= tables.num_pages)  // its name only then: there are many
        in_range(name_at("page_tables", at).c_str(), page, 0, int64_t{tables.num_pages} - 1);
    }
  }
}

StepStats step_stats(const StepRecord* records, const DecodeBatch& batch, const IndexOptions& options) {
  const auto k_bytes = static_cast<int64_t>(row_bytes(batch.k.dtype, batch.head_dim)),
             v_bytes = static_cast<int64_t>(row_bytes(batch.v.dtype, batch.head_dim));
  StepStats stats;
  stats.kv_len = records[0].kv_len;
  stats.num_kv_heads = batch.num_kv_heads;
  stats.kv_bytes_present = stats.kv_len * batch.num_kv_heads * (k_bytes + v_bytes);
  stats.dense = records[0].dense;
  const int32_t code_bytes = index_geometry(options, {1, batch.head_dim, batch.head_dim}, 1).code_bytes;
  double variance = 0;
  for (int32_t head = 0; head < batch.num_kv_heads; ++head) {
    const StepRecord& r = records[head];
    const int64_t listed = int64_t{r.tokens_selected} + r.tokens_refined, read = r.tokens_exact + listed;
    stats.tokens_certain += read - r.tokens_sampled;
    stats.tokens_sampled += r.tokens_sampled;
    stats.refined_clusters += r.clusters_refined;
    stats.kv_bytes += read * (k_bytes + v_bytes) + r.tokens_probed * k_bytes;
    // Per segment: its rows that are not finite. Per row: number and check.
    stats.index_bytes +=
        int64_t{r.clusters / kTileClusters} * tile_bytes(code_bytes) + int64_t{r.segments} * 2 + listed * 3;
    stats.estimated_mass += double{r.certain_mass} / batch.num_kv_heads;
    variance += double{r.mass_std_error} * r.mass_std_error / batch.num_kv_heads;
    if (r.dense == DenseReason::kNone) stats.dense = DenseReason::kNone;
  }
  stats.tokens_value = stats.tokens_certain + stats.tokens_sampled;
  stats.mass_std_error = std::sqrt(variance);
  return stats;
}

void check_shared(const std::string& what, size_t bytes, const DeviceFacts& device) {
  if (bytes <= device.shared_bytes_per_block) return;
  throw Error(what + " needs " + std::to_string(bytes) + " bytes of shared memory per block, the device has " +
              std::to_string(device.shared_bytes_per_block));
}

}  // namespace tactic::cuda
