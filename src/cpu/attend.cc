// attend: scores of listed K rows, and weighted sums of listed V rows. One read of a row serves the whole group.
#include <algorithm>

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

// V rows up to this long are fetched while K rows are scored. Longer ones fill the queue of misses: at 256 bytes attend
// reaches 84-88% of a gather's bandwidth without, 73-80% with; at 128 bytes 77-80% without, 89-96% with.
constexpr size_t kFetchedValueBytes = 128;

// The cache lines of a few rows, handed out one by one: prefetches spread between the arithmetic take 10% less time
// than in one go, and V rows fetched to L2 while K rows are scored save the values' phase its misses.
template <class Fetch>
class Prefetcher {
 public:
  Prefetcher(const RowsView& k, size_t k_bytes, const RowsView* v, size_t v_bytes)
      : k_bytes_(k_bytes),
        k_lines_(lines(k, k_bytes)),
        v_bytes_(v_bytes),
        v_lines_(v != nullptr ? lines(*v, v_bytes) : 0) {}

  size_t lines_per_row() const { return k_lines_ + v_lines_; }
  HWY_INLINE void set(size_t r, const std::byte* k_row, const std::byte* v_row) {
    k_rows_[r] = k_row;
    v_rows_[r] = v_row;
  }
  // Line z of the four rows, z < 4 * lines_per_row().
  HWY_INLINE void fetch(size_t z) const {
    const size_t line = z / 4;
    if (line < k_lines_) {
      Fetch::line(k_rows_[z % 4] + std::min(line * 64, k_bytes_ - 1));
    } else {
      FetchToL2::line(v_rows_[z % 4] + std::min((line - k_lines_) * 64, v_bytes_ - 1));
    }
  }

 private:
  static size_t lines(const RowsView& rows, size_t bytes) {
    const bool aligned = rows.token_stride_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(rows.row(0, 0)) % 64 == 0 &&
                         rows.head_stride_bytes % 64 == 0 && rows.page_stride_bytes % 64 == 0;
    return (bytes + 63) / 64 + (aligned ? 0 : 1);
  }

  size_t k_bytes_, k_lines_, v_bytes_, v_lines_;
  const std::byte* k_rows_[4] = {};
  const std::byte* v_rows_[4] = {};
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

// kHeads query heads at once, four rows at a time.
template <class Fetch, DType kType, int kHeads>
void score_rows(const RowsView& k, const RowsView* v, size_t v_bytes, int32_t head, const int32_t* tokens,
                int64_t num_tokens, const float* q, size_t head_dim, float* scores, int64_t stride) {
  const RowTag df;
  const size_t lanes = hn::Lanes(df);
  Prefetcher<Fetch> prefetcher(k, row_bytes(kType, static_cast<int64_t>(head_dim)), v, v_bytes);
  const size_t lines = 4 * prefetcher.lines_per_row(), lines_per_step = (lines * lanes + head_dim - 1) / head_dim;
  const auto look_ahead = [&](int64_t t) {
    for (int64_t r = 0; r < 4; ++r) {
      const int32_t token = tokens[std::min(t + r, num_tokens - 1)];
      prefetcher.set(static_cast<size_t>(r), k.row(head, token), v != nullptr ? v->row(head, token) : nullptr);
    }
  };
  for (int64_t t = 0; t < std::min(num_tokens, Fetch::kRowsAhead); t += 4) {
    look_ahead(t);
    for (size_t z = 0; z < lines; ++z) prefetcher.fetch(z);
  }
  for (int64_t t = 0; t < num_tokens; t += 4) {
    const int64_t rest = num_tokens - t;
    const std::byte* rows[4];
    for (int64_t r = 0; r < 4; ++r) rows[r] = k.row(head, tokens[t + std::min(r, rest - 1)]);
    size_t line = t + Fetch::kRowsAhead < num_tokens ? 0 : lines;
    if (line == 0) look_ahead(t + Fetch::kRowsAhead);
    RowVec sums[kHeads][4];
    for (int g = 0; g < kHeads; ++g) {
      for (int r = 0; r < 4; ++r) sums[g][r] = hn::Zero(df);
    }
    for (size_t i = 0; i < head_dim; i += lanes) {
      for (const size_t stop = std::min(lines, line + lines_per_step); line < stop; ++line) prefetcher.fetch(line);
      const RowVec k0 = RowLoader<kType>::load(df, rows[0], i);
      const RowVec k1 = RowLoader<kType>::load(df, rows[1], i);
      const RowVec k2 = RowLoader<kType>::load(df, rows[2], i);
      const RowVec k3 = RowLoader<kType>::load(df, rows[3], i);
      for (int g = 0; g < kHeads; ++g) {
        const RowVec qv = hn::LoadU(df, q + static_cast<size_t>(g) * head_dim + i);
        sums[g][0] = hn::MulAdd(qv, k0, sums[g][0]);
        sums[g][1] = hn::MulAdd(qv, k1, sums[g][1]);
        sums[g][2] = hn::MulAdd(qv, k2, sums[g][2]);
        sums[g][3] = hn::MulAdd(qv, k3, sums[g][3]);
      }
    }
    for (int g = 0; g < kHeads; ++g) {
      float* out = scores + g * stride + t;
      if (rest >= 4) {
        store_four_sums(df, sums[g][0], sums[g][1], sums[g][2], sums[g][3], out);
      } else {
        float last[4];
        store_four_sums(df, sums[g][0], sums[g][1], sums[g][2], sums[g][3], last);
        for (int64_t r = 0; r < rest; ++r) out[r] = last[r];
      }
    }
  }
}

// kHeads query heads and kVecs vectors of the row at once, so that the sums stay in registers.
template <class Fetch, DType kType, int kHeads, int kVecs>
void add_rows(const RowsView& v, int32_t head, const int32_t* tokens, int64_t num_tokens, const float* weights,
              int64_t stride, size_t begin, size_t v_head_dim, float* out) {
  const RowTag df;
  const size_t lanes = hn::Lanes(df);
  RowVec sums[kHeads][kVecs];
  for (int g = 0; g < kHeads; ++g) {
    for (int j = 0; j < kVecs; ++j) {
      sums[g][j] = hn::LoadU(df, out + static_cast<size_t>(g) * v_head_dim + begin + static_cast<size_t>(j) * lanes);
    }
  }
  const size_t first = row_bytes(kType, static_cast<int64_t>(begin / 32 * 32));
  const size_t bytes = row_bytes(kType, static_cast<int64_t>((static_cast<size_t>(kVecs) * lanes + 31) / 32 * 32));
  for (int64_t t = 0; t < num_tokens; ++t) {
    const std::byte* row = v.row(head, tokens[t]);
    if (t + Fetch::kRowsAhead < num_tokens) {
      const std::byte* ahead = v.row(head, tokens[t + Fetch::kRowsAhead]) + first;
      for (size_t i = 0; i < bytes; i += 64) Fetch::line(ahead + i);
    }
    RowVec values[kVecs];
    for (int j = 0; j < kVecs; ++j) values[j] = RowLoader<kType>::load(df, row, begin + static_cast<size_t>(j) * lanes);
    for (int g = 0; g < kHeads; ++g) {
      const RowVec w = hn::Set(df, weights[g * stride + t]);
      for (int j = 0; j < kVecs; ++j) sums[g][j] = hn::MulAdd(w, values[j], sums[g][j]);
    }
  }
  for (int g = 0; g < kHeads; ++g) {
    for (int j = 0; j < kVecs; ++j) {
      hn::StoreU(sums[g][j], df, out + static_cast<size_t>(g) * v_head_dim + begin + static_cast<size_t>(j) * lanes);
    }
  }
}

// As many vectors as fit beside the sums of kHeads heads in 16 registers.
template <class Fetch, DType kType, int kHeads>
void value_rows(const RowsView& v, int32_t head, const int32_t* tokens, int64_t num_tokens, const float* weights,
                int64_t stride, size_t v_head_dim, float* out) {
  constexpr int kVecs = kHeads <= 2 ? 4 : kHeads == 3 ? 3 : 2;
  const size_t lanes = hn::Lanes(RowTag());
  size_t begin = 0;
  if (kHeads == 3 && v_head_dim % (4 * lanes) == 0) {
    for (; begin < v_head_dim; begin += 4 * lanes) {
      add_rows<Fetch, kType, kHeads, 4>(v, head, tokens, num_tokens, weights, stride, begin, v_head_dim, out);
    }
    return;
  }
  for (; begin + kVecs * lanes <= v_head_dim; begin += kVecs * lanes) {
    add_rows<Fetch, kType, kHeads, kVecs>(v, head, tokens, num_tokens, weights, stride, begin, v_head_dim, out);
  }
  for (; begin < v_head_dim; begin += lanes) {
    add_rows<Fetch, kType, kHeads, 1>(v, head, tokens, num_tokens, weights, stride, begin, v_head_dim, out);
  }
}

// Calls fn.template operator()<Fetch, kType, kHeads>(first_head) for slices of at most four heads.
template <class Fetch, DType kType, class Fn>
HWY_INLINE void for_slices(int32_t group_size, Fn fn) {
  int32_t g = 0;
  for (; group_size - g > 4 || group_size - g == 4; g += 4) fn.template operator()<Fetch, kType, 4>(g);
  switch (group_size - g) {
    case 3: return fn.template operator()<Fetch, kType, 3>(g);
    case 2: return fn.template operator()<Fetch, kType, 2>(g);
    case 1: return fn.template operator()<Fetch, kType, 1>(g);
    default: return;
  }
}

template <class Fetch, class Fn>
HWY_INLINE void for_type(DType dtype, int32_t group_size, Fn fn) {
  switch (dtype) {
    case DType::kF32: return for_slices<Fetch, DType::kF32>(group_size, fn);
    case DType::kF16: return for_slices<Fetch, DType::kF16>(group_size, fn);
    case DType::kBF16: return for_slices<Fetch, DType::kBF16>(group_size, fn);
    case DType::kQ8_0: return for_slices<Fetch, DType::kQ8_0>(group_size, fn);
    case DType::kQ4_0: return for_slices<Fetch, DType::kQ4_0>(group_size, fn);
    case DType::kF8E4M3: return;  // no view has it
  }
}

template <class Fn>
HWY_INLINE void dispatch(DType dtype, int32_t group_size, Fn fn) {
  fetches_to_l2() ? for_type<FetchToL2>(dtype, group_size, fn) : for_type<FetchToL1>(dtype, group_size, fn);
}

struct ScoreRows {
  const RowsView& k;
  const RowsView* v;
  size_t v_bytes;
  int32_t head;
  const int32_t* tokens;
  int64_t num_tokens;
  const float* q;
  size_t head_dim;
  float* scores;
  int64_t stride;
  template <class Fetch, DType kType, int kHeads>
  void operator()(int32_t g) const {
    score_rows<Fetch, kType, kHeads>(k, g == 0 && v_bytes <= kFetchedValueBytes ? v : nullptr, v_bytes, head, tokens,
                                     num_tokens, q + static_cast<size_t>(g) * head_dim, head_dim, scores + g * stride,
                                     stride);
  }
};

struct ValueRows {
  const RowsView& v;
  int32_t head;
  const int32_t* tokens;
  int64_t num_tokens;
  const float* weights;
  int64_t stride;
  size_t v_head_dim;
  float* out;
  template <class Fetch, DType kType, int kHeads>
  void operator()(int32_t g) const {
    value_rows<Fetch, kType, kHeads>(v, head, tokens, num_tokens, weights + g * stride, stride, v_head_dim,
                                     out + static_cast<size_t>(g) * v_head_dim);
  }
};

void attend_scores(const RowsView& k, int32_t head, const int32_t* tokens, int64_t num_tokens, const float* q,
                   int32_t head_dim, int32_t group_size, float* scores, int64_t stride, const RowsView* v,
                   int32_t v_head_dim) {
  dispatch(k.dtype, group_size,
           ScoreRows{k, v, v != nullptr ? row_bytes(v->dtype, v_head_dim) : 0, head, tokens, num_tokens, q,
                     static_cast<size_t>(head_dim), scores, stride});
}

void attend_values(const RowsView& v, int32_t head, const int32_t* tokens, int64_t num_tokens, const float* weights,
                   int64_t stride, int32_t v_head_dim, int32_t group_size, float* out) {
  dispatch(v.dtype, group_size,
           ValueRows{v, head, tokens, num_tokens, weights, stride, static_cast<size_t>(v_head_dim), out});
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
