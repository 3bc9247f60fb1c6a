// The far ends of what the library takes: what cannot be read is refused by name, what can be is read right.
#include <sys/mman.h>

#include <algorithm>

#include "support.h"
#include "tactic/error.h"

namespace tactic::test {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

// Every entry that reads rows refuses the same views.
TEST(Borders, ViewsThatCannotBeReadAreNamed) {
  CacheSpec spec;
  spec.kv_len = 600;
  spec.head_dim = spec.v_head_dim = 80;
  spec.layout = Layout::kPaged;
  Problem problem(spec, 2);
  problem.build_index();
  problem.run({});
  const KvView sound = problem.cache.view();
  Attention attention;
  const auto expect_error = [&](const KvView& kv, const char* what) {
    DecodeQuery query = problem.query;
    query.kv = kv;
    EXPECT_THAT([&] { attention.run({&query, 1}); }, ThrowsMessage<Error>(HasSubstr(what)));
    EXPECT_THAT([&] { problem.index->maintain(kv); }, ThrowsMessage<Error>(HasSubstr(what)));
    EXPECT_THAT([&] { problem.index->verify(kv); }, ThrowsMessage<Error>(HasSubstr(what)));
  };
  KvView kv = sound;
  kv.k.dtype = DType::kQ8_0;  // 80 is not a multiple of 32
  expect_error(kv, "K head_dim (80) must be a multiple of 32 up to 1024 for q8_0");
  kv = sound;
  kv.v.dtype = static_cast<DType>(9);
  expect_error(kv, "V dtype (9) must be in 0..4");
  kv = sound;
  kv.v.data = nullptr;
  expect_error(kv, "V data must not be null");
  kv = sound;
  kv.k.page_tokens = 0;
  expect_error(kv, "K page_tokens (0) must be at least 1");
  kv = sound;
  kv.k.num_pages = -1;
  expect_error(kv, "K num_pages (-1)");
  kv = sound;
  kv.kv_len = int64_t{1} << 31;
  expect_error(kv, "kv_len (2147483648)");
  kv = sound;
  kv.k.token_stride_bytes = 0;
  expect_error(kv, "K token_stride_bytes (0) must be at least a row's");
  kv = sound;
  kv.v.head_stride_bytes = 0;
  expect_error(kv, "V head_stride_bytes (0) must be at least a row's");
  kv = sound;
  kv.v.page_stride_bytes = 0;
  expect_error(kv, "V page_stride_bytes (0) must be at least a row's 160 bytes");
  DecodeQuery one_page = problem.query;
  one_page.kv.kv_len = sound.k.page_tokens;
  one_page.kv.k.page_stride_bytes = one_page.kv.v.page_stride_bytes = 0;
  EXPECT_NO_THROW(attention.run({&one_page, 1})) << "nothing is multiplied by it";
  DecodeQuery forgotten = problem.query;
  for (const float factor : {0.0f, -1.0f, 2e6f, NAN, HUGE_VALF}) {
    DecodeQuery query = forgotten;
    query.tau_factor = factor;
    EXPECT_THAT([&] { attention.run({&query, 1}); }, ThrowsMessage<Error>(HasSubstr("tau_factor (")));
  }
  for (const std::vector<int32_t>& rows : {std::vector<int32_t>{-1, 5}, {3, 3}, {5, 2}}) {
    DecodeQuery query = forgotten;
    query.likely_rows = rows.data();
    query.num_likely_rows = static_cast<int32_t>(rows.size());
    EXPECT_THAT([&] { attention.run({&query, 1}); }, ThrowsMessage<Error>(HasSubstr("likely_rows must ascend")));
  }
  for (const int32_t count : {-1, 3}) {
    DecodeQuery query = forgotten;
    query.num_likely_rows = count;
    EXPECT_THAT([&] { attention.run({&query, 1}); }, ThrowsMessage<Error>(HasSubstr("num_likely_rows (")));
  }
  forgotten.q_head_stride = 0;
  EXPECT_THAT([&] { attention.run({&forgotten, 1}); }, ThrowsMessage<Error>(HasSubstr("q_head_stride (0) must be")));
  forgotten = problem.query;
  forgotten.out_head_stride = 0;
  EXPECT_THAT([&] { attention.run({&forgotten, 1}); }, ThrowsMessage<Error>(HasSubstr("out_head_stride (0) must be")));
  for (const int64_t stride : {(int64_t{1} << 31) + 1, INT64_MAX}) {
    DecodeQuery far = problem.query;
    far.out_head_stride = stride;
    EXPECT_THAT(
        [&] {
          attention.run({&far, 1});
        },
        ThrowsMessage<Error>(HasSubstr(text("out_head_stride (", stride, ") must be at most 2147483648"))));
    far = problem.query;
    far.q_head_stride = stride;
    EXPECT_THAT([&] { attention.run({&far, 1}); }, ThrowsMessage<Error>(HasSubstr(text("q_head_stride (", stride))));
  }
  forgotten = problem.query;
  forgotten.num_q_heads = 1 << 30;
  EXPECT_THAT(
      [&] {
        attention.run({&forgotten, 1});
      },
      ThrowsMessage<Error>(HasSubstr("num_q_heads (1073741824) must be at most 65536")));
  kv = sound;
  kv.num_kv_heads = 65537;
  expect_error(kv, "num_kv_heads (65537) must be in 1..65536");

  std::vector<int32_t> pages(sound.v.page_table,
                             sound.v.page_table + (600 + sound.v.page_tokens - 1) / sound.v.page_tokens);
  kv = sound;
  kv.v.page_table = pages.data();
  kv.v.num_pages = *std::max_element(pages.begin(), pages.end()) + 1;
  EXPECT_NO_THROW(problem.index->verify(kv));
  pages.back() = kv.v.num_pages;
  expect_error(kv, text("V page_table[", pages.size() - 1, "] (", kv.v.num_pages, ") must be in 0..").c_str());
  pages.back() = -1;
  expect_error(kv, "] (-1) must be in 0..");
}

// Token by token or head by head, in order or in pages; heads that share bytes are a stride forgotten.
TEST(Borders, HeadsThatOverlapAreNamed) {
  std::vector<std::byte> bytes(1 << 16);
  Attention attention;
  std::vector<float> q(4 * 64), out(4 * 64);
  DecodeQuery query;
  query.q = q.data();
  query.out = out.data();
  query.q_head_stride = query.out_head_stride = 64;
  query.num_q_heads = 4;
  query.kv.num_kv_heads = 4;
  query.kv.head_dim = query.kv.v_head_dim = 64;
  query.kv.kv_len = 20;
  const auto message = [&](int64_t token_stride, int64_t head_stride) {
    query.kv.k.data = query.kv.v.data = bytes.data();
    query.kv.k.token_stride_bytes = query.kv.v.token_stride_bytes = token_stride;
    query.kv.k.head_stride_bytes = query.kv.v.head_stride_bytes = head_stride;
    return message_of([&] { attention.run({&query, 1}); });
  };
  EXPECT_EQ(message(512, 128), "no error");
  EXPECT_EQ(message(128, 20 * 128), "no error");
  EXPECT_EQ(message(128, 128),
            "K token_stride_bytes (128) must be at least 512, or head_stride_bytes (128) at least 2560: rows of "
            "different heads overlap");
  EXPECT_NE(message(511, 128), "no error");
  EXPECT_NE(message(128, 2559), "no error");
  const std::vector<int32_t> pages{1, 0, 2};
  query.kv.k.page_table = query.kv.v.page_table = pages.data();
  query.kv.k.page_tokens = query.kv.v.page_tokens = 8;
  query.kv.k.page_stride_bytes = query.kv.v.page_stride_bytes = 4 * 8 * 128;
  EXPECT_EQ(message(128, 8 * 128), "no error") << "heads of a page one after the other";
  EXPECT_NE(message(128, 7 * 128), "no error");
  query.kv.k.page_table = query.kv.v.page_table = nullptr;
  query.kv.kv_len = 1;
  EXPECT_EQ(message(128, 128), "no error") << "one token";
  query.kv.kv_len = 20;
  query.kv.num_kv_heads = 1;
  EXPECT_EQ(message(128, 0), "no error") << "one head";
}

TEST(Borders, NumbersOutOfRangeAreNamed) {
  EXPECT_THAT([] { Attention({}, static_cast<Backend>(7)); }, ThrowsMessage<Error>(HasSubstr("backend (7)")));
  EXPECT_THAT([] { KvIndex({}, {65537, 64, 64}); }, ThrowsMessage<Error>(HasSubstr("num_kv_heads (65537)")));
  EXPECT_THAT([] { KvIndex({}, {1, 64, 1040}); }, ThrowsMessage<Error>(HasSubstr("V head_dim (1040)")));
  EXPECT_THAT([] { Attention({}, Backend::kCpu, -1); },
              ThrowsMessage<Error>(HasSubstr("num_threads (-1) must be in 0..1024")));
  EXPECT_THAT([] { Attention().set_num_threads(1025); }, ThrowsMessage<Error>(HasSubstr("num_threads (1025)")));
  CacheSpec spec;
  spec.kv_len = 64;
  const Cache cache(spec);
  KvIndex index({}, {2, 64, 64});
  EXPECT_THAT([&] { index.set_num_threads(-7); }, ThrowsMessage<Error>(HasSubstr("num_threads (-7)")));
  EXPECT_THAT([&] { index.maintain(cache.view(), std::nan("")); }, ThrowsMessage<Error>(HasSubstr("max_segments")));
  EXPECT_THAT([&] { index.write(INT32_MAX, 1); }, ThrowsMessage<Error>(HasSubstr("2147483647 + 1")));
  EXPECT_THAT([&] { index.write(1, INT64_MAX); }, ThrowsMessage<Error>(HasSubstr("must lie in 0..2^31-1")));
}

TEST(Borders, OneToken) {
  for (const Backend backend : {Backend::kCpu, Backend::kReference}) {
    CacheSpec spec;
    spec.kv_len = 1;
    Problem problem(spec, 3);
    problem.build_index();
    for (const Select select : {Select::kDense, Select::kSample, Select::kFit, Select::kTopK}) {
      problem.run({.select = select}, backend);
      for (int32_t h = 0; h < 6; ++h) {
        const std::vector<float> v = problem.cache.value(h / 3, 0);
        for (size_t d = 0; d < 64; ++d)
          ASSERT_FLOAT_EQ(problem.out[static_cast<size_t>(h) * 64 + d], v[d]) << select_name(select);
      }
    }
  }
}

// One cluster holds them all, as many as a segment may have; none may get lost.
TEST(Borders, AllKeysEqual) {
  CacheSpec spec;
  spec.num_kv_heads = 1;
  spec.head_dim = spec.v_head_dim = 16;
  spec.kv_len = 65600;
  Problem problem(spec, 1);
  const std::vector<float> key = problem.cache.key(0, 0);
  for (int64_t row = 0; row < spec.kv_len; ++row) problem.cache.set_key(0, row, key);
  for (const Clustering clustering : {Clustering::kIncremental, Clustering::kWhole}) {
    problem.build_index({.clustering = clustering,
                         .cluster_tokens = 65535,
                         .segment_tokens = 65535,
                         .provisional_tokens = 255,
                         .iterations = 1,
                         .sink_tokens = 0,
                         .outlier_fraction = 0});
    problem.run({.select = Select::kDense});
    const std::vector<float> exact = problem.out;
    const StepStats whole = problem.run({.select = Select::kTopK, .budget = 1 << 20});
    EXPECT_EQ(whole.dense, DenseReason::kNone);
    EXPECT_EQ(whole.tokens_certain, spec.kv_len);
    EXPECT_GT(whole.read_fraction(), 1) << "every row, and the index";
    EXPECT_LT(relative_error(problem.out, exact), 1e-3);
    // All weigh the same, so 6000 of 65600 err by what chance says: sqrt(16 (1/6000 - 1/65600)) over |mean value| of
    // about 1.2.
    const StepStats sampled = problem.run({.tau = 6000, .beta = 1});
    EXPECT_EQ(sampled.dense, DenseReason::kNone);
    EXPECT_NEAR(static_cast<double>(sampled.tokens_sampled), 6000, 200);
    EXPECT_LT(relative_error(problem.out, exact), 0.15);
  }
}

// Estimates beyond the range of f32 say nothing: everything is read.
TEST(Borders, SpreadsBeyondTheRange) {
  CacheSpec spec;
  spec.k_dtype = DType::kF32;
  spec.kv_len = 1500;
  Problem problem(spec, 2);
  for (int64_t row = 0; row < spec.kv_len; ++row) {
    for (int32_t head = 0; head < 2; ++head) {
      std::vector<float> k = problem.cache.key(head, row);
      for (float& x : k) x *= row % 3 == 0 ? 5e17f : 1.0f;
      problem.cache.set_key(head, row, k);
    }
  }
  for (float& x : problem.q) x *= 1e3f;
  for (const double slope : {-1e9, 1e9}) {  // calibrated beta: 0 and 2
    problem.build_index();
    for (Calibration& known : problem.index->state().calibration) known.sum_xx = 1, known.sum_xy = slope;
    problem.run({.select = Select::kDense});
    const std::vector<float> exact = problem.out;
    problem.run({.tau = 300});
    EXPECT_LT(relative_error(problem.out, exact), 1e-3);
  }
}

TEST(Borders, AnyPosition) {
  CacheSpec spec;
  spec.kv_len = 1500;
  Problem problem(spec, 2);
  problem.build_index();
  for (const int64_t position : {INT64_MAX, INT64_MIN, int64_t{-1}}) {
    problem.query.position = position;
    problem.query.layer = position < 0 ? INT32_MIN : INT32_MAX;
    EXPECT_EQ(problem.run({.tau = 300}).dense, DenseReason::kNone);
  }
}

// Address space without memory: only the pages that are touched exist.
class Sparse {
 public:
  explicit Sparse(size_t bytes) : bytes_(bytes) {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) throw std::runtime_error("no address space");
    data_ = static_cast<std::byte*>(at);
  }
  ~Sparse() { munmap(data_, bytes_); }
  Sparse(const Sparse&) = delete;
  std::byte* data() const { return data_; }

 private:
  size_t bytes_;
  std::byte* data_;
};

// Copies the rows of a cache to where `view` says they lie.
void copy_rows(const RowsView& from, const RowsView& to, int32_t heads, int64_t rows, int64_t first_row, size_t bytes) {
  for (int32_t head = 0; head < heads; ++head) {
    for (int64_t row = 0; row < rows; ++row) {
      std::copy_n(from.row(head, row), bytes, const_cast<std::byte*>(to.row(head, first_row + row)));
    }
  }
}

// Strides, heads and pages that put rows more than 2^31 and 2^32 bytes apart: the same bits as in a small cache.
TEST(Borders, RowsFarApart) {
  constexpr int64_t kMiB = 1 << 20, kRows = 4500;
  const Sparse memory(size_t{12} << 30);
  for (const DType dtype : {DType::kF16, DType::kQ8_0}) {
    CacheSpec spec;
    spec.k_dtype = spec.v_dtype = dtype;
    spec.kv_len = kRows;
    Problem problem(spec, 2);
    const KvView small = problem.cache.view();
    const size_t bytes = row_bytes(dtype, 64);
    std::vector<int32_t> pages(static_cast<size_t>(kRows) / 16 + 1);
    for (size_t p = 0; p < pages.size(); ++p) pages[p] = static_cast<int32_t>((p * 37) % pages.size());
    for (const char* const layout : {"tokens", "heads", "pages"}) {
      SCOPED_TRACE(text(dtype_name(dtype), " far apart: ", layout));
      KvView kv = small;
      kv.k.data = memory.data() + 64;
      if (layout[0] == 't') {
        kv.k.token_stride_bytes = kMiB, kv.k.head_stride_bytes = 4096;
      } else if (layout[0] == 'h') {
        kv.k.token_stride_bytes = 640, kv.k.head_stride_bytes = 5000 * kMiB;
      } else {
        kv.k.token_stride_bytes = 640, kv.k.head_stride_bytes = 16 * 640, kv.k.page_stride_bytes = 16 * kMiB;
        kv.k.page_table = pages.data(), kv.k.page_tokens = 16, kv.k.num_pages = static_cast<int32_t>(pages.size());
      }
      kv.v = kv.k;
      kv.v.data = memory.data() + 64 + 320;
      EXPECT_GT(kv.k.row(1, layout[0] == 'p' ? 16 : kRows - 1) - memory.data(),
                layout[0] == 'p' ? 0 : int64_t{1} << 32);
      copy_rows(small.k, kv.k, 2, kRows, 0, bytes);
      copy_rows(small.v, kv.v, 2, kRows, 0, bytes);
      for (const Select select : {Select::kDense, Select::kSample, Select::kFit, Select::kTopK}) {
        const DecodeOptions options{.select = select, .tau = 300, .beta = 1};
        problem.build_index();
        EXPECT_EQ(problem.run(options).dense, select == Select::kDense ? DenseReason::kAsked : DenseReason::kNone);
        const std::vector<float> out = problem.out;
        KvIndex index({}, {2, 64, 64});
        index.set_num_threads(1);
        index.write(0, kRows);
        index.maintain(kv);
        EXPECT_EQ(index.verify(kv), 0);
        DecodeQuery query = problem.query;
        query.kv = kv;
        query.index = &index;
        Attention(options, Backend::kCpu, 1).run({&query, 1});
        EXPECT_TRUE(same_bits(problem.out, out)) << select_name(select);
      }
    }
  }
}

// A query that sees the first rows only reads as if the others were masked, and touches none of them, whatever the
// index knows and steps over all rows have learned.
TEST(Borders, RowsBeyondTheViewAreNotRead) {
  constexpr int64_t kRows = 3072, kSeen = 2048, kRowBytes = 256;  // of both heads; the border is one of pages
  CacheSpec spec;
  spec.kv_len = kRows;
  Problem problem(spec, 2);
  const KvView small = problem.cache.view();
  const Sparse k_memory(kRows * kRowBytes), v_memory(kRows * kRowBytes);
  KvView whole = small;
  whole.k.data = k_memory.data();
  whole.v.data = v_memory.data();
  ASSERT_EQ(whole.k.token_stride_bytes, kRowBytes);
  copy_rows(small.k, whole.k, 2, kRows, 0, kRowBytes / 2);
  copy_rows(small.v, whole.v, 2, kRows, 0, kRowBytes / 2);
  std::vector<uint64_t> visible(kRows / 64);
  std::fill_n(visible.begin(), kSeen / 64, ~uint64_t{0});
  for (const Backend backend : {Backend::kCpu, Backend::kReference}) {
    for (const Select select : {Select::kDense, Select::kSample, Select::kFit, Select::kTopK}) {
      SCOPED_TRACE(text(select_name(select), backend == Backend::kCpu ? "" : ", reference"));
      KvIndex index({}, {2, 64, 64});
      index.set_num_threads(1);
      index.write(0, kRows);
      index.maintain(whole);
      Attention attention({.select = select, .tau = 300, .target_mass = 0.9f, .beta = 1}, backend, 1);
      DecodeQuery query = problem.query;
      query.kv = whole;
      query.index = &index;
      for (query.position = 0; query.position < 3; ++query.position) attention.run({&query, 1});  // learns
      const std::vector<Calibration> learned = index.state().calibration;
      query.visible = visible.data();
      StepStats masked, stats;
      attention.run({&query, 1}, &masked);
      const std::vector<float> out = problem.out;
      index.state().calibration = learned;
      query.visible = nullptr;
      query.kv.kv_len = kSeen;
      for (const Sparse* memory : {&k_memory, &v_memory})
        ASSERT_EQ(mprotect(memory->data() + kSeen * kRowBytes, (kRows - kSeen) * kRowBytes, PROT_NONE), 0);
      attention.run({&query, 1}, &stats);
      for (const Sparse* memory : {&k_memory, &v_memory})
        ASSERT_EQ(mprotect(memory->data(), kRows * kRowBytes, PROT_READ | PROT_WRITE), 0);
      EXPECT_TRUE(same_bits(problem.out, out));
      EXPECT_EQ(stats.kv_len, kSeen);
      EXPECT_EQ(stats.dense, select == Select::kDense ? DenseReason::kAsked : DenseReason::kNone);
      EXPECT_EQ(stats.kv_bytes, masked.kv_bytes);
    }
  }
}

// Nine million rows of 256 bytes, of which the last 4096 and a few more are visible.
TEST(Borders, RowNumbersInTheMillions) {
  constexpr int64_t kRows = 4096, kEnd = int64_t{2048} * 4395, kBegin = kEnd - kRows;
  CacheSpec spec;
  spec.num_kv_heads = 1;
  spec.head_dim = spec.v_head_dim = 128;
  spec.kv_len = kRows;
  Problem problem(spec, 4);
  const KvView small = problem.cache.view();
  const Sparse k_memory(static_cast<size_t>(kEnd) * 256), v_memory(static_cast<size_t>(kEnd) * 256);
  KvView kv = small;
  kv.kv_len = kEnd;
  kv.k.data = k_memory.data();
  kv.v.data = v_memory.data();
  kv.k.token_stride_bytes = kv.v.token_stride_bytes = 256;
  copy_rows(small.k, kv.k, 1, kRows, kBegin, 256);
  copy_rows(small.v, kv.v, 1, kRows, kBegin, 256);
  ASSERT_GT(kv.k.row(0, kBegin) - k_memory.data(), int64_t{1} << 31);
  std::vector<uint64_t> visible(kEnd / 64);
  std::fill(visible.end() - kRows / 64, visible.end(), ~uint64_t{0});
  KvIndex index({}, {1, 128, 128});
  index.set_num_threads(1);
  index.write(kBegin, kRows);
  index.maintain(kv);
  EXPECT_EQ(index.rows_indexed(), kRows);
  problem.run({.select = Select::kDense});
  const std::vector<float> exact = problem.out;
  DecodeQuery query = problem.query;
  query.kv = kv;
  query.visible = visible.data();
  query.index = &index;
  for (const Select select : {Select::kDense, Select::kSample, Select::kFit, Select::kTopK}) {
    StepStats stats;
    Attention({.select = select, .tau = 1000, .target_mass = 1, .beta = 1}, Backend::kCpu, 1).run({&query, 1}, &stats);
    EXPECT_EQ(stats.dense, select == Select::kDense ? DenseReason::kAsked : DenseReason::kNone);
    EXPECT_LT(relative_error(problem.out, exact), select == Select::kDense || select == Select::kFit ? 1e-5 : 0.1)
        << select_name(select);
  }
}

}  // namespace
}  // namespace tactic::test
