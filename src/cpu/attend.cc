// attend: scores of listed K rows, and weighted sums of listed V rows. One read of a row serves the whole group.
#include <algorithm>
#include <type_traits>

#include "cpu/prefetch.h"
#include "cpu/steps.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/attend.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "cpu/rows-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace tactic::cpu {
namespace HWY_NAMESPACE {

// V rows up to this long are fetched while K rows are scored, which at 128 bytes saves 7% for three query heads and 1%
// for four, and costs 5% for eight (Zen 4). For longer ones it made no difference there.
constexpr size_t kFetchedValueBytes = 128;

size_t lines_of(const RowsView& rows, size_t bytes) {
  const bool aligned = rows.token_stride_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(rows.row(0, 0)) % 64 == 0 &&
                       rows.head_stride_bytes % 64 == 0 && rows.page_stride_bytes % 64 == 0;
  return (bytes + 63) / 64 + (aligned ? 0 : 1);
}

// Listed rows that are read while those of the next block are fetched, line by line between the arithmetic.
template <class Fetch, int64_t kRows = Fetch::kRowsAhead>
class RowBlock {
 public:
  RowBlock() = default;
  RowBlock(const RowsView& view, size_t bytes) : view_(&view), bytes_(bytes), lines_(lines_of(view, bytes)) {}

  int64_t size() const { return size_; }
  size_t lines() const { return lines_; }
  // The last row stands also in the places behind it, up to a multiple of four.
  const std::byte* const* rows() const { return rows_; }
  // The first ones of `num` tokens, as many as there is room for.
  HWY_INLINE void set(int32_t head, const int32_t* tokens, int64_t num) {
    size_ = std::min(num, kRows);
    for (int64_t i = 0; i < (size_ + 3) / 4 * 4; ++i) rows_[i] = view_->row(head, tokens[std::min(i, size_ - 1)]);
  }
  HWY_INLINE void fetch(int64_t row, size_t line) const { Fetch::line(rows_[row] + std::min(line * 64, bytes_ - 1)); }
  HWY_INLINE void fetch_four(int64_t row, size_t line) const {
    const size_t at = std::min(line * 64, bytes_ - 1);
    for (int64_t i = 0; i < 4; ++i) Fetch::line(rows_[row + i] + at);
  }
  void fetch_all() const {
    for (int64_t row = 0; row < size_; row += 4) {
      for (size_t line = 0; line < lines_; ++line) fetch_four(row, line);
    }
  }

 private:
  static_assert(kRows % 4 == 0);
  const RowsView* view_ = nullptr;
  int64_t size_ = 0;
  size_t bytes_ = 0, lines_ = 0;
  const std::byte* rows_[kRows] = {};
};

// Adds the lanes of four vectors at once: {sum(a), sum(b), sum(c), sum(d)}.
#if HWY_TARGET != HWY_SCALAR
template <class D>
HWY_INLINE auto fold_blocks(D, hn::Vec<D> v) {
  if constexpr (hn::MaxLanes(D()) <= 4) {
    return v;
  } else {
    const hn::Half<D> dh;
    return fold_blocks(dh, hn::Add(hn::LowerHalf(dh, v), hn::UpperHalf(dh, v)));
  }
}
#endif

HWY_INLINE void store_four_sums(RowTag df, RowVec a, RowVec b, RowVec c, RowVec d, float* out) {
#if HWY_TARGET == HWY_SCALAR
  out[0] = hn::GetLane(hn::SumOfLanes(df, a));
  out[1] = hn::GetLane(hn::SumOfLanes(df, b));
  out[2] = hn::GetLane(hn::SumOfLanes(df, c));
  out[3] = hn::GetLane(hn::SumOfLanes(df, d));
#else
  const hn::Repartition<double, RowTag> dd;
  const auto ab = hn::Add(hn::InterleaveLower(df, a, b), hn::InterleaveUpper(df, a, b));  // a02 b02 a13 b13
  const auto cd = hn::Add(hn::InterleaveLower(df, c, d), hn::InterleaveUpper(df, c, d));
  const auto low = hn::BitCast(df, hn::InterleaveLower(dd, hn::BitCast(dd, ab), hn::BitCast(dd, cd)));
  const auto high = hn::BitCast(df, hn::InterleaveUpper(dd, hn::BitCast(dd, ab), hn::BitCast(dd, cd)));
  hn::StoreU(fold_blocks(df, hn::Add(low, high)), hn::FixedTag<float, 4>(), out);
#endif
}

// How much is summed up at once, so that the sums stay in registers: so many query heads with four rows, and so many
// vectors of a row with up to four heads. With AVX2 alone (on a Zen 4, rows in L1) two heads instead of four take 10 to
// 30% less time; three vectors instead of four, for three heads, 30 to 40%, and instead of two, for four, 5 to 15%.
constexpr bool k32Registers = HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64;
constexpr int kScoredHeads = k32Registers ? 4 : 2;
constexpr size_t vecs_of(int heads) { return heads <= 2 || k32Registers ? 4 : 3; }

// Calls fn(first_head, std::integral_constant) for slices of at most kMax heads.
template <int kMax, class Fn>
HWY_INLINE void for_slices(int32_t group_size, Fn fn) {
  static_assert(kMax <= 4);
  int32_t g = 0;
  for (; group_size - g >= kMax; g += kMax) fn(g, std::integral_constant<int, kMax>());
  switch (group_size - g) {
    case 3: return fn(g, std::integral_constant<int, 3>());
    case 2: return fn(g, std::integral_constant<int, 2>());
    case 1: return fn(g, std::integral_constant<int, 1>());
    default: return;
  }
}

// Fetches the lines of four K rows, and of their V rows if there are any, one line of each at every step.
template <class Fetch>
struct FetchAhead {
  RowBlock<Fetch> k;
  RowBlock<FetchToL2, Fetch::kRowsAhead> v;
  size_t lines = 0, steps = 0;  // of four rows; as many steps as four rows are scored in
  int64_t row = 0;
  size_t line = 0;  // the next one; `lines`: all have been fetched

  // From here on those of the rows [first, first + 4), if there are some.
  HWY_INLINE void begin(int64_t first) {
    if (first >= k.size()) return;
    row = first;
    for (line = 0; line + steps < lines;) step();
  }
  HWY_INLINE void step() {
    if (line >= lines) return;
    line < k.lines() ? k.fetch_four(row, line) : v.fetch_four(row, line - k.lines());
    ++line;
  }
};

// One query head's products with four rows. Not an element of an array: gcc would keep it in memory.
struct FourSums {
  RowVec a, b, c, d;

  explicit FourSums(RowTag df) : a(hn::Zero(df)), b(a), c(a), d(a) {}
  HWY_INLINE void add(RowVec q, RowVec k0, RowVec k1, RowVec k2, RowVec k3) {
    a = hn::MulAdd(q, k0, a);
    b = hn::MulAdd(q, k1, b);
    c = hn::MulAdd(q, k2, c);
    d = hn::MulAdd(q, k3, d);
  }
  HWY_INLINE void store(RowTag df, int64_t num, float* out) const {
    if (num >= 4) return store_four_sums(df, a, b, c, d, out);
    float last[4];
    store_four_sums(df, a, b, c, d, last);
    std::copy_n(last, num, out);
  }
};

// kHeads query heads and four rows, of which the first `num` are asked for.
template <class Fetch, DType kType, int kHeads>
HWY_INLINE void score_four(const std::byte* const* rows, int64_t num, const float* q, size_t head_dim, float* scores,
                           int64_t stride, FetchAhead<Fetch>& ahead) {
  const RowTag df;
  FourSums first(df), second(df), third(df), fourth(df);
  for (size_t i = 0; i < head_dim; i += hn::Lanes(df)) {
    ahead.step();
    const RowVec k0 = RowLoader<kType>::load(df, rows[0], i);
    const RowVec k1 = RowLoader<kType>::load(df, rows[1], i);
    const RowVec k2 = RowLoader<kType>::load(df, rows[2], i);
    const RowVec k3 = RowLoader<kType>::load(df, rows[3], i);
    first.add(hn::LoadU(df, q + i), k0, k1, k2, k3);
    if constexpr (kHeads > 1) second.add(hn::LoadU(df, q + head_dim + i), k0, k1, k2, k3);
    if constexpr (kHeads > 2) third.add(hn::LoadU(df, q + 2 * head_dim + i), k0, k1, k2, k3);
    if constexpr (kHeads > 3) fourth.add(hn::LoadU(df, q + 3 * head_dim + i), k0, k1, k2, k3);
  }
  first.store(df, num, scores);
  if constexpr (kHeads > 1) second.store(df, num, scores + stride);
  if constexpr (kHeads > 2) third.store(df, num, scores + 2 * stride);
  if constexpr (kHeads > 3) fourth.store(df, num, scores + 3 * stride);
}

template <class Fetch, DType kType>
void score_rows(const RowsView& k, const RowsView* v, size_t v_bytes, int32_t head, const int32_t* tokens,
                int64_t num_tokens, const float* q, size_t head_dim, int32_t group_size, float* scores,
                int64_t stride) {
  FetchAhead<Fetch> next;
  next.k = {k, row_bytes(kType, static_cast<int64_t>(head_dim))};
  if (v != nullptr) next.v = {*v, v_bytes};
  next.lines = next.k.lines() + next.v.lines();
  next.steps = head_dim / hn::Lanes(RowTag()) * static_cast<size_t>((group_size + kScoredHeads - 1) / kScoredHeads);
  const auto set_next = [&](int64_t begin) HWY_ATTR {
    next.k.set(head, tokens + begin, num_tokens - begin);
    if (v != nullptr) next.v.set(head, tokens + begin, num_tokens - begin);
  };
  set_next(0);
  next.k.fetch_all();
  next.v.fetch_all();
  RowBlock<Fetch> now;
  for (int64_t begin = 0; begin < num_tokens; begin += now.size()) {
    now = next.k;
    const int64_t num = now.size();
    set_next(begin + num);
    for (int64_t t = 0; t < num; t += 4) {
      next.begin(t);
      for_slices<kScoredHeads>(group_size, [&](int32_t g, auto heads) HWY_ATTR {
        score_four<Fetch, kType, heads>(now.rows() + t, num - t, q + static_cast<size_t>(g) * head_dim, head_dim,
                                        scores + g * stride + begin + t, stride, next);
      });
    }
  }
}

// The rows whose values are added, for all heads and columns before the next ones are, and the next ones, of which
// every slice of heads and columns fetches its share of lines.
template <class Fetch>
struct ValueBlocks {
  RowBlock<Fetch> now, next;
  size_t first_line = 0, end_line = 0;  // that the slice at hand fetches

  void share(size_t slice, size_t slices) {
    first_line = next.lines() * slice / slices;
    end_line = next.lines() * (slice + 1) / slices;
  }
};

// kHeads query heads and kVecs vectors of the rows at once, so that the sums stay in registers.
template <class Fetch, DType kType, int kHeads, int kVecs>
void add_rows(const ValueBlocks<Fetch>& blocks, const float* weights, int64_t stride, size_t column, size_t v_head_dim,
              float* out) {
  const RowTag df;
  const size_t lanes = hn::Lanes(df);
  out += column;
  RowVec sums[kHeads][kVecs];
  for (int g = 0; g < kHeads; ++g) {
    for (int j = 0; j < kVecs; ++j)
      sums[g][j] = hn::LoadU(df, out + static_cast<size_t>(g) * v_head_dim + static_cast<size_t>(j) * lanes);
  }
  const int64_t num = blocks.now.size(), num_next = blocks.next.size();
  const size_t first_line = blocks.first_line, end_line = blocks.end_line;
  for (int64_t t = 0; t < num; ++t) {
    if (t < num_next) {
      for (size_t line = first_line; line < end_line; ++line) blocks.next.fetch(t, line);
    }
    const std::byte* row = blocks.now.rows()[t];
    RowVec values[kVecs];
    for (int j = 0; j < kVecs; ++j)
      values[j] = RowLoader<kType>::load(df, row, column + static_cast<size_t>(j) * lanes);
    for (int g = 0; g < kHeads; ++g) {
      const RowVec w = hn::Set(df, weights[g * stride + t]);
      for (int j = 0; j < kVecs; ++j) sums[g][j] = hn::MulAdd(w, values[j], sums[g][j]);
    }
  }
  for (int g = 0; g < kHeads; ++g) {
    for (int j = 0; j < kVecs; ++j)
      hn::StoreU(sums[g][j], df, out + static_cast<size_t>(g) * v_head_dim + static_cast<size_t>(j) * lanes);
  }
}

template <class Fetch, DType kType>
void value_rows(const RowsView& v, int32_t head, const int32_t* tokens, int64_t num_tokens, const float* weights,
                int64_t stride, size_t v_head_dim, int32_t group_size, float* out) {
  const size_t lanes = hn::Lanes(RowTag()), vecs = v_head_dim / lanes;
  size_t slices = 0;
  for_slices<4>(group_size, [&](int32_t, auto heads) HWY_ATTR {
    constexpr size_t kVecs = vecs_of(heads);
    slices += vecs / kVecs + vecs % kVecs / 2 + vecs % kVecs % 2;
  });
  ValueBlocks<Fetch> blocks;
  blocks.next = {v, row_bytes(kType, static_cast<int64_t>(v_head_dim))};
  blocks.next.set(head, tokens, num_tokens);
  blocks.next.fetch_all();
  for (int64_t begin = 0; begin < num_tokens; begin += blocks.now.size()) {
    blocks.now = blocks.next;
    const int64_t end = begin + blocks.now.size();
    blocks.next.set(head, tokens + end, num_tokens - end);
    size_t slice = 0;
    for_slices<4>(group_size, [&](int32_t g, auto heads) HWY_ATTR {
      constexpr size_t kVecs = vecs_of(heads);
      const float* w = weights + g * stride + begin;
      float* sums = out + static_cast<size_t>(g) * v_head_dim;
      size_t vec = 0;
      for (; vec + kVecs <= vecs; vec += kVecs) {
        blocks.share(slice++, slices);
        add_rows<Fetch, kType, heads, kVecs>(blocks, w, stride, vec * lanes, v_head_dim, sums);
      }
      for (; vec + 2 <= vecs; vec += 2) {
        blocks.share(slice++, slices);
        add_rows<Fetch, kType, heads, 2>(blocks, w, stride, vec * lanes, v_head_dim, sums);
      }
      if (vec < vecs) {
        blocks.share(slice++, slices);
        add_rows<Fetch, kType, heads, 1>(blocks, w, stride, vec * lanes, v_head_dim, sums);
      }
    });
  }
}

template <class Fetch, class Fn>
HWY_INLINE void for_type(DType dtype, Fn fn) {
  switch (dtype) {
    case DType::kF32: return fn.template operator()<Fetch, DType::kF32>();
    case DType::kF16: return fn.template operator()<Fetch, DType::kF16>();
    case DType::kBF16: return fn.template operator()<Fetch, DType::kBF16>();
    case DType::kQ8_0: return fn.template operator()<Fetch, DType::kQ8_0>();
    case DType::kQ4_0: return fn.template operator()<Fetch, DType::kQ4_0>();
    case DType::kF8E4M3: return;  // no view has it
  }
}

template <class Fn>
HWY_INLINE void dispatch(DType dtype, Fn fn) {
  fetches_to_l2() ? for_type<FetchToL2>(dtype, fn) : for_type<FetchToL1>(dtype, fn);
}

void attend_scores(const RowsView& k, int32_t head, const int32_t* tokens, int64_t num_tokens, const float* q,
                   int32_t head_dim, int32_t group_size, float* scores, int64_t stride, const RowsView* v,
                   int32_t v_head_dim) {
  const size_t v_bytes = v != nullptr ? row_bytes(v->dtype, v_head_dim) : 0;
  const RowsView* fetched = v_bytes <= kFetchedValueBytes ? v : nullptr;
  dispatch(k.dtype, [&]<class Fetch, DType kType>() {
    score_rows<Fetch, kType>(k, fetched, v_bytes, head, tokens, num_tokens, q, static_cast<size_t>(head_dim),
                             group_size, scores, stride);
  });
}

void attend_values(const RowsView& v, int32_t head, const int32_t* tokens, int64_t num_tokens, const float* weights,
                   int64_t stride, int32_t v_head_dim, int32_t group_size, float* out) {
  dispatch(v.dtype, [&]<class Fetch, DType kType>() {
    value_rows<Fetch, kType>(v, head, tokens, num_tokens, weights, stride, static_cast<size_t>(v_head_dim), group_size,
                             out);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace tactic::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tactic::cpu {

HWY_EXPORT(attend_scores);
HWY_EXPORT(attend_values);

void attend_scores(const RowsView& k, int32_t head, const int32_t* tokens, int64_t num_tokens, const float* q,
                   int32_t head_dim, int32_t group_size, float* scores, int64_t stride, const RowsView* v,
                   int32_t v_head_dim) {
  return HWY_DYNAMIC_DISPATCH(attend_scores)(k, head, tokens, num_tokens, q, head_dim, group_size, scores, stride, v,
                                             v_head_dim);
}

void attend_values(const RowsView& v, int32_t head, const int32_t* tokens, int64_t num_tokens, const float* weights,
                   int64_t stride, int32_t v_head_dim, int32_t group_size, float* out) {
  HWY_DYNAMIC_DISPATCH(attend_values)(v, head, tokens, num_tokens, weights, stride, v_head_dim, group_size, out);
}

}  // namespace tactic::cpu
#endif
