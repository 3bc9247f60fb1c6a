// LayerIndex: device memory of a layer's indexes, filled from the CPU's or by clustering on the device.
#include "cuda/layer_index.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "core/index_state.h"
#include "cuda/centroid_tile.h"
#include "cuda/launch.h"
#include "cuda/segments.h"
#include "tactic/error.h"

namespace tactic::cuda {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report it again
  throw Error(std::string(what) + ": " + cudaGetErrorString(status));
}

DeviceFacts device_facts() {
  int device = 0, sms = 0, shared = 0, major = 0;
  check(cudaGetDevice(&device), "no CUDA device");
  check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device), "device facts");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device facts");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device facts");
  DeviceFacts facts{sms, static_cast<size_t>(shared), major >= 9, {}};
  if (facts.has_clusters) count_clusters(facts);
  return facts;
}

LayerIndex::Impl::~Impl() { cudaFree(memory); }

namespace {

// Memory for the kernels that a stream is given meanwhile, from the device's pool: all indexes use the same in turn.
struct Scratch {
  cudaStream_t stream;
  float* data = nullptr;

  Scratch(size_t bytes, cudaStream_t on) : stream(on) {
    if (bytes == 0) return;
    check(cudaMallocAsync(reinterpret_cast<void**>(&data), bytes, stream),
          ("scratch of " + std::to_string(bytes) + " bytes").c_str());
  }
  ~Scratch() {
    if (data != nullptr) cudaFreeAsync(data, stream);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// Clustering works through this many segments at a time, so that its scratch memory stays small.
constexpr int32_t kSegmentsAtOnce = 64;

// Arrays of the view within `memory`; returns their size.
size_t lay_out(IndexView& view, int32_t*& first_changed, int32_t max_sequences, std::byte* memory) {
  const IndexGeometry& g = view.geometry;
  const size_t pairs = static_cast<size_t>(max_sequences) * static_cast<size_t>(view.num_kv_heads);
  const size_t clusters = pairs * static_cast<size_t>(g.max_clusters),
               slots = pairs * static_cast<size_t>(g.all_segments);
  size_t at = 0;
  view.tiles = take<std::byte>(memory, at, clusters / kTileClusters * static_cast<size_t>(tile_bytes(g.code_bytes)));
  view.members = take<uint16_t>(memory, at, pairs * static_cast<size_t>(g.max_rows));
  view.num_not_finite = take<uint16_t>(memory, at, slots);
  view.any_not_finite = take<int32_t>(memory, at, static_cast<size_t>(max_sequences));
  view.calibration = take<HeadCalibration>(memory, at, pairs);
  view.followers = take<Followers>(memory, at, pairs * kMaxSplits);
  view.heavy = take<HeavyRows>(memory, at, pairs * kMaxSplits);
  view.row_checks = take<uint8_t>(memory, at, pairs * static_cast<size_t>(g.max_rows));
  view.states = take<SequenceState>(memory, at, static_cast<size_t>(max_sequences));
  first_changed = take<int32_t>(memory, at, 1);
  return at;
}

int32_t clusters_of(const IndexOptions& o, bool provisional) {
  const int32_t rows = provisional ? o.provisional_tokens : o.segment_tokens,
                size = provisional ? o.provisional_cluster_tokens : o.cluster_tokens;
  return (rows + size - 1) / size;
}

// A segment's clusters of one head; those beyond its own, up to `padded`, are empty.
std::vector<std::byte> tiles_of(const HeadClusters& c, int32_t padded, int32_t head_dim, int32_t code_bytes) {
  std::vector<std::byte> out(static_cast<size_t>(padded / kTileClusters * tile_bytes(code_bytes)));
  float largest = 0;
  for (const float x : c.mean) largest = std::max(largest, std::fabs(x));
  uint32_t member = 0;
  for (int32_t i = 0; i < padded && static_cast<size_t>(i) < c.sizes.size(); ++i) {
    const TileView tile{out.data() + i / kTileClusters * tile_bytes(code_bytes), code_bytes};
    for (int32_t d = 0; d < head_dim; ++d) {
      tile.code(i, d) =
          c.residuals[static_cast<size_t>((i / kCentroidBlock * head_dim + d) * kCentroidBlock + i % kCentroidBlock)];
      if (i % kTileClusters == 0) tile.set_mean(d, c.mean[static_cast<size_t>(d)], largest);
    }
    const auto at = static_cast<size_t>(i);
    tile.facts(i) = {c.scales[at], c.spreads[at]};
    tile.place(i) = member << 16 | c.sizes[at];
    member += c.sizes[at];
  }
  return out;
}

void check_sequence(const LayerIndex::Impl& impl, int32_t sequence) {
  if (sequence < 0 || sequence >= impl.max_sequences) {
    throw Error("sequence (" + std::to_string(sequence) + ") must be in 0.." + std::to_string(impl.max_sequences - 1));
  }
}

// What a batch must be whose rows a sequence's index is made of, or compared with.
void check_batch(const LayerIndex::Impl& impl, int32_t sequence, const DecodeBatch& batch, int32_t kv_len) {
  check_sequence(impl, sequence);
  const int32_t max_rows = impl.view.geometry.max_rows;
  if (kv_len < 0 || kv_len > max_rows)
    throw Error("kv_len (" + std::to_string(kv_len) + ") must be in 0.." + std::to_string(max_rows));
  validate_rows(batch);
  check_pages("kv_len", batch, kv_len);
  if (sequence >= batch.num_sequences) {
    throw Error("sequence (" + std::to_string(sequence) + ") must be in 0.." + std::to_string(batch.num_sequences - 1) +
                ", the batch's");
  }
  if (batch.head_dim != impl.shape.head_dim || batch.num_kv_heads != impl.shape.num_kv_heads) {
    throw Error("the index is of " + std::to_string(impl.shape.num_kv_heads) + " KV heads and head_dim " +
                std::to_string(impl.shape.head_dim) + ", the batch of " + std::to_string(batch.num_kv_heads) + " and " +
                std::to_string(batch.head_dim));
  }
}

// Heavy rows from `kept` on, and all that steps expect of the next one.
void forget_rows(LayerIndex::Impl& impl, int32_t sequence, int32_t kept, cudaStream_t stream) {
  launch_forget_heavy(impl.view, sequence, kept, stream);
  const size_t followers = static_cast<size_t>(impl.shape.num_kv_heads) * kMaxSplits;
  check(cudaMemsetAsync(impl.view.followers + static_cast<size_t>(sequence) * followers, 0,
                        followers * sizeof(Followers), stream),
        "followers");
}

void forget_calibration(LayerIndex::Impl& impl, int32_t sequence, cudaStream_t stream) {
  check(
      cudaMemcpyAsync(impl.view.calibration + static_cast<size_t>(sequence) * impl.unknown.size(), impl.unknown.data(),
                      impl.unknown.size() * sizeof(HeadCalibration), cudaMemcpyHostToDevice, stream),
      "calibration");
}

// Ends every change of an index: a step reads the index before it waits for the kernel in front of it, never for a
// copy. Followers are of the index as it was, and so are heavy rows from `kept` on, which stand in other segments now;
// with its last segment goes what was learned, as the next rows are another request's.
void set_state(LayerIndex::Impl& impl, int32_t sequence, const SequenceState& state, int32_t kept,
               cudaStream_t stream) {
  forget_rows(impl, sequence, kept, stream);
  impl.states[static_cast<size_t>(sequence)] = state;
  if (state == SequenceState{}) {
    check(cudaMemsetAsync(impl.view.any_not_finite + sequence, 0, sizeof(int32_t), stream), "rows not finite");
    forget_calibration(impl, sequence, stream);
  }
  check(cudaMemcpyAsync(impl.view.states + sequence, &impl.states[static_cast<size_t>(sequence)], sizeof state,
                        cudaMemcpyHostToDevice, stream),
        "index state");
}

// Rows before the first segment that only one of the states has.
int32_t same_rows(const IndexGeometry& g, const SequenceState& a, const SequenceState& b) {
  return std::min(a.full_segments, b.full_segments) * g.segment_tokens +
         (a.full_segments == b.full_segments ? std::min(a.provisional_segments, b.provisional_segments) : 0) *
             g.provisional_tokens;
}

}  // namespace

LayerIndex::LayerIndex(const IndexOptions& options, const KvShape& shape, int32_t max_sequences, int32_t max_rows)
    : impl_(std::make_unique<Impl>()) {
  Impl& impl = *impl_;
  if (max_sequences < 1 || max_sequences > 1 << 16)
    throw Error("max_sequences (" + std::to_string(max_sequences) + ") must be in 1..65536");
  impl.device = device_facts();
  impl.options = resolved(options, shape.head_dim, shape.v_head_dim);
  impl.shape = shape;
  impl.max_sequences = max_sequences;
  impl.view.geometry = index_geometry(options, shape, max_rows);
  impl.view.num_kv_heads = shape.num_kv_heads;
  impl.states.resize(static_cast<size_t>(max_sequences));
  impl.bytes = lay_out(impl.view, impl.first_changed, max_sequences, nullptr);
  check(cudaMalloc(reinterpret_cast<void**>(&impl.memory), impl.bytes),
        ("index of " + std::to_string(impl.bytes) + " bytes").c_str());
  lay_out(impl.view, impl.first_changed, max_sequences, impl.memory);
  check(cudaMemset(impl.memory, 0, impl.bytes), "index");
  HeadCalibration unknown;
  unknown.beta = kPriorSlope;
  impl.unknown.assign(static_cast<size_t>(shape.num_kv_heads), unknown);
  const std::vector<HeadCalibration> calibration(static_cast<size_t>(max_sequences) * impl.unknown.size(), unknown);
  check(cudaMemcpy(impl.view.calibration, calibration.data(), calibration.size() * sizeof(HeadCalibration),
                   cudaMemcpyHostToDevice),
        "index");
  check(cudaStreamSynchronize(nullptr), "index");  // who uses it may do so on a stream that waits for none
}

LayerIndex::~LayerIndex() = default;
LayerIndex::LayerIndex(LayerIndex&&) noexcept = default;
LayerIndex& LayerIndex::operator=(LayerIndex&&) noexcept = default;

void LayerIndex::upload(int32_t sequence, const KvIndex& index, Stream stream_pointer) {
  Impl& impl = *impl_;
  check_sequence(impl, sequence);
  const IndexGeometry& g = impl.view.geometry;
  const IndexState& from = index.state();
  const SequenceState state = uploaded_state(index, impl.options, impl.shape, g);
  struct Copy {
    void* to;
    std::vector<std::byte> bytes;
  };
  std::vector<Copy> copies;  // all are made before the first begins
  const auto copy = [&](void* to, const auto& values) {
    const auto* bytes = reinterpret_cast<const std::byte*>(values.data());
    copies.push_back({to, {bytes, bytes + values.size() * sizeof(values[0])}});
  };
  int32_t any_not_finite = 0;
  for (int32_t i = 0; i < state.full_segments + state.provisional_segments; ++i) {
    const Segment& segment = from.segments[static_cast<size_t>(i)];
    const SegmentPlace place(g, state, i);
    const int32_t number = i - state.full_segments;  // of a provisional one
    const int32_t first = number < 0 ? i * g.full_clusters : g.provisional_begin + number * g.provisional_clusters;
    for (int32_t head = 0; head < impl.shape.num_kv_heads; ++head) {
      const HeadClusters& c = segment.heads[static_cast<size_t>(head)];
      const int64_t pair = int64_t{sequence} * impl.shape.num_kv_heads + head;
      std::vector<uint16_t> members(static_cast<size_t>(segment.num_rows));
      std::copy(c.members.begin(), c.members.end(), members.begin());
      std::copy(c.not_finite.begin(), c.not_finite.end(), members.end() - static_cast<int64_t>(c.not_finite.size()));
      copy(tile_of(impl.view, pair, first).data,
           tiles_of(c, number < 0 ? g.full_clusters : g.provisional_clusters, impl.shape.head_dim, g.code_bytes));
      copy(impl.view.members + pair * g.max_rows + place.first_row, members);
      const uint8_t* checks =
          segment.row_checks.data() + static_cast<size_t>(head) * static_cast<size_t>(segment.num_rows);
      copy(impl.view.row_checks + pair * g.max_rows + place.first_row,
           std::vector<uint8_t>(checks, checks + segment.num_rows));
      const auto unclustered = static_cast<uint16_t>(c.not_finite.size());
      copy(impl.view.num_not_finite + pair * g.all_segments + place.slot, std::vector<uint16_t>{unclustered});
      any_not_finite |= unclustered > 0;
    }
  }
  std::vector<HeadCalibration> calibration;
  for (const Calibration& known : from.calibration) {
    HeadCalibration& head = calibration.emplace_back();
    head = {known.beta(),
            static_cast<float>(known.variance_ratio),
            static_cast<float>(known.sum_xx),
            static_cast<float>(known.sum_xy),
            {}};
    for (size_t i = 0; i < std::min(known.usual_variance.size(), std::size(head.usual_variance)); ++i)
      head.usual_variance[i] = static_cast<float>(known.usual_variance[i]);
  }
  copy(impl.view.calibration + int64_t{sequence} * impl.shape.num_kv_heads, calibration);
  copy(impl.view.any_not_finite + sequence, std::vector<int32_t>{any_not_finite});
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  for (const Copy& c : copies)
    check(cudaMemcpyAsync(c.to, c.bytes.data(), c.bytes.size(), cudaMemcpyHostToDevice, stream), "upload");
  set_state(impl, sequence, state, 0, stream);
  check(cudaStreamSynchronize(stream), "upload");
}

void LayerIndex::build(int32_t sequence, const DecodeBatch& batch, int32_t kv_len, Stream stream_pointer) {
  Impl& impl = *impl_;
  check_batch(impl, sequence, batch, kv_len);
  const IndexGeometry& g = impl.view.geometry;
  check_shared("clustering keys of head_dim " + std::to_string(batch.head_dim), cluster_shared_bytes(batch.head_dim),
               impl.device);
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const SequenceState old = impl.states[static_cast<size_t>(sequence)], now = state_at(g, kv_len);
  if (now == old) return;
  struct Due {
    bool provisional;
    int32_t begin, end;

    int32_t at_once() const { return std::min(end - begin, kSegmentsAtOnce); }
  };
  const Due all_due[] = {
      {false, std::min(old.full_segments, now.full_segments), now.full_segments},
      {true, old.full_segments == now.full_segments ? std::min(old.provisional_segments, now.provisional_segments) : 0,
       now.provisional_segments}};
  const auto bytes_of = [&](const Due& due) {  // of scratch, a segment and head
    return cluster_scratch_bytes(due.provisional ? g.provisional_tokens : g.segment_tokens,
                                 clusters_of(impl.options, due.provisional), impl.shape.head_dim);
  };
  // For both before either is launched: when memory runs out nothing has been written over yet.
  size_t bytes = 0;
  for (const Due& due : all_due)
    bytes = std::max(bytes,
                     bytes_of(due) * static_cast<size_t>(impl.shape.num_kv_heads) * static_cast<size_t>(due.at_once()));
  const Scratch scratch(bytes, stream);
  ClusterParams params;
  params.index = impl.view;
  params.batch = batch;
  params.sequence = sequence;
  params.iterations = impl.options.iterations;
  params.seed = impl.options.seed;
  params.full_segments = now.full_segments;
  params.scratch = scratch.data;
  for (const Due& due : all_due) {
    params.provisional = due.provisional;
    params.num_clusters = clusters_of(impl.options, due.provisional);
    params.num_outliers = outliers_of(impl.options.outlier_fraction,
                                      due.provisional ? g.provisional_tokens : g.segment_tokens, params.num_clusters);
    params.scratch_floats = bytes_of(due) / sizeof(float);
    for (params.first_segment = due.begin; params.first_segment < due.end; params.first_segment += kSegmentsAtOnce) {
      params.num_segments = std::min(kSegmentsAtOnce, due.end - params.first_segment);
      launch_cluster(params, impl.device, stream);
    }
  }
  set_state(impl, sequence, now, same_rows(g, old, now), stream);
}

void LayerIndex::truncate(int32_t sequence, int32_t kv_len, Stream stream) {
  check_sequence(*impl_, sequence);
  SequenceState state = impl_->states[static_cast<size_t>(sequence)];
  const SequenceState limit = state_at(impl_->view.geometry, std::max(kv_len, 0));
  if (state.full_segments > limit.full_segments) {
    state = {limit.full_segments, 0};
  } else if (state.full_segments == limit.full_segments) {
    state.provisional_segments = std::min(state.provisional_segments, limit.provisional_segments);
  }
  const SequenceState& old = impl_->states[static_cast<size_t>(sequence)];
  if (!(state == old)) {
    set_state(*impl_, sequence, state, same_rows(impl_->view.geometry, old, state), static_cast<cudaStream_t>(stream));
  }
}

int32_t LayerIndex::verify(int32_t sequence, const DecodeBatch& batch, int32_t kv_len, Stream stream_pointer) {
  Impl& impl = *impl_;
  check_batch(impl, sequence, batch, kv_len);
  truncate(sequence, kv_len, stream_pointer);
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const int32_t rows = rows_indexed(sequence);
  VerifyParams params;
  params.index = impl.view;
  params.batch = batch;
  params.sequence = sequence;
  params.first_row = std::min(rows, impl.view.geometry.sink_tokens);  // sinks are read by every step as they are
  params.end_row = rows;
  params.first_changed = impl.first_changed;
  int32_t first = rows;
  check(cudaMemcpyAsync(impl.first_changed, &first, sizeof first, cudaMemcpyHostToDevice, stream), "verify");
  launch_verify(params, stream);
  check(cudaMemcpyAsync(&first, impl.first_changed, sizeof first, cudaMemcpyDeviceToHost, stream), "verify");
  check(cudaStreamSynchronize(stream), "verify");
  truncate(sequence, first, stream_pointer);
  return first;
}

void LayerIndex::forget_learned(int32_t sequence, Stream stream) {
  check_sequence(*impl_, sequence);
  forget_rows(*impl_, sequence, 0, static_cast<cudaStream_t>(stream));
  forget_calibration(*impl_, sequence, static_cast<cudaStream_t>(stream));
}

int32_t LayerIndex::rows_indexed(int32_t sequence) const {
  check_sequence(*impl_, sequence);
  return ExactRows(impl_->view.geometry, impl_->states[static_cast<size_t>(sequence)], 0).indexed;
}

size_t LayerIndex::memory_bytes() const { return impl_->bytes; }
const IndexOptions& LayerIndex::options() const { return impl_->options; }

}  // namespace tactic::cuda
