// Where a stored row lies in device memory, and eight of its elements in registers, as halves or as floats.
#pragma once

#include <cuda_fp8.h>

#include "cuda/device.cuh"
#include "cuda/params.h"

namespace tactic::cuda {

/// Byte offset of a row of one sequence and head. `pages`: the sequence's page table, or nullptr.
__device__ __forceinline__ int64_t row_offset(const DeviceRows& rows, const int32_t* pages, int32_t row) {
  if (pages == nullptr) return row * rows.token_stride_bytes;
  const int32_t page = row / rows.page_tokens;
  return __ldg(pages + page) * rows.page_stride_bytes + (row - page * rows.page_tokens) * rows.token_stride_bytes;
}

/// The page table of a sequence, or nullptr.
__device__ __forceinline__ const int32_t* pages_of(const DecodeBatch& batch, int sequence) {
  return batch.page_tables == nullptr ? nullptr : batch.page_tables + static_cast<int64_t>(sequence) * batch.max_pages;
}
/// From where row_offset() counts.
__device__ __forceinline__ const std::byte* rows_of(const DeviceRows& rows, const int32_t* pages, int sequence,
                                                    int head) {
  return static_cast<const std::byte*>(rows.data) + (pages == nullptr ? sequence * rows.sequence_stride_bytes : 0) +
         head * rows.head_stride_bytes;
}

/// How eight neighbouring elements of a row become a uint4 of halves (f16 or bf16, whatever the type computes in).
template <DType kDType>
struct Chunk;

template <>
struct Chunk<DType::kF16> {
  static constexpr bool kBf16 = false;
  static __device__ __forceinline__ uint4 load(const std::byte* row, int chunk) {
    return load_stream(row + chunk * 16);
  }
};

template <>
struct Chunk<DType::kBF16> {
  static constexpr bool kBf16 = true;
  static __device__ __forceinline__ uint4 load(const std::byte* row, int chunk) {
    return load_stream(row + chunk * 16);
  }
};

/// Eight bytes. Every value is one of f16 too.
template <>
struct Chunk<DType::kF8E4M3> {
  static constexpr bool kBf16 = false;
  static __device__ __forceinline__ uint4 load(const std::byte* row, int chunk) {
    uint2 codes;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
                 : "=r"(codes.x), "=r"(codes.y)
                 : "l"(row + chunk * 8));
    return {halves(codes.x & 0xFFFFu), halves(codes.x >> 16), halves(codes.y & 0xFFFFu), halves(codes.y >> 16)};
  }
  static __device__ __forceinline__ uint32_t halves(uint32_t pair) {
    const __half2_raw x = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3);
    return x.x | static_cast<uint32_t>(x.y) << 16;
  }
};

template <DType kDType>
__host__ __device__ constexpr int stored_bytes(int dim) {
  return kDType == DType::kF8E4M3 ? dim
         : kDType == DType::kQ8_0 ? dim / 32 * 34
         : kDType == DType::kQ4_0 ? dim / 32 * 18
                                  : 2 * dim;
}

/// core's check_row of `bytes` bytes at an even address: eight of them, wherever they begin.
__device__ __forceinline__ uint32_t check_row(const std::byte* data, int bytes, int32_t row) {
  const uint64_t mix = (static_cast<uint64_t>(row) + 1) * 0x9E3779B97F4A7C15u;
  const auto at = reinterpret_cast<uintptr_t>(data) + (((mix >> 32) * static_cast<uint64_t>(bytes - 7)) >> 32);
  const auto* words = reinterpret_cast<const uint32_t*>(at & ~uintptr_t{3});  // no word without a byte of the row
  const auto shift = static_cast<uint32_t>(at & 3) * 8;
  const uint32_t first = __ldg(words), second = __ldg(words + 1), third = shift != 0 ? __ldg(words + 2) : 0;
  const uint64_t word =
      static_cast<uint64_t>(__funnelshift_r(second, third, shift)) << 32 | __funnelshift_r(first, second, shift);
  return static_cast<uint32_t>(((word ^ mix) * 0xC2B2AE3D27D4EB4Fu) >> 60);
}

/// What a head's stored values are multiplied by.
template <DType kDType>
__device__ __forceinline__ float head_scale(const DeviceRows& rows, int head) {
  if constexpr (kDType == DType::kF8E4M3) {
    return rows.head_scales != nullptr ? __ldg(rows.head_scales + head) : 1.0f;
  } else {
    return 1.0f;
  }
}

/// Rows of blocks of 32 elements, an f16 scale and integers. Derived: kBlockBytes, and integers(block, chunk of the
/// block), which leaves eight of them in halves. They are exact; scaled halves are rounded, as tensor cores want them.
template <class Derived>
struct BlockChunk {
  static constexpr bool kBf16 = false;
  static __device__ __forceinline__ const uint16_t* block(const std::byte* row, int chunk) {
    return reinterpret_cast<const uint16_t*>(row + (chunk >> 2) * Derived::kBlockBytes);
  }
  static __device__ __forceinline__ uint4 load(const std::byte* row, int chunk) {
    const __half2 scale = __half2half2(__ushort_as_half(__ldg(block(row, chunk))));
    uint4 halves = Derived::integers(block(row, chunk), chunk & 3);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t& word = (&halves.x)[i];
      const __half2 scaled = __hmul2(*reinterpret_cast<const __half2*>(&word), scale);
      word = *reinterpret_cast<const uint32_t*>(&scaled);
    }
    return halves;
  }
  /// A pair of bytes, each of a code and kZero, as halves of the codes.
  template <int kZero>
  static __device__ __forceinline__ uint32_t pair(uint32_t bytes) {
    const uint32_t biased = __byte_perm(bytes, 0x64646464u, 0x4140);  // f16 1024 + byte
    const __half2 value = __hsub2(*reinterpret_cast<const __half2*>(&biased), __float2half2_rn(1024 + kZero));
    return *reinterpret_cast<const uint32_t*>(&value);
  }
};

/// 32 signed bytes. Rows lie at even addresses.
template <>
struct Chunk<DType::kQ8_0> : BlockChunk<Chunk<DType::kQ8_0>> {
  static constexpr int kBlockBytes = 34;
  static __device__ __forceinline__ uint4 integers(const uint16_t* block, int chunk) {
    const uint16_t* codes = block + 1 + chunk * 4;
    const auto at = [&](int i) { return pair<128>(__ldg(codes + i) ^ 0x8080u); };
    return {at(0), at(1), at(2), at(3)};
  }
};

/// 16 bytes; the low nibbles are elements 0..15, the high ones 16..31.
template <>
struct Chunk<DType::kQ4_0> : BlockChunk<Chunk<DType::kQ4_0>> {
  static constexpr int kBlockBytes = 18;
  static __device__ __forceinline__ uint4 integers(const uint16_t* block, int chunk) {
    const uint16_t* codes = block + 1 + (chunk & 1) * 4;
    const int shift = (chunk & 2) * 2;
    const auto at = [&](int i) { return pair<8>((__ldg(codes + i) >> shift) & 0x0F0Fu); };
    return {at(0), at(1), at(2), at(3)};
  }
};

/// Eight neighbouring elements of a row, exactly.
template <DType kDType>
__device__ __forceinline__ void load_floats(const std::byte* row, int chunk, float (&x)[8]) {
  using C = Chunk<kDType>;
  float scale = 1;
  uint4 halves;
  if constexpr (kDType == DType::kQ8_0 || kDType == DType::kQ4_0) {
    scale = __half2float(__ushort_as_half(__ldg(C::block(row, chunk))));
    halves = C::integers(C::block(row, chunk), chunk & 3);
  } else {
    halves = C::load(row, chunk);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = (&halves.x)[i];
    float2 pair;
    if constexpr (C::kBf16) {
      pair = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&word));
    } else {
      pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
    }
    x[2 * i] = scale * pair.x;
    x[2 * i + 1] = scale * pair.y;
  }
}

}  // namespace tactic::cuda
