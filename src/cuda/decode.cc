// Decode: workspace and launches of steps.
#include <algorithm>
#include <string>

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

  ~Impl() { cudaFree(workspace); }

  void reserve(size_t wanted) {
    if (wanted <= bytes) return;
    cudaFree(workspace);
    workspace = nullptr;
    bytes = 0;
    check(cudaMalloc(reinterpret_cast<void**>(&workspace), wanted),
          ("workspace of " + std::to_string(wanted) + " bytes").c_str());
    check(cudaMemset(workspace, 0, wanted), "workspace");
    bytes = wanted;
  }
};

Decode::Decode(const DecodeOptions& options, const DecodeLimits& limits) : impl_(std::make_unique<Impl>()) {
  tactic::validate(options);
  validate(limits);
  Impl& impl = *impl_;
  if (options.select != Select::kSample && options.select != Select::kDense) {
    throw Error(std::string("select (") + select_name(options.select) + ") must be sample or dense on CUDA");
  }
  if (options.select == Select::kSample && !(options.tau > 0)) throw Error("tau must be set for select=sample on CUDA");
  if (options.select == Select::kSample && options.target_mass > 0)
    throw Error("target_mass (" + std::to_string(options.target_mass) + ") must be 0 for select=sample on CUDA");
  impl.options = options;
  impl.limits = limits;
  impl.device = device_facts();
  // Room for any batch up to the limits: fewer sequences get more blocks each.
  const auto group = static_cast<size_t>(limits.num_q_heads / limits.num_kv_heads);
  const IndexGeometry geometry =
      index_geometry(limits.index, {limits.num_kv_heads, limits.head_dim, limits.head_dim}, limits.max_rows);
  impl.max_segments = geometry.max_segments;
  const std::string what = "head_dim " + std::to_string(limits.head_dim) + " with " + std::to_string(group) +
                           " query heads per KV head";
  check_shared(what, fixed_bytes(limits.head_dim, head_bucket(static_cast<int32_t>(group))), impl.device);
  size_t dense_blocks = 0, tables = 0;
  for (int32_t n = 1; n <= limits.max_sequences; ++n) {
    const size_t pairs = static_cast<size_t>(n) * static_cast<size_t>(limits.num_kv_heads);
    dense_blocks = std::max(
        dense_blocks, pairs * static_cast<size_t>(dense_splits(impl.device, n, limits.num_kv_heads, limits.max_rows)));
    const DecodeConfig config =
        decode_config(impl.device, geometry, n, limits.num_kv_heads, limits.head_dim, static_cast<int32_t>(group));
    tables = std::max(tables, pairs * static_cast<size_t>(config.splits) * config.block_workspace_bytes);
  }
  const bool dense = options.select == Select::kDense;
  const size_t out_bytes = dense ? dense_blocks * group * static_cast<size_t>(limits.head_dim) * 4 : 0,
               state_bytes = dense ? dense_blocks * group * 8 : 0;
  const size_t arrived_bytes =
      dense ? static_cast<size_t>(limits.max_sequences) * static_cast<size_t>(limits.num_kv_heads) * 4 : 0;
  impl.reserve(dense ? out_bytes + state_bytes + arrived_bytes : tables);
  impl.dense.partial_out = reinterpret_cast<float*>(impl.workspace);
  impl.dense.partial_state = reinterpret_cast<float*>(impl.workspace + out_bytes);
  impl.dense.arrived = reinterpret_cast<uint32_t*>(impl.workspace + out_bytes + state_bytes);
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
  if (impl.options.select == Select::kDense) {
    DenseParams params = impl.dense;
    params.batch = batch;
    params.splits = dense_splits(impl.device, batch.num_sequences, batch.num_kv_heads, impl.limits.max_rows);
    launch_dense(params, impl.device, static_cast<cudaStream_t>(stream));
    return;
  }
  if (index == nullptr) throw Error("select=sample needs an index");
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
  const DecodeConfig config = decode_config(impl.device, layer.view.geometry, batch.num_sequences, batch.num_kv_heads,
                                            batch.head_dim, batch.num_q_heads / batch.num_kv_heads);
  DecodeParams params;
  params.batch = batch;
  params.index = layer.view;
  params.tau = impl.options.tau;
  params.refine = impl.options.refine;
  params.beta = impl.options.beta;
  params.seed = impl.options.seed;
  params.splits = config.splits;
  params.max_own_clusters = config.own_clusters;
  params.max_own_segments = config.own_segments;
  params.shared_bytes = config.shared_bytes;
  params.records = records;
  params.workspace = config.block_workspace_bytes > 0 ? impl.workspace : nullptr;
  params.block_workspace_bytes = config.block_workspace_bytes;
  launch_decode(params, impl.device, static_cast<cudaStream_t>(stream));
}

}  // namespace tactic::cuda
