#include "trace.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <optional>

#include "part_file.h"
#include "tactic/error.h"

namespace tactic::eval {

static_assert(std::endian::native == std::endian::little, "traces are little-endian");

namespace {

constexpr char kMagic[8] = {'T', 'A', 'C', 'T', 'R', 'A', 'C', 'E'};
constexpr uint32_t kVersion = 1;
constexpr uint64_t kAlign = 64;

struct Preamble {
  char magic[8];
  uint32_t version, num_layers;
  uint64_t header_bytes, file_bytes;
  int64_t kv_len, prompt_len, num_queries;
  uint32_t model_bytes, text_bytes;
};
static_assert(sizeof(Preamble) == 64);

struct LayerEntry {
  int32_t layer, num_q_heads, num_kv_heads, head_dim, v_head_dim;
  uint32_t k_dtype, v_dtype;
  float sm_scale;
  int64_t window;
  uint64_t k_offset, v_offset, q_offset;
};
static_assert(sizeof(LayerEntry) == 64);

uint64_t aligned(uint64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

[[noreturn]] void fail(const std::string& file, const std::string& what) { throw Error(file + ": " + what); }

void require(bool ok, const std::string& file, const std::string& name, int64_t value, const std::string& limit) {
  if (!ok) fail(file, name + " (" + std::to_string(value) + ") must be " + limit);
}

struct LayerBytes {
  uint64_t k, v, q;
};

LayerBytes layer_bytes(const TraceInfo& info, const TraceLayerInfo& layer) {
  const auto rows = static_cast<uint64_t>(layer.num_kv_heads) * static_cast<uint64_t>(info.kv_len);
  return {rows * row_bytes(layer.k_dtype, layer.head_dim), rows * row_bytes(layer.v_dtype, layer.v_head_dim),
          static_cast<uint64_t>(info.num_queries() * layer.num_q_heads * layer.head_dim) * sizeof(float)};
}

uint64_t header_bytes(const TraceInfo& info) {
  return sizeof(Preamble) + info.layers.size() * sizeof(LayerEntry) + info.positions.size() * 9 + info.model.size() +
         info.text.size();
}

bool finite_row(DType dtype, const std::byte* row, int32_t dim, int32_t& element) {
  const auto all = [&](int32_t step, auto finite) {
    for (int32_t i = 0; i < dim; i += step) {
      if (!finite(i)) {
        element = i;
        return false;
      }
    }
    return true;
  };
  const auto half_at = [&](int64_t offset, uint16_t exponent) {
    uint16_t bits;
    std::memcpy(&bits, row + offset, 2);
    return (bits & exponent) != exponent;
  };
  switch (dtype) {
    case DType::kF32:
      return all(1, [&](int64_t i) {
        float x;
        std::memcpy(&x, row + 4 * i, 4);
        return std::isfinite(x);
      });
    case DType::kF16: return all(1, [&](int64_t i) { return half_at(2 * i, 0x7C00); });
    case DType::kBF16: return all(1, [&](int64_t i) { return half_at(2 * i, 0x7F80); });
    case DType::kQ8_0: return all(32, [&](int64_t i) { return half_at(i / 32 * 34, 0x7C00); });
    case DType::kQ4_0: return all(32, [&](int64_t i) { return half_at(i / 32 * 18, 0x7C00); });
    case DType::kF8E4M3: break;  // no trace has it
  }
  return true;
}

void check_finite(const std::string& file, const char* name, int32_t layer, const RowsView& rows, const KvView& kv,
                  int32_t dim) {
  for (int64_t head = 0; head < kv.num_kv_heads; ++head) {
    for (int64_t row = 0; row < kv.kv_len; ++row) {
      int32_t element = 0;
      if (finite_row(rows.dtype, rows.row(head, row), dim, element)) continue;
      fail(file, std::string(name) + " of layer " + std::to_string(layer) + ", KV head " + std::to_string(head) +
                     ", row " + std::to_string(row) + ", element " + std::to_string(element) + " must be finite");
    }
  }
}

}  // namespace

void validate(const TraceInfo& info, const std::string& file) {
  require(info.kv_len >= 1 && info.kv_len <= INT32_MAX, file, "kv_len", info.kv_len, "in 1..2^31-1");
  require(info.prompt_len >= 0 && info.prompt_len <= info.kv_len, file, "prompt_len", info.prompt_len,
          "in 0..kv_len (" + std::to_string(info.kv_len) + ")");
  require(!info.layers.empty() && info.layers.size() <= 4096, file, "num_layers",
          static_cast<int64_t>(info.layers.size()), "in 1..4096");
  require(info.num_queries() >= 1 && info.num_queries() <= info.kv_len, file, "num_queries", info.num_queries(),
          "in 1..kv_len (" + std::to_string(info.kv_len) + ")");
  require(info.kinds.size() == info.positions.size(), file, "number of query kinds",
          static_cast<int64_t>(info.kinds.size()), "num_queries (" + std::to_string(info.num_queries()) + ")");
  require(info.model.size() <= 4096, file, "length of the model's name", static_cast<int64_t>(info.model.size()),
          "at most 4096");
  require(info.text.size() <= 4096, file, "length of the text's name", static_cast<int64_t>(info.text.size()),
          "at most 4096");
  int64_t last = -1;
  for (size_t i = 0; i < info.positions.size(); ++i) {
    const int64_t p = info.positions[i];
    require(p > last && p < info.kv_len, file, "position of query " + std::to_string(i), p,
            "ascending and below kv_len (" + std::to_string(info.kv_len) + ")");
    const auto kind = static_cast<int64_t>(info.kinds[i]);
    require(kind <= 1, file, "kind of query " + std::to_string(i), kind, "0 (decode) or 1 (prompt)");
    const bool prompt = info.kinds[i] == QueryKind::kPrompt;
    require(prompt == (p < info.prompt_len), file,
            std::string("position of ") + (prompt ? "prompt" : "decode") + " query " + std::to_string(i), p,
            (prompt ? "below prompt_len (" : "at least prompt_len (") + std::to_string(info.prompt_len) + ")");
    last = p;
  }
  for (size_t i = 0; i < info.layers.size(); ++i) {
    const TraceLayerInfo& layer = info.layers[i];
    const std::string of = " of layer " + std::to_string(i);
    require(layer.num_kv_heads >= 1 && layer.num_kv_heads <= 4096, file, "num_kv_heads" + of, layer.num_kv_heads,
            "in 1..4096");
    require(layer.num_q_heads >= 1 && layer.num_q_heads <= 65536 && layer.num_q_heads % layer.num_kv_heads == 0, file,
            "num_q_heads" + of, layer.num_q_heads,
            "a multiple of num_kv_heads (" + std::to_string(layer.num_kv_heads) + ")");
    for (const auto& [name, dim, dtype] : {std::tuple{"head_dim", layer.head_dim, layer.k_dtype},
                                           std::tuple{"v_head_dim", layer.v_head_dim, layer.v_dtype}}) {
      require(static_cast<int>(dtype) <= static_cast<int>(DType::kQ4_0), file, "dtype" + of,
              static_cast<int64_t>(dtype), "in 0..4");
      const int32_t multiple = dtype == DType::kQ8_0 || dtype == DType::kQ4_0 ? 32 : 16;
      require(dim >= multiple && dim <= 1024 && dim % multiple == 0, file, name + of, dim,
              "a multiple of " + std::to_string(multiple) + " up to 1024");
    }
    require(layer.window >= 0, file, "window" + of, layer.window, "at least 0");
    if (!(std::isfinite(layer.sm_scale) && layer.sm_scale > 0)) {
      fail(file, "sm_scale" + of + " (" + std::to_string(layer.sm_scale) + ") must be positive and finite");
    }
  }
}

struct Trace::Impl {
  std::string path;
  TraceInfo info;
  std::vector<LayerEntry> entries;
  std::vector<char> checked;
  const std::byte* data = nullptr;
  uint64_t bytes = 0;

  ~Impl() {
    if (data != nullptr) munmap(const_cast<std::byte*>(data), bytes);
  }

  void map() {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) fail(path, std::string("cannot be read: ") + std::strerror(errno));
    struct stat status = {};
    const bool known = fstat(file, &status) == 0 && S_ISREG(status.st_mode);
    bytes = known ? static_cast<uint64_t>(status.st_size) : 0;
    void* address = bytes == 0 ? MAP_FAILED : mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (address == MAP_FAILED) fail(path, known ? "is empty or cannot be mapped" : "is not a regular file");
    data = static_cast<const std::byte*>(address);
  }

  void read_header() {
    Preamble head;
    if (bytes < sizeof head || std::memcmp(data, kMagic, sizeof kMagic) != 0)
      fail(path, "is not a trace: it does not begin with TACTRACE");
    std::memcpy(&head, data, sizeof head);
    require(head.version == kVersion, path, "version", head.version,
            std::to_string(kVersion) + ", the only one this program reads");
    if (head.file_bytes != bytes) {
      fail(path, "is cut short or damaged: it has " + std::to_string(bytes) + " bytes, its header says " +
                     std::to_string(head.file_bytes));
    }
    const uint64_t after = bytes - sizeof head;
    require(head.num_layers >= 1 && head.num_layers <= after / sizeof(LayerEntry), path, "num_layers", head.num_layers,
            "at least 1 and fit in the file");
    require(head.num_queries >= 1 && static_cast<uint64_t>(head.num_queries) <= after / 9, path, "num_queries",
            head.num_queries, "at least 1 and fit in the file");
    info.positions.resize(static_cast<size_t>(head.num_queries));
    info.kinds.resize(static_cast<size_t>(head.num_queries));
    entries.resize(head.num_layers);
    const uint64_t needed = sizeof head + entries.size() * sizeof(LayerEntry) + info.positions.size() * 9 +
                            head.model_bytes + head.text_bytes;
    require(head.header_bytes == needed && needed <= bytes, path, "header_bytes",
            static_cast<int64_t>(head.header_bytes), std::to_string(needed) + " and fit in the file");
    const std::byte* at = data + sizeof head;
    const auto take = [&](void* to, size_t count) {
      if (count > 0) std::memcpy(to, at, count);
      at += count;
    };
    take(entries.data(), entries.size() * sizeof(LayerEntry));
    take(info.positions.data(), info.positions.size() * 8);
    take(info.kinds.data(), info.kinds.size());
    info.model.resize(head.model_bytes);
    take(info.model.data(), info.model.size());
    info.text.resize(head.text_bytes);
    take(info.text.data(), info.text.size());
    info.kv_len = head.kv_len;
    info.prompt_len = head.prompt_len;
    for (const LayerEntry& e : entries) {
      for (const uint32_t dtype : {e.k_dtype, e.v_dtype})
        require(dtype <= static_cast<uint32_t>(DType::kQ4_0), path, "dtype", dtype, "in 0..4");
      info.layers.push_back({e.layer, e.num_q_heads, e.num_kv_heads, e.head_dim, e.v_head_dim,
                             static_cast<DType>(e.k_dtype), static_cast<DType>(e.v_dtype), e.sm_scale, e.window});
    }
    validate(info, path);
    for (size_t i = 0; i < entries.size(); ++i) {
      const LayerBytes size = layer_bytes(info, info.layers[i]);
      for (const auto& [name, offset, count] :
           {std::tuple{"K", entries[i].k_offset, size.k}, std::tuple{"V", entries[i].v_offset, size.v},
            std::tuple{"Q", entries[i].q_offset, size.q}}) {
        if (offset % kAlign == 0 && offset >= needed && offset <= bytes && count <= bytes - offset) continue;
        fail(path, std::string(name) + " of layer " + std::to_string(i) + " lies at " + std::to_string(offset) +
                       " with " + std::to_string(count) + " bytes; it must be aligned to " + std::to_string(kAlign) +
                       " and end by " + std::to_string(bytes));
      }
    }
    checked.assign(entries.size(), 0);
  }
};

Trace::Trace(const std::string& path) : impl_(std::make_unique<Impl>()) {
  impl_->path = path;
  impl_->map();
  impl_->read_header();
}

Trace::~Trace() = default;
Trace::Trace(Trace&&) noexcept = default;
Trace& Trace::operator=(Trace&&) noexcept = default;

const TraceInfo& Trace::info() const { return impl_->info; }
const std::string& Trace::path() const { return impl_->path; }

TraceLayer Trace::layer(int32_t i) const {
  const TraceInfo& info = impl_->info;
  require(i >= 0 && i < num_layers(), impl_->path, "layer", i, "below " + std::to_string(num_layers()));
  const TraceLayerInfo& layer = info.layers[static_cast<size_t>(i)];
  const LayerEntry& entry = impl_->entries[static_cast<size_t>(i)];
  const auto k_row = static_cast<int64_t>(row_bytes(layer.k_dtype, layer.head_dim)),
             v_row = static_cast<int64_t>(row_bytes(layer.v_dtype, layer.v_head_dim));
  TraceLayer view;
  view.trace = &info;
  view.info = &layer;
  view.kv = {.k = {impl_->data + entry.k_offset, layer.k_dtype, k_row, k_row * info.kv_len},
             .v = {impl_->data + entry.v_offset, layer.v_dtype, v_row, v_row * info.kv_len},
             .num_kv_heads = layer.num_kv_heads,
             .head_dim = layer.head_dim,
             .v_head_dim = layer.v_head_dim,
             .kv_len = info.kv_len};
  view.q = {reinterpret_cast<const float*>(impl_->data + entry.q_offset),
            static_cast<size_t>(info.num_queries() * layer.num_q_heads * layer.head_dim)};
  if (impl_->checked[static_cast<size_t>(i)] == 0) {
    check_finite(impl_->path, "K", i, view.kv.k, view.kv, layer.head_dim);
    check_finite(impl_->path, "V", i, view.kv.v, view.kv, layer.v_head_dim);
    const auto bad = std::find_if(view.q.begin(), view.q.end(), [](float x) { return !std::isfinite(x); });
    if (bad != view.q.end()) {
      const int64_t at = bad - view.q.begin();
      fail(impl_->path, "Q of layer " + std::to_string(i) + ", query " +
                            std::to_string(at / (layer.num_q_heads * layer.head_dim)) + ", head " +
                            std::to_string(at / layer.head_dim % layer.num_q_heads) + ", element " +
                            std::to_string(at % layer.head_dim) + " must be finite");
    }
    impl_->checked[static_cast<size_t>(i)] = 1;
  }
  return view;
}

struct TraceWriter::Impl {
  Impl(const std::string& the_path, const TraceInfo& the_info) : path(the_path), info(the_info) {
    validate(info, path);
    file.emplace(path);
  }

  std::string path;
  TraceInfo info;
  std::optional<PartFile> file;
  std::vector<LayerEntry> entries;
  std::vector<char> written;
  uint64_t file_bytes = 0;

  void write(uint64_t offset, const void* data, size_t bytes) {
    if (fseeko(file->get(), static_cast<off_t>(offset), SEEK_SET) != 0 ||
        std::fwrite(data, 1, bytes, file->get()) != bytes)
      file->fail();
  }
};

TraceWriter::TraceWriter(const std::string& path, const TraceInfo& info) : impl_(std::make_unique<Impl>(path, info)) {
  Impl& s = *impl_;
  uint64_t at = aligned(header_bytes(info));
  const auto place = [&](uint64_t bytes) {
    const uint64_t offset = at;
    at = aligned(at + bytes);
    return offset;
  };
  for (const TraceLayerInfo& layer : info.layers) {
    const LayerBytes size = layer_bytes(info, layer);
    s.entries.push_back({layer.layer, layer.num_q_heads, layer.num_kv_heads, layer.head_dim, layer.v_head_dim,
                         static_cast<uint32_t>(layer.k_dtype), static_cast<uint32_t>(layer.v_dtype), layer.sm_scale,
                         layer.window, 0, 0, 0});
    s.entries.back().k_offset = place(size.k);
    s.entries.back().v_offset = place(size.v);
    s.entries.back().q_offset = place(size.q);
  }
  s.file_bytes = at;
  s.written.assign(info.layers.size(), 0);
}

TraceWriter::~TraceWriter() = default;

void TraceWriter::write_layer(int32_t i, std::span<const std::byte> k, std::span<const std::byte> v,
                              std::span<const float> q) {
  Impl& s = *impl_;
  require(i >= 0 && static_cast<size_t>(i) < s.entries.size(), s.path, "layer", i,
          "below " + std::to_string(s.entries.size()));
  const LayerBytes size = layer_bytes(s.info, s.info.layers[static_cast<size_t>(i)]);
  require(k.size_bytes() == size.k, s.path, "bytes of K", static_cast<int64_t>(k.size_bytes()), std::to_string(size.k));
  require(v.size_bytes() == size.v, s.path, "bytes of V", static_cast<int64_t>(v.size_bytes()), std::to_string(size.v));
  require(q.size_bytes() == size.q, s.path, "bytes of Q", static_cast<int64_t>(q.size_bytes()), std::to_string(size.q));
  const LayerEntry& entry = s.entries[static_cast<size_t>(i)];
  s.write(entry.k_offset, k.data(), size.k);
  s.write(entry.v_offset, v.data(), size.v);
  s.write(entry.q_offset, q.data(), size.q);
  s.written[static_cast<size_t>(i)] = 1;
}

void TraceWriter::finish() {
  Impl& s = *impl_;
  const auto missing = std::find(s.written.begin(), s.written.end(), 0);
  if (missing != s.written.end())
    fail(s.path, "layer " + std::to_string(missing - s.written.begin()) + " was not written");
  Preamble head = {};
  std::memcpy(head.magic, kMagic, sizeof kMagic);
  head.version = kVersion;
  head.num_layers = static_cast<uint32_t>(s.entries.size());
  head.header_bytes = header_bytes(s.info);
  head.file_bytes = s.file_bytes;
  head.kv_len = s.info.kv_len;
  head.prompt_len = s.info.prompt_len;
  head.num_queries = s.info.num_queries();
  head.model_bytes = static_cast<uint32_t>(s.info.model.size());
  head.text_bytes = static_cast<uint32_t>(s.info.text.size());
  uint64_t at = 0;
  const auto put = [&](const void* data, size_t bytes) {
    s.write(at, data, bytes);
    at += bytes;
  };
  put(&head, sizeof head);
  put(s.entries.data(), s.entries.size() * sizeof(LayerEntry));
  put(s.info.positions.data(), s.info.positions.size() * 8);
  put(s.info.kinds.data(), s.info.kinds.size());
  put(s.info.model.data(), s.info.model.size());
  put(s.info.text.data(), s.info.text.size());
  if (std::fflush(s.file->get()) != 0 || ftruncate(fileno(s.file->get()), static_cast<off_t>(s.file_bytes)) != 0)
    s.file->fail();
  s.file->finish();
}

}  // namespace tactic::eval
