// Decode: workspace and launches of steps.
#include <algorithm>
#include <string>

#include "core/steps.h"
#include "cuda/launch.h"
#include "cuda/layer_index.h"
#include "tactic/error.h"

namespace tactic::cuda {

struct Decode::Impl {
  DecodeOptions options;
  DecodeLimits limits;
  DeviceFacts device;
  int32_t max_segments = 0;
  std::byte* workspace = nullptr;
  size_t bytes = 0;
  DenseParams dense;
  RankParams rank;
  std::byte* tables = nullptr;

  ~Impl() { cudaFree(workspace); }

  void reserve(size_t wanted) {
    if (wanted <= bytes) return;
    cudaFree(workspace);
    workspace = nullptr;
    bytes = 0;
    check(cudaMalloc(reinterpret_cast<void**>(&workspace), wanted),
          ("workspace of " + std::to_string(wanted) + " bytes").c_str());
    check(cudaMemset(workspace, 0, wanted), "workspace");
    check(cudaStreamSynchronize(nullptr), "workspace");  // steps may run on streams that wait for none
    bytes = wanted;
  }

  bool ranks() const { return options.select == Select::kFit || options.select == Select::kTopK; }

  // Room for any batch up to the limits: fewer sequences get more blocks each.
  size_t table_bytes(const IndexGeometry& geometry) const {
    size_t bytes_of_all = 0;
    for (int32_t n = 1; n <= limits.max_sequences; ++n) {
      const DecodeConfig config = decode_config(device, geometry, n, limits.num_kv_heads, limits.head_dim,
                                                limits.num_q_heads / limits.num_kv_heads);
      bytes_of_all = std::max(bytes_of_all, static_cast<size_t>(n) * static_cast<size_t>(limits.num_kv_heads) *
                                                static_cast<size_t>(config.splits) * config.block_workspace_bytes);
    }
    return bytes_of_all;
  }
  size_t lay_out_sample(const IndexGeometry& geometry, std::byte* memory) {
    size_t at = 0;
    tables = take<std::byte>(memory, at, table_bytes(geometry));
    return at;
  }
  // Arrays of a dense step, and of a ranking one, within `memory`; returns their size.
  size_t lay_out(const IndexGeometry& geometry, std::byte* memory) {
    const auto group = static_cast<size_t>(limits.num_q_heads / limits.num_kv_heads);
    size_t blocks = 0;
    for (int32_t n = 1; n <= limits.max_sequences; ++n) {
      const auto splits = static_cast<size_t>(dense_splits(device, n, limits.num_kv_heads, limits.max_rows));
      blocks = std::max(blocks, static_cast<size_t>(n) * static_cast<size_t>(limits.num_kv_heads) * splits);
    }
    size_t at = 0;
    if (ranks()) {
      at = lay_out_rank(rank, geometry, limits, memory);
      rank.exact = take<PartialSoftmax>(memory, at, blocks * group);
    }
    dense.partial_out = take<float>(memory, at, blocks * group * static_cast<size_t>(limits.head_dim));
    dense.partial_state = take<float>(memory, at, blocks * group * 2);
    dense.arrived = take<uint32_t>(
        memory, at, static_cast<size_t>(limits.max_sequences) * static_cast<size_t>(limits.num_kv_heads));
    return at;
  }
};

Decode::Decode(const DecodeOptions& options, const DecodeLimits& limits) : impl_(std::make_unique<Impl>()) {
  tactic::validate(options);
  validate(limits);
  Impl& impl = *impl_;
  impl.options = options;
  impl.limits = limits;
  impl.limits.index = resolved(limits.index, limits.head_dim, limits.head_dim);
  impl.device = device_facts();
  const int32_t group = limits.num_q_heads / limits.num_kv_heads;
  const IndexGeometry geometry =
      index_geometry(limits.index, {limits.num_kv_heads, limits.head_dim, limits.head_dim}, limits.max_rows);
  impl.max_segments = geometry.max_segments;
  const std::string what =
      "head_dim " + std::to_string(limits.head_dim) + " with " + std::to_string(group) + " query heads per KV head";
  check_shared(what, fixed_bytes(limits.head_dim, head_bucket(group), 1), impl.device);
  if (options.select == Select::kSample) {
    impl.reserve(impl.lay_out_sample(geometry, nullptr));
    impl.lay_out_sample(geometry, impl.workspace);
    return;
  }
  impl.reserve(impl.lay_out(geometry, nullptr));
  impl.lay_out(geometry, impl.workspace);
}

Decode::~Decode() = default;
Decode::Decode(Decode&&) noexcept = default;
Decode& Decode::operator=(Decode&&) noexcept = default;

void Decode::plan(const DecodeBatch& batch, const HostTables& tables) const {
  validate(batch, impl_->limits);
  validate(tables, batch, impl_->limits.max_rows);
}

size_t Decode::workspace_bytes() const { return impl_->bytes; }

void Decode::run(const DecodeBatch& batch, const LayerIndex* index, Stream stream, StepRecord* records) {
  Impl& impl = *impl_;
  validate(batch, impl.limits);
  DenseParams dense = impl.dense;
  dense.batch = batch;
  dense.splits = dense_splits(impl.device, batch.num_sequences, batch.num_kv_heads, impl.limits.max_rows);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (impl.options.select == Select::kDense) {
    dense.records = records;
    launch_dense(dense, impl.device, cuda_stream);
    return;
  }
  if (index == nullptr) {
    throw Error(std::string("select=") + select_name(impl.options.select) + " needs an index");
  }
  const LayerIndex::Impl& layer = index->impl();
  if (!(layer.options == impl.limits.index)) throw Error("the index was made with other options than the limits say");
  if (batch.num_sequences > layer.max_sequences || batch.num_kv_heads != layer.shape.num_kv_heads ||
      batch.head_dim != layer.shape.head_dim) {
    throw Error("the index is of " + std::to_string(layer.max_sequences) + " sequences, " +
                std::to_string(layer.shape.num_kv_heads) + " KV heads and head_dim " +
                std::to_string(layer.shape.head_dim) + ", the batch of " + std::to_string(batch.num_sequences) + ", " +
                std::to_string(batch.num_kv_heads) + " and " + std::to_string(batch.head_dim));
  }
  if (layer.view.geometry.max_segments > impl.max_segments) {
    throw Error("the index has room for " + std::to_string(layer.view.geometry.max_rows) + " rows, the limits for " +
                std::to_string(impl.limits.max_rows));
  }
  if (impl.ranks()) {
    RankParams rank = impl.rank;
    rank.batch = batch;
    rank.index = layer.view;
    rank.target_mass = impl.options.select == Select::kFit ? fit_mass(impl.options) : 0;
    rank.budget = impl.options.budget;
    rank.splits = dense.splits;
    rank.records = records;
    launch_rank(rank, impl.device, cuda_stream);
    if (impl.options.select == Select::kFit) launch_fit(rank, impl.device, cuda_stream);
    launch_list(rank, impl.device, cuda_stream);
    dense.rows = rank.rows;
    dense.counts = rank.counts;
    dense.exact_counts = rank.exact_counts;
    dense.max_rows = rank.max_rows;
    if (impl.options.check_rows) {
      dense.row_checks = layer.view.row_checks;
      dense.max_checks = layer.view.geometry.max_rows;
      dense.changed = rank.changed;
    }
    launch_dense(dense, impl.device, cuda_stream);
    if (!impl.options.check_rows) return;
    dense.rows = nullptr;  // all of those pairs whose list cannot be trusted
    dense.records = records;
    launch_dense(dense, impl.device, cuda_stream);
    return;
  }
  const DecodeConfig config = decode_config(impl.device, layer.view.geometry, batch.num_sequences, batch.num_kv_heads,
                                            batch.head_dim, batch.num_q_heads / batch.num_kv_heads);
  DecodeParams params;
  params.batch = batch;
  params.index = layer.view;
  params.tau = impl.options.tau;
  params.target_error = impl.options.target_error;
  params.refine = impl.options.refine;
  params.beta = impl.options.beta;
  params.seed = impl.options.seed;
  params.check_rows = impl.options.check_rows;
  params.splits = config.splits;
  params.max_own_clusters = config.own_clusters;
  params.stages = config.stages;
  params.shared_bytes = config.shared_bytes;
  params.records = records;
  params.target_mass = impl.options.target_mass;
  params.workspace = config.block_workspace_bytes > 0 ? impl.tables : nullptr;
  params.block_workspace_bytes = config.block_workspace_bytes;
  launch_decode(params, impl.device, cuda_stream);
}

}  // namespace tactic::cuda
