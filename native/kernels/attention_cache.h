// How each type of cache is multiplied: what a vector of it holds, what a query or a softmax weight is rounded to, and
// the product itself. A line is a vector of 16 positions (keys) or 16 dimensions (values) with `kStep` values a lane.
//
// f32: one value a lane. bf16: pairs, multiplied by the processor's own instruction where there is one, else as two f32
// products; queries and weights are rounded to bf16 on every instruction set, so that they differ by rounding only.
#pragma once

#include "table.h"
#include "vmath.h"

namespace trilemma {
namespace {

// Sums that a register tile may hold, and rows of it at most; with few rows more vectors keep the units busy.
#if defined(TRILEMMA_SIMD_AVX512)
constexpr int kTileRows = 8, kTileSums = 16, kTileVectors = 8;
#elif defined(TRILEMMA_SIMD_AVX2)
constexpr int kTileRows = 2, kTileSums = 4, kTileVectors = 4;
#elif defined(TRILEMMA_SIMD_NEON)
constexpr int kTileRows = 2, kTileSums = 4, kTileVectors = 2;
#else
constexpr int kTileRows = 1, kTileSums = 1, kTileVectors = 1;
#endif

struct CacheF32 {
  using Cell = float;
  using Factor = float;
  using Line = V16f;
  static constexpr int kStep = 1, kParts = 1, kDegree = 6;
  static constexpr bool kScaled = false;

  template <int>
  static Line line(const Cell* p) {
    return load(p);
  }
  template <int>
  static V16f multiply(V16f sum, Line line, const Factor* factor) {
    return fma(set1(*factor), line, sum);
  }
  static V16f round(V16f x, Factor* out) {
    store(out, x);
    return x;
  }
};

struct CacheInt8 : CacheF32 {
  using Cell = int8_t;
  static constexpr bool kScaled = true;

  template <int>
  static Line line(const Cell* p) {
    return load_s8(p);
  }
};

#if defined(TRILEMMA_SIMD_BF16)
struct CacheBf16 {
  using Cell = uint16_t;
  using Factor = uint16_t;
  using Line = V16u;
  static constexpr int kStep = 2, kParts = 1, kDegree = 4;
  static constexpr bool kScaled = false;

  template <int>
  static Line line(const Cell* p) {
    return {_mm512_loadu_si512(p)};
  }
  template <int>
  static V16f multiply(V16f sum, Line line, const Factor* factor) {
    int32_t pair;
    __builtin_memcpy(&pair, factor, 4);
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)line.v)};
  }
  // Of a line whose second values were never stored.
  static V16f multiply_first(V16f sum, const Cell* p, int, const Factor* factor) {
    return multiply<0>(sum, {_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(0xffff))}, factor);
  }
  // Stores x rounded to factors; returns their values.
  static V16f round(V16f x, Factor* out) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(x.v);
    _mm256_storeu_si256((__m256i*)out, rounded);
    return {widen_bf16(rounded)};
  }
};
#else
struct CacheBf16 {
  using Cell = uint16_t;
  using Factor = float;
  using Line = V16f;
  static constexpr int kStep = 2, kParts = 2, kDegree = 4;
  static constexpr bool kScaled = false;

  template <int Part>
  static Line line(const Cell* p) {
    const V16u pairs = load_line(reinterpret_cast<const uint8_t*>(p));
    return Part ? high_bf16(pairs) : low_bf16(pairs);
  }
  template <int Part>
  static V16f multiply(V16f sum, Line line, const Factor* factor) {
    return fma(set1(factor[Part]), line, sum);
  }
  // Of a line whose second values were never stored.
  static V16f multiply_first(V16f sum, const Cell* p, int, const Factor* factor) {
    return multiply<0>(sum, line<0>(p), factor);
  }
  static V16f round(V16f x, Factor* out) {
    const V16f rounded = to_bf16(x);
    store(out, rounded);
    return rounded;
  }
};
#endif

}  // namespace
}  // namespace trilemma
