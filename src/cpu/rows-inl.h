// Loads lanes of stored rows as f32, for the instruction set being compiled.
#if defined(TACTIC_CPU_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TACTIC_CPU_ROWS_INL_H_
#undef TACTIC_CPU_ROWS_INL_H_
#else
#define TACTIC_CPU_ROWS_INL_H_
#endif

#include <cstddef>
#include <cstring>

#include "hwy/highway.h"
#include "tactic/kv_view.h"

HWY_BEFORE_NAMESPACE();
namespace tactic::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Rows are multiples of 16 elements, and 16 lanes divide a quantized block.
using RowTag = hn::CappedTag<float, 16>;
using RowVec = hn::Vec<RowTag>;

HWY_INLINE RowVec promote_f16(RowTag df, const std::byte* p) {
  const hn::Rebind<hwy::float16_t, RowTag> dh;
  return hn::PromoteTo(df, hn::LoadU(dh, reinterpret_cast<const hwy::float16_t*>(p)));
}

HWY_INLINE float scalar_f16(const std::byte* p) {
  const hn::CappedTag<float, 1> d1;
  const hn::Rebind<hwy::float16_t, decltype(d1)> dh;
  return hn::GetLane(hn::PromoteTo(d1, hn::LoadU(dh, reinterpret_cast<const hwy::float16_t*>(p))));
}

/// load(df, row, i): elements [i, i + Lanes(df)) of a row; i is a multiple of the number of lanes.
template <DType kType>
struct RowLoader;

template <>
struct RowLoader<DType::kF32> {
  static HWY_INLINE RowVec load(RowTag df, const std::byte* row, size_t i) {
    return hn::LoadU(df, reinterpret_cast<const float*>(row) + i);
  }
};

template <>
struct RowLoader<DType::kF16> {
  static HWY_INLINE RowVec load(RowTag df, const std::byte* row, size_t i) { return promote_f16(df, row + 2 * i); }
};

template <>
struct RowLoader<DType::kBF16> {
  static HWY_INLINE RowVec load(RowTag df, const std::byte* row, size_t i) {
    const hn::Rebind<uint16_t, RowTag> du16;
    const hn::RebindToUnsigned<RowTag> du32;
    const auto bits = hn::PromoteTo(du32, hn::LoadU(du16, reinterpret_cast<const uint16_t*>(row) + i));
    return hn::BitCast(df, hn::ShiftLeft<16>(bits));
  }
};

// ggml's q8_0: per 32 elements an f16 scale and 32 int8.
template <>
struct RowLoader<DType::kQ8_0> {
  static HWY_INLINE RowVec load(RowTag df, const std::byte* row, size_t i) {
    const hn::Rebind<int8_t, RowTag> di8;
    const hn::Rebind<int32_t, RowTag> di32;
    const std::byte* block = row + i / 32 * 34;
    const auto q = hn::PromoteTo(di32, hn::LoadU(di8, reinterpret_cast<const int8_t*>(block + 2 + i % 32)));
    return hn::Mul(hn::Set(df, scalar_f16(block)), hn::ConvertTo(df, q));
  }
};

// ggml's q4_0: per 32 elements an f16 scale and 16 bytes; the low nibbles are elements 0-15, the high ones 16-31,
// minus 8.
template <>
struct RowLoader<DType::kQ4_0> {
  static HWY_INLINE RowVec load(RowTag df, const std::byte* row, size_t i) {
    const hn::Rebind<uint8_t, RowTag> du8;
    const hn::Rebind<int32_t, RowTag> di32;
    const std::byte* block = row + i / 32 * 18;
    const size_t in_block = i % 32;
    const auto bytes = hn::PromoteTo(di32, hn::LoadU(du8, reinterpret_cast<const uint8_t*>(block + 2 + in_block % 16)));
    const auto nibbles = in_block < 16 ? hn::And(bytes, hn::Set(di32, 15)) : hn::ShiftRight<4>(bytes);
    return hn::Mul(hn::Set(df, scalar_f16(block)), hn::ConvertTo(df, hn::Sub(nibbles, hn::Set(di32, 8))));
  }
};

}  // namespace HWY_NAMESPACE
}  // namespace tactic::cpu
HWY_AFTER_NAMESPACE();

#endif
