#include "support.h"

#include <algorithm>
#include <cstring>

#include "core/backend.h"
#include "hwy/highway.h"
#include "reference/steps.h"

namespace tactic::test {

uint64_t Random::next() {
  uint64_t x = state_ += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

float Random::normal() {
  const uint64_t bits = next();
  const auto part = [&](int shift) { return static_cast<float>(bits >> shift & 0xFFFF) - 32767.5f; };
  return (part(0) + part(16) + part(32) + part(48)) * (1 / (65536 * 0.57735027f));
}

const char* layout_name(Layout layout) {
  switch (layout) {
    case Layout::kTokenMajor: return "token_major";
    case Layout::kHeadMajor: return "head_major";
    case Layout::kPadded: return "padded";
    case Layout::kPaged: return "paged";
  }
  return "?";
}

namespace {

constexpr int64_t kPageTokens = 48;

uint16_t half_bits(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double size = std::fabs(x);
  if (std::isnan(x)) return 0x7E00;
  if (size >= 65520) return sign | 0x7C00;
  if (size < 0x1p-14) return static_cast<uint16_t>(sign | static_cast<int>(std::nearbyint(size * 0x1p24)));
  const int exponent = std::ilogb(size);
  return static_cast<uint16_t>(sign + ((exponent + 14) << 10) +
                               static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent))));
}

float half_value(uint16_t bits) {
  return static_cast<float>(reference::element(DType::kF16, reinterpret_cast<const std::byte*>(&bits), 0));
}

void put(std::byte* at, const void* from, size_t bytes) { std::memcpy(at, from, bytes); }

// One quantized block: the scale, then whatever `quantize` makes of an element divided by the scale.
void encode_block(DType dtype, const float* x, std::byte* at) {
  float largest = 0;
  for (int i = 0; i < 32; ++i) {
    if (!(std::fabs(x[i]) <= std::fabs(largest))) largest = x[i];  // NaN wins
  }
  const uint16_t scale_bits = half_bits(dtype == DType::kQ8_0 ? std::fabs(largest) / 127 : largest / -8);
  const float scale = half_value(scale_bits);
  const auto level = [&](int i, int low, int high) {
    const float steps = scale != 0 && std::isfinite(x[i] / scale) ? std::nearbyint(x[i] / scale) : 0;
    return static_cast<int>(std::clamp(steps, static_cast<float>(low), static_cast<float>(high)));
  };
  put(at, &scale_bits, 2);
  for (int i = 0; i < 32; ++i) {
    if (dtype == DType::kQ8_0) {
      at[2 + i] = static_cast<std::byte>(level(i, -127, 127));
    } else if (i < 16) {
      at[2 + i] = static_cast<std::byte>((level(i, -8, 7) + 8) | (level(i + 16, -8, 7) + 8) << 4);
    }
  }
}

void encode(DType dtype, const std::vector<float>& x, std::byte* row) {
  for (size_t i = 0; i < x.size(); ++i) {
    switch (dtype) {
      case DType::kF32: put(row + 4 * i, &x[i], 4); break;
      case DType::kF16: {
        const uint16_t bits = half_bits(x[i]);
        put(row + 2 * i, &bits, 2);
        break;
      }
      case DType::kBF16: {
        uint32_t bits;
        std::memcpy(&bits, &x[i], 4);
        if (!std::isnan(x[i])) bits += 0x7FFF + (bits >> 16 & 1);
        const auto high = static_cast<uint16_t>(bits >> 16);
        put(row + 2 * i, &high, 2);
        break;
      }
      case DType::kF8E4M3:  // no cache has it
      case DType::kQ8_0:
      case DType::kQ4_0:
        if (i % 32 == 0) encode_block(dtype, &x[i], row + row_bytes(dtype, static_cast<int64_t>(i)));
        break;
    }
  }
}

std::vector<float> decode(const RowsView& rows, int32_t head, int64_t row, int32_t dim) {
  std::vector<float> x(dim);
  for (int32_t d = 0; d < dim; ++d) x[d] = static_cast<float>(reference::element(rows.dtype, rows.row(head, row), d));
  return x;
}

}  // namespace

Cache::Rows Cache::make_rows(DType dtype, int32_t dim) const {
  const auto bytes = static_cast<int64_t>(row_bytes(dtype, dim));
  const int64_t heads = spec_.num_kv_heads, len = std::max<int64_t>(spec_.kv_len, 1);
  Rows rows;
  rows.view.dtype = dtype;
  int64_t total = 0;
  switch (spec_.layout) {
    case Layout::kTokenMajor:
      rows.view.token_stride_bytes = heads * bytes;
      rows.view.head_stride_bytes = bytes;
      total = len * heads * bytes;
      break;
    case Layout::kHeadMajor:
      rows.view.token_stride_bytes = bytes;
      rows.view.head_stride_bytes = (len + 3) * bytes;
      total = heads * (len + 3) * bytes;
      break;
    case Layout::kPadded:
      rows.view.head_stride_bytes = bytes + 20;
      rows.view.token_stride_bytes = heads * (bytes + 20) + 12;
      total = len * rows.view.token_stride_bytes;
      break;
    case Layout::kPaged: {
      const int64_t pages = (len + kPageTokens - 1) / kPageTokens;
      for (int64_t p = 0; p < pages; ++p)
        rows.pages.push_back(static_cast<int32_t>(2 * p));  // every other page is unused
      Random random(spec_.seed + 99);
      for (int64_t p = pages - 1; p > 0; --p) std::swap(rows.pages[p], rows.pages[random.below(p + 1)]);
      rows.view.token_stride_bytes = bytes + 4;
      rows.view.head_stride_bytes = kPageTokens * (bytes + 4);
      rows.view.page_stride_bytes = heads * kPageTokens * (bytes + 4) + 64;
      rows.view.page_tokens = kPageTokens;
      total = 2 * pages * rows.view.page_stride_bytes;
      break;
    }
  }
  rows.bytes.assign(static_cast<size_t>(total), std::byte{0xFF});
  return rows;
}

std::byte* Cache::place(Rows& rows, int32_t head, int64_t row) {
  RowsView view = rows.view;
  view.data = rows.bytes.data();
  view.page_table = rows.pages.empty() ? nullptr : rows.pages.data();
  return rows.bytes.data() + (view.row(head, row) - rows.bytes.data());
}

std::vector<float> Cache::topic(int32_t head, int32_t number) const {
  Random random(spec_.seed * 7919 + static_cast<uint64_t>(head) * 1009 + static_cast<uint64_t>(number));
  std::vector<float> x(spec_.head_dim);
  for (float& value : x) value = spec_.topic_scale * random.normal();
  return x;
}

Cache::Cache(const CacheSpec& spec) : spec_(spec) {
  k_ = make_rows(spec.k_dtype, spec.head_dim);
  v_ = make_rows(spec.v_dtype, spec.v_head_dim);
  Random random(spec.seed);
  for (int32_t head = 0; head < spec.num_kv_heads; ++head) {
    std::vector<std::vector<float>> topics;
    topics.reserve(static_cast<size_t>(spec.topics));
    for (int32_t t = 0; t < spec.topics; ++t) topics.push_back(topic(head, t));
    std::vector<float> k(spec.head_dim), v(spec.v_head_dim);
    size_t current = 0;
    for (int64_t row = 0; row < spec.kv_len; ++row) {
      if (random.uniform() < 0.2) current = static_cast<size_t>(random.below(spec.topics));  // topics come in runs
      for (size_t d = 0; d < k.size(); ++d) k[d] = topics[current][d] + random.normal();
      for (float& value : v) value = random.normal() + 0.3f * static_cast<float>(current % 3);
      set_key(head, row, k);
      set_value(head, row, v);
    }
  }
}

KvView Cache::view() const {
  KvView kv;
  kv.k = k_.view;
  kv.v = v_.view;
  kv.k.data = k_.bytes.data();
  kv.v.data = v_.bytes.data();
  kv.k.page_table = k_.pages.empty() ? nullptr : k_.pages.data();
  kv.v.page_table = v_.pages.empty() ? nullptr : v_.pages.data();
  kv.num_kv_heads = spec_.num_kv_heads;
  kv.head_dim = spec_.head_dim;
  kv.v_head_dim = spec_.v_head_dim;
  kv.kv_len = spec_.kv_len;
  return kv;
}

std::vector<float> Cache::key(int32_t head, int64_t row) const { return decode(view().k, head, row, spec_.head_dim); }
std::vector<float> Cache::value(int32_t head, int64_t row) const {
  return decode(view().v, head, row, spec_.v_head_dim);
}
void Cache::set_key(int32_t head, int64_t row, const std::vector<float>& x) {
  encode(spec_.k_dtype, x, place(k_, head, row));
}
void Cache::set_value(int32_t head, int64_t row, const std::vector<float>& x) {
  encode(spec_.v_dtype, x, place(v_, head, row));
}

void Cache::poison(int64_t row) {
  for (int32_t head = 0; head < spec_.num_kv_heads; ++head) {
    std::memset(place(k_, head, row), 0xFF, row_bytes(spec_.k_dtype, spec_.head_dim));
    std::memset(place(v_, head, row), 0xFF, row_bytes(spec_.v_dtype, spec_.v_head_dim));
  }
}

std::vector<float> make_queries(const Cache& cache, int32_t group_size, uint64_t seed, float sharpness) {
  const CacheSpec& spec = cache.spec();
  Random random(seed);
  std::vector<float> q;
  for (int32_t head = 0; head < spec.num_kv_heads; ++head) {
    for (int32_t g = 0; g < group_size; ++g) {
      const std::vector<float> topic = cache.topic(head, static_cast<int32_t>(random.below(spec.topics)));
      for (const float value : topic) q.push_back(sharpness * (value + random.normal()));
    }
  }
  return q;
}

Problem::Problem(const CacheSpec& spec, int32_t group, uint64_t seed, float sharpness)
    : cache(spec),
      group_size(group),
      q(make_queries(cache, group, seed, sharpness)),
      out(static_cast<size_t>(spec.num_kv_heads) * group * spec.v_head_dim, std::nanf("")),
      lse(static_cast<size_t>(spec.num_kv_heads) * group, std::nanf("")) {
  query.q = q.data();
  query.q_head_stride = spec.head_dim;
  query.num_q_heads = spec.num_kv_heads * group;
  query.sm_scale = 1 / std::sqrt(static_cast<float>(spec.head_dim)) / spec.topic_scale;
  query.out = out.data();
  query.out_head_stride = spec.v_head_dim;
  query.lse = lse.data();
}

void Problem::build_index(const IndexOptions& options) { index = test::build_index(cache, options); }

StepStats Problem::run(const DecodeOptions& options, Backend backend, int32_t num_threads) {
  query.kv = cache.view();
  query.index = index.get();
  std::fill(out.begin(), out.end(), std::nanf(""));
  std::fill(lse.begin(), lse.end(), std::nanf(""));
  StepStats stats;
  Attention(options, backend, num_threads).run({&query, 1}, &stats);
  return stats;
}

void make_sink(Problem& problem, float times, int64_t row) {
  const auto dim = static_cast<size_t>(problem.cache.spec().head_dim);
  problem.run({.select = Select::kDense}, Backend::kReference);
  for (int32_t head = 0; head < problem.cache.spec().num_kv_heads; ++head) {
    std::vector<float> key(dim, 0.0f), value = problem.cache.value(head, row);
    for (int32_t g = 0; g < problem.group_size; ++g) {  // queries are nearly orthogonal
      const size_t h = static_cast<size_t>(head) * static_cast<size_t>(problem.group_size) + static_cast<size_t>(g);
      const float* q = problem.q.data() + h * dim;
      double norm2 = 0;
      for (size_t d = 0; d < dim; ++d) norm2 += double{q[d]} * q[d];
      const double wanted = problem.lse[h] + std::log(times);
      for (size_t d = 0; d < dim; ++d) key[d] += static_cast<float>(wanted / (norm2 * problem.query.sm_scale)) * q[d];
    }
    for (float& x : value) x *= 0.02f;
    problem.cache.set_key(head, row, key);
    problem.cache.set_value(head, row, value);
  }
}

std::unique_ptr<KvIndex> build_index(const Cache& cache, const IndexOptions& options) {
  const CacheSpec& spec = cache.spec();
  auto index = std::make_unique<KvIndex>(options, KvShape{spec.num_kv_heads, spec.head_dim, spec.v_head_dim});
  index->set_num_threads(1);
  index->write(0, spec.kv_len);
  index->maintain(cache.view());
  return index;
}

RowFilter filter_of(const KvIndex& index, int64_t kv_len, const std::vector<uint64_t>* visible) {
  return {visible == nullptr ? nullptr : visible->data(), kv_len, &index.state().indexed};
}

std::vector<uint64_t> random_bits(int64_t rows, double probability, uint64_t seed) {
  Random random(seed);
  std::vector<uint64_t> bits(static_cast<size_t>((rows + 63) / 64));
  for (int64_t row = 0; row < rows; ++row) {
    if (random.uniform() < probability) bits[row >> 6] |= uint64_t{1} << (row & 63);
  }
  return bits;
}

double relative_error(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(static_cast<double>(a[i]) - b[i], 2);
    size += std::pow(static_cast<double>(b[i]), 2);
  }
  return a.size() != b.size() ? HUGE_VAL : difference == 0 ? 0 : std::sqrt(difference / size);
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::vector<int64_t> highway_targets() {
  hwy::SetSupportedTargetsForTest(0);
  return hwy::SupportedAndGeneratedTargets();
}

OnTarget::OnTarget(int64_t target) {
  hwy::SetSupportedTargetsForTest(target);
  hwy::GetChosenTarget().Update(target);
}

OnTarget::~OnTarget() {
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

std::string target_name(int64_t target) { return hwy::TargetName(target); }

}  // namespace tactic::test
