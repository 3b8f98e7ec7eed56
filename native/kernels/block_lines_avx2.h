// The lines of a block (32 columns of 16 rows) as u8 operands in pairs of ymm registers, for what multiplies them with
// broadcast s8 inputs: four columns a line, both halves of the rows share a broadcast.
#pragma once

#include "panel.h"

namespace trilemma {
namespace {

constexpr int kIntTokens = 8, kDotTokens = 4;

// Lines as they lie in memory, or as bytes once for all tokens of a tile.
template <class C, bool Expanded = C::kExpands>
struct BlockWeights {
  const uint8_t* packed;

  explicit BlockWeights(const uint8_t* codes) : packed(codes) {}

  // Columns 4 * I .. of the block, as they are stored.
  template <int I, int T>
  TRILEMMA_INLINE V16u line() const {
    if constexpr (C::kBits == 4) return code_line<4, I>(packed);
    return load_line(packed + 64 * I);
  }
};
template <class C>
struct BlockWeights<C, true> {
  const uint8_t* packed;
  alignas(64) uint8_t bytes[8 * 64];

  explicit BlockWeights(const uint8_t* codes) : packed(codes) { expand_codes<C, 0>(codes, bytes); }

  // One token takes them from the registers in which they were joined; nobody then reads the bytes.
  template <int I, int T>
  TRILEMMA_INLINE V16u line() const {
    if constexpr (T == 1) return byte_line<C, 0, I>(packed);
    return load_line(bytes + 64 * I);
  }
};

TRILEMMA_INLINE __m256i broadcast4(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

// Sums as floats: a conversion, or what their start has made of their bits.
template <class C>
TRILEMMA_INLINE V16f as_float(V16u sum) {
  if (C::kSharedRows) return {_mm256_castsi256_ps(sum.lo), _mm256_castsi256_ps(sum.hi)};
  return {_mm256_cvtepi32_ps(sum.lo), _mm256_cvtepi32_ps(sum.hi)};
}

// Keeps a chain of additions in its order: reassociated, all products of a block would wait for each other in memory.
TRILEMMA_INLINE void pin(__m256i& a) { __asm__("" : "+x"(a)); }

}  // namespace
}  // namespace trilemma
