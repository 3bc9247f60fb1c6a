// The C interface: an index and a cache of any shape, layout and type, and any sequence of writes, truncations, upkeep
// and queries. Rows lie in memory of exactly their size. What is read whole must equal dense attention, what is sampled
// must lie between the values, and what is not an answer must be an error with a message.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "input.h"
#include "tactic/c_api.h"

namespace {

using tactic::fuzz::Input;
using tactic::fuzz::require;

template <class T>
void checked(T status) {
  require(status >= 0 || tactic_last_error()[0] != '\0', "a failure leaves a message");
}

int64_t bytes_of_row(tactic_dtype dtype, int64_t dim) {
  switch (dtype) {
    case TACTIC_F32: return dim * 4;
    case TACTIC_Q8_0: return (dim + 31) / 32 * 34;
    case TACTIC_Q4_0: return (dim + 31) / 32 * 18;
    default: return dim * 2;
  }
}

// splitmix64
struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t x = state += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
  }
  float number() { return static_cast<float>(static_cast<int64_t>(next() >> 40)) / (1 << 22) - 2.0f; }
};

enum Content : uint8_t {
  kNormal,
  kEqual,
  kZero,
  kLarge,
  kTiny,
  kNoise
};  // kNoise: any bits, NaN and infinity among them

uint16_t half_of(float x) {  // toward zero, normal numbers only
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (exponent <= 0) return sign;
  return static_cast<uint16_t>(sign | (exponent >= 31 ? 0x7BFF : exponent << 10 | (bits >> 13 & 1023)));
}

void fill_row(std::byte* row, tactic_dtype dtype, int64_t dim, Content content, Random& random) {
  const int64_t bytes = bytes_of_row(dtype, dim);
  if (content == kNoise || dtype == TACTIC_Q8_0 || dtype == TACTIC_Q4_0) {
    for (int64_t i = 0; i < bytes; ++i) row[i] = static_cast<std::byte>(random.next());
    const int64_t block = dtype == TACTIC_Q8_0 ? 34 : 18;
    const uint16_t scale = half_of(content == kZero ? 0.0f : content == kLarge ? 300.0f : 0.02f);
    for (int64_t i = 0; content != kNoise && i + block <= bytes; i += block) std::memcpy(row + i, &scale, 2);
    return;
  }
  for (int64_t d = 0; d < dim; ++d) {
    const float unit = content == kEqual ? 0.5f : content == kZero ? 0.0f : random.number();
    const float large = dtype == TACTIC_F16 ? 3e4f : 1e18f, tiny = dtype == TACTIC_F16 ? 1e-4f : 1e-38f;
    const float x = unit * (content == kLarge ? large : content == kTiny ? tiny : 1.0f);
    if (dtype == TACTIC_F32) {
      std::memcpy(row + 4 * d, &x, 4);
    } else if (dtype == TACTIC_F16) {
      const uint16_t bits = half_of(x);
      std::memcpy(row + 2 * d, &bits, 2);
    } else {
      std::memcpy(row + 2 * d, reinterpret_cast<const char*>(&x) + 2, 2);
    }
  }
}

class Rows {
 public:
  Rows(Input& input, int32_t heads, int64_t capacity, int32_t dim, tactic_dtype dtype) : dim_(dim) {
    const int64_t bytes = bytes_of_row(dtype, dim), gap = input.within(0, 2) * 4;
    view.dtype = dtype;
    int64_t total = 0;
    switch (input.within(0, 2)) {
      case 0:
        view.head_stride_bytes = bytes + gap;
        view.token_stride_bytes = heads * (bytes + gap);
        total = capacity * view.token_stride_bytes - gap;
        break;
      case 1:
        view.token_stride_bytes = bytes + gap;
        view.head_stride_bytes = capacity * (bytes + gap);
        total = heads * view.head_stride_bytes - gap;
        break;
      default: {
        view.page_tokens = static_cast<int32_t>(input.within(1, 70));
        const int64_t pages = (capacity + view.page_tokens - 1) / view.page_tokens;
        for (int64_t i = 0; i < pages; ++i) pages_.push_back(static_cast<int32_t>(pages - 1 - i));
        view.token_stride_bytes = bytes;
        view.head_stride_bytes = bytes * view.page_tokens;
        view.page_stride_bytes = heads * view.head_stride_bytes;
        view.num_pages = static_cast<int32_t>(pages);
        view.page_table = pages_.data();
        total = pages * view.page_stride_bytes;
      }
    }
    memory_ = std::make_unique<std::byte[]>(static_cast<size_t>(total));
    view.data = memory_.get();
  }

  void fill(int64_t begin, int64_t count, int32_t heads, Content content, Random& random) {
    for (int64_t row = begin; row < begin + count; ++row) {
      for (int32_t head = 0; head < heads; ++head) {
        const int64_t token = pages_.empty()
                                  ? row * view.token_stride_bytes
                                  : pages_[static_cast<size_t>(row / view.page_tokens)] * view.page_stride_bytes +
                                        row % view.page_tokens * view.token_stride_bytes;
        fill_row(memory_.get() + token + head * view.head_stride_bytes, view.dtype, dim_, content, random);
      }
    }
  }

  tactic_rows view{};

 private:
  int32_t dim_;
  std::vector<int32_t> pages_;
  std::unique_ptr<std::byte[]> memory_;
};

tactic_index_options index_options(Input& input) {
  tactic_index_options o;
  tactic_index_options_init(&o);
  o.provisional_tokens = 16 << input.within(0, 3);
  o.segment_tokens = o.provisional_tokens * static_cast<int32_t>(input.within(4, 6));
  o.provisional_cluster_tokens = static_cast<int32_t>(input.within(1, 16));
  o.cluster_tokens = static_cast<int32_t>(input.within(1, 64));
  o.iterations = static_cast<int32_t>(input.within(1, 3));
  o.sink_tokens = static_cast<int32_t>(input.within(0, 70));
  o.outlier_fraction = static_cast<float>(input.within(0, 25)) / 100;
  o.whole_clustering = input.one_in(4);
  o.seed = input.raw<uint8_t>();
  switch (input.within(0, 60)) {  // now and then any value at all
    case 0: o.segment_tokens = input.raw<int32_t>(); break;
    case 1: o.provisional_tokens = input.raw<int32_t>(); break;
    case 2: o.cluster_tokens = input.raw<int32_t>(); break;
    case 3: o.outlier_fraction = input.raw<float>(); break;
    case 4: o.sink_tokens = input.raw<int32_t>(); break;
    case 5: o.struct_size = input.raw<size_t>(); break;
    case 6: o.provisional_cluster_tokens = input.raw<int32_t>(); break;
    default: break;
  }
  return o;
}

tactic_decode_options decode_options(Input& input) {
  tactic_decode_options o;
  tactic_decode_options_init(&o);
  o.select = static_cast<tactic_select>(input.within(0, 3));
  o.tau = input.one_in(2) ? static_cast<float>(input.within(1, 100000)) : 0.0f;
  o.target_error = static_cast<float>(input.within(1, 100)) / 100;
  o.target_mass = static_cast<float>(input.within(1, 100)) / 100;
  o.budget = static_cast<int32_t>(input.within(1, 2000));
  o.beta = static_cast<float>(input.within(0, 100)) / 10;
  o.check_rows = input.one_in(2);
  switch (input.within(0, 60)) {
    case 0: o.tau = input.raw<float>(); break;
    case 1: o.target_error = input.raw<float>(); break;
    case 2: o.budget = input.raw<int32_t>(); break;
    case 3: o.refine = input.raw<float>(); break;
    case 4: {
      const auto any = input.raw<uint32_t>();
      std::memcpy(&o.select, &any, sizeof any);
      break;
    }
    default: break;
  }
  return o;
}

class Session {
 public:
  explicit Session(Input& input)
      : input_(input),
        heads_(static_cast<int32_t>(input.within(1, 3))),
        group_(static_cast<int32_t>(input.within(1, 9))),
        dim_(dim_of(input)),
        v_dim_(dim_of(input)),
        capacity_(input.one_in(8) ? input.within(1, 64) : input.within(300, 900)),
        k_(input, heads_, capacity_, dim_, static_cast<tactic_dtype>(input.within(0, 4))),
        v_(input, heads_, capacity_, v_dim_, static_cast<tactic_dtype>(input.within(0, 4))),
        random_{input.raw<uint16_t>()} {
    kv_ = {k_.view, v_.view, heads_, dim_, v_dim_, 0};
    fill(0, capacity_, kNormal);
    const tactic_index_options o = index_options(input);
    index_.reset(tactic_index_create(&o, heads_, dim_, v_dim_));
    require(index_ != nullptr || tactic_last_error()[0] != '\0', "a failure leaves a message");
    if (input.one_in(3)) return;
    write(0, capacity_);
    checked(tactic_index_maintain(index_.get(), &kv_, -1));
  }

  void step() {
    switch (input_.within(0, 10)) {
      case 0: {
        const int64_t begin = input_.within(0, capacity_ - 1), count = input_.within(0, capacity_ - begin);
        fill(begin, count, static_cast<Content>(input_.within(kNormal, kNoise)));
        if (!input_.one_in(8)) write(begin, count);  // else unseen
        break;
      }
      case 1: write(0, capacity_); break;
      case 2:
        checked(tactic_index_truncate(index_.get(),
                                      input_.one_in(8) ? input_.raw<int64_t>() : input_.within(0, capacity_)));
        break;
      case 3: checked(tactic_index_write(index_.get(), -input_.raw<int16_t>() - 32769, input_.raw<int64_t>())); break;
      case 4: checked(tactic_index_verify(index_.get(), view())); break;
      case 5: checked(tactic_index_maintain(index_.get(), view(), input_.raw<float>())); break;
      case 6: checked(tactic_index_maintain(index_.get(), view(), -1)); break;
      case 7: find_places(); break;
      default: query(); break;
    }
    require(index_ == nullptr || tactic_index_memory_bytes(index_.get()) > 0, "an index has a size");
  }

 private:
  // 60 and 0 are not allowed, 80 not for quantized rows.
  static int32_t dim_of(Input& input) {
    static constexpr int32_t kDims[] = {32, 64, 96, 128}, kOthers[] = {0, 16, 60, 80, 256};
    return input.one_in(8) ? input.pick(kOthers) : input.pick(kDims);
  }

  struct FreeIndex {
    void operator()(tactic_index* index) const { tactic_index_free(index); }
  };
  struct FreeAttention {
    void operator()(tactic_attention* attention) const { tactic_attention_free(attention); }
  };
  struct FreePlaces {
    void operator()(tactic_places* places) const { tactic_places_free(places); }
  };

  void fill(int64_t begin, int64_t count, Content content) {
    noise_ = noise_ || content == kNoise || content == kLarge;
    k_.fill(begin, count, heads_, content, random_);
    v_.fill(begin, count, heads_, content, random_);
  }

  void write(int64_t begin, int64_t count) {
    kv_.kv_len = std::max(kv_.kv_len, begin + count);
    checked(tactic_index_write(index_.get(), begin, count));
  }

  // The view, sometimes one that cannot be.
  const tactic_kv* view() {
    shown_ = kv_;
    switch (input_.within(0, 120)) {
      case 0: shown_.kv_len = -1 - input_.raw<uint16_t>(); break;
      case 1: shown_.kv_len = int64_t{1} << 31; break;
      case 2: shown_.num_kv_heads = -input_.raw<uint8_t>(); break;
      case 3: shown_.head_dim += 1; break;
      case 4: shown_.k.data = nullptr; break;
      case 5: shown_.v.page_tokens = -shown_.v.page_tokens; break;
      case 6:
        if (shown_.k.page_table != nullptr) {  // garbage, of which the library knows how much can be right
          garbage_.resize(static_cast<size_t>(capacity_) + 1);
          for (int32_t& page : garbage_) page = input_.raw<int32_t>();
          garbage_[0] = -1 - input_.raw<uint8_t>();
          shown_.k.page_table = garbage_.data();
        }
        break;
      case 7: {
        const uint32_t any = input_.raw<uint32_t>() | 8;
        std::memcpy(&shown_.v.dtype, &any, sizeof any);
        break;
      }
      case 8: return nullptr;
      default: break;
    }
    return &shown_;
  }

  void find_places() {
    if (input_.one_in(4)) checked(tactic_places_forget(places_.get(), input_.raw<int16_t>(), input_.raw<int32_t>()));
    const auto most = static_cast<int32_t>(input_.within(-1, 12));
    std::vector<int32_t> rows(static_cast<size_t>(4 * std::max(most, 0))), written;
    for (auto i = input_.within(0, 3); i > 0; --i) written.push_back(input_.raw<int16_t>());
    std::vector<uint64_t> visible(static_cast<size_t>(capacity_ + 63) / 64);
    for (uint64_t& word : visible) word = random_.next() | random_.next();
    const tactic_kv* kv = view();
    const bool all = kv == nullptr || kv->kv_len > capacity_ || input_.one_in(2);
    const int32_t count = tactic_places_find(places_.get(), kv, all ? nullptr : visible.data(), written.data(),
                                             written.size(), most, rows.data());
    checked(count);
    require(count <= static_cast<int32_t>(rows.size()), "rows have room");
    for (int32_t i = 0; i < count; ++i) {
      const int32_t row = rows[static_cast<size_t>(i)];
      require(row >= 0 && row < kv->kv_len && (i == 0 || row > rows[static_cast<size_t>(i) - 1]), "rows are there");
      require(all || (visible[static_cast<size_t>(row / 64)] >> (row % 64) & 1) != 0, "rows are visible");
    }
  }

  void query() {
    const tactic_decode_options options = decode_options(input_);
    const std::unique_ptr<tactic_attention, FreeAttention> attention(tactic_attention_create(
        &options, input_.one_in(16) ? input_.raw<int16_t>() : static_cast<int32_t>(input_.within(1, 2))));
    if (attention == nullptr) return require(tactic_last_error()[0] != '\0', "a failure leaves a message");
    const tactic_kv* kv = view();
    if (kv == nullptr) return checked(tactic_attention_run(attention.get(), nullptr, 1, nullptr));
    const int32_t num_q_heads = heads_ * group_;
    const int64_t q_stride = dim_ + input_.within(0, 3), out_stride = v_dim_ + input_.within(0, 3);
    const auto q_size = static_cast<size_t>(num_q_heads * q_stride),
               out_size = static_cast<size_t>(num_q_heads * out_stride);
    const auto q = std::make_unique<float[]>(q_size), out = std::make_unique<float[]>(out_size),
               lse = std::make_unique<float[]>(static_cast<size_t>(num_q_heads));
    const float sharpness = static_cast<float>(input_.within(0, 40)) / 10;
    for (size_t i = 0; i < q_size; ++i) q[i] = sharpness * random_.number();
    bool finite = !noise_;
    if (input_.one_in(12) && q_size > 0)
      finite = false, q[static_cast<size_t>(input_.within(0, 15)) % q_size] = input_.raw<float>();
    tactic_query query{};
    query.struct_size = input_.one_in(50) ? input_.raw<size_t>() : sizeof query;
    query.q = q.get();
    query.q_head_stride = q_stride;
    query.num_q_heads = input_.one_in(20) ? input_.raw<int32_t>() : num_q_heads;
    if (query.num_q_heads > num_q_heads && query.num_q_heads % heads_ == 0) query.num_q_heads = num_q_heads;
    query.sm_scale = input_.one_in(30) ? finite = false, input_.raw<float>() : 0.125f;
    query.kv = *kv;
    if (kv->kv_len == kv_.kv_len) query.kv.kv_len = input_.one_in(4) ? input_.within(0, kv_.kv_len) : kv_.kv_len;
    query.index = index_.get();
    std::vector<uint64_t> visible(static_cast<size_t>(capacity_ + 63) / 64);
    for (uint64_t& word : visible) word = random_.next() | random_.next();
    query.visible = input_.one_in(3) ? visible.data() : nullptr;
    std::vector<float> bias(static_cast<size_t>(capacity_));
    for (float& x : bias) x = (random_.next() & 3) == 0 ? -HUGE_VALF : random_.number();
    query.bias = input_.one_in(8) ? bias.data() : nullptr;
    query.layer = static_cast<int32_t>(input_.within(-128, 127));
    query.position = input_.raw<int64_t>();
    query.out = out.get();
    query.out_head_stride = out_stride;
    query.lse = input_.one_in(2) ? lse.get() : nullptr;
    std::vector<int32_t> likely(static_cast<size_t>(input_.within(0, 5)));
    int32_t row = -1;
    for (int32_t& x : likely) x = row += static_cast<int32_t>(input_.within(1, 300));
    if (!likely.empty() && input_.one_in(20)) likely[0] = input_.raw<int32_t>();
    query.likely_rows = likely.data();
    query.num_likely_rows = static_cast<int32_t>(likely.size());
    query.tau_factor = input_.one_in(20) ? input_.raw<float>() : static_cast<float>(input_.within(0, 4));
    std::vector<tactic_mass> masses(static_cast<size_t>(num_q_heads));
    query.masses = input_.one_in(3) ? masses.data() : nullptr;
    tactic_step_stats stats{};
    const int status = tactic_attention_run(attention.get(), &query, 1, &stats);
    checked(status);
    if (status != 0) return;
    require(stats.kv_len >= 0 && stats.kv_len <= query.kv.kv_len, "visible rows are rows");
    require(stats.tokens_certain + stats.tokens_sampled <= stats.kv_len * heads_, "no row is read twice");
    if (!finite || query.num_q_heads != num_q_heads) return;
    for (int32_t h = 0; h < num_q_heads; ++h) {
      for (int32_t d = 0; d < v_dim_; ++d)
        require(std::isfinite(out[static_cast<size_t>(h * out_stride + d)]), "finite rows give finite output");
    }
    const bool whole = options.select == TACTIC_DENSE || (options.select == TACTIC_FIT && options.target_mass >= 1) ||
                       (options.select == TACTIC_TOPK && options.budget >= stats.kv_len);
    if (whole) compare_with_dense(query, out.get(), out_size);
  }

  void compare_with_dense(tactic_query query, const float* out, size_t out_size) {
    tactic_decode_options options;
    tactic_decode_options_init(&options);
    options.select = TACTIC_DENSE;
    const std::unique_ptr<tactic_attention, FreeAttention> attention(tactic_attention_create(&options, 1));
    const auto expected = std::make_unique<float[]>(out_size);
    query.out = expected.get();
    query.index = nullptr;
    require(tactic_attention_run(attention.get(), &query, 1, nullptr) == 0, "dense attention takes what sparse takes");
    float largest = 0;
    for (size_t i = 0; i < out_size; ++i) largest = std::max(largest, std::fabs(expected[i]));
    for (size_t i = 0; i < out_size; ++i)
      require(std::fabs(out[i] - expected[i]) <= 1e-3f * largest + 1e-30f, "all rows read is dense attention");
  }

  Input& input_;
  int32_t heads_, group_, dim_, v_dim_;
  int64_t capacity_;
  Rows k_, v_;
  Random random_;
  tactic_kv kv_{}, shown_{};
  std::vector<int32_t> garbage_;
  bool noise_ = false;  // rows may hold what is not finite
  std::unique_ptr<tactic_index, FreeIndex> index_;
  std::unique_ptr<tactic_places, FreePlaces> places_{tactic_places_create()};
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  Session session(input);
  for (int step = 0; step < 24 && !input.empty(); ++step) session.step();
  return 0;
}
