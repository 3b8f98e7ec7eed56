// Attention over an int4 cache: the integer products of an int8 one over codes of 0 to 15.
//
// A head's dimensions are stored as sums and differences (hadamard.h), which queries become too and sums of values are
// turned back from. value = scale * code + minimum for each head and position; what the minima add is one number for a
// row and position (keys), or for a row and tile (values). Every byte holds two codes: dimensions 4 apart of a key, 16
// apart of a value, so that each line of 64 bytes is two of an int8 cache's.
#pragma once

#include "attention_int8.h"

namespace trilemma {
namespace {

// The codes in the low or high halves of a line's bytes, as Int8Product multiplies them.
#if defined(TRILEMMA_SIMD_AVX512)
inline __m512i half_line(const uint8_t* p, bool high) {
  const __m512i bytes = _mm512_loadu_si512(p);
  return _mm512_and_si512(high ? _mm512_srli_epi16(bytes, 4) : bytes, _mm512_set1_epi8(15));
}
#elif defined(TRILEMMA_SIMD_NEON)
inline Int8Product::Line half_line(const uint8_t* p, bool high) {
  Int8Product::Line l;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const uint8x16_t bytes = vld1q_u8(p + 16 * i);
    l.q[i] = vreinterpretq_s8_u8(high ? vshrq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(15)));
  }
  return l;
}
#elif defined(TRILEMMA_SIMD_AVX2)
inline Int8Product::Line half_line(const uint8_t* p, bool high) {
  const __m256i mask = _mm256_set1_epi16(15);
  Int8Product::Line l;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(p + 16 * i)));
    l.q[i] = high ? _mm256_srli_epi16(words, 4) : _mm256_and_si256(words, mask);
  }
  return l;
}
#else
inline Int8Product::Line half_line(const uint8_t* p, bool high) {
  Int8Product::Line l;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) l.v[i][j] = int8_t(high ? p[4 * i + j] >> 4 : p[4 * i + j] & 15);
  return l;
}
#endif

// The codes of the first `count` of a line's four positions.
inline Int8Product::Line half_line_of(const uint8_t* p, bool high, int count) {
  alignas(64) uint8_t bytes[64] = {};
  for (int i = 0; i < 64; i += 4) __builtin_memcpy(bytes + i, p + i, size_t(count));
  return half_line(bytes, high);
}

struct Int4Keys : Int8Product {
  using Cell = uint8_t;
  struct Row : Int8Product::Row {
    float sum;  // of the rounded query: what a position's minimum is multiplied with
  };
  static constexpr int kStep = 8, kParts = 2, kFactors = 2 * Int8Product::kFactors, kPacked = 2;
  static constexpr bool kOffset = true;

  template <int Part>
  static Line line(const uint8_t* p) {
    return half_line(p, Part);
  }
  static Sum start(const Row&) { return Int8Values::start({}); }
  template <int Part>
  static void add(Sum& sum, const Line& line, const Factor* factor) {
    add_codes(sum, line, factor + Part * Int8Product::kFactors);
  }
  static void set_start(Row&, int) {}
};

struct Int4Values : Int8Product {
  using Cell = uint8_t;
  static constexpr int kPacked = 2;
  static constexpr bool kOffset = true, kHalves = true;

  static Sum start(const Row&) { return Int8Values::start({}); }
  template <int>
  static void add(Sum& sum, const Line& line, const Factor* factor) {
    add_codes(sum, line, factor);
  }
};

}  // namespace
}  // namespace trilemma
