// How each type of cache is multiplied: what a vector of it holds, what a query or a softmax weight is rounded to, and
// the product itself. A line is a vector of 16 positions (keys) or 16 dimensions (values) with `kStep` values a lane.
//
// f32: one value a lane. bf16: pairs, multiplied by the processor's own instruction where there is one, else as two f32
// products; queries and weights are rounded to bf16 on every instruction set, so that they differ by rounding only.
// int8 and int4: see attention_int8.h and attention_int4.h; what the matrix unit does: attention_tiles.h.
#pragma once

#include "attention_int4.h"

namespace trilemma {
namespace {

// What all products in f32 have in common: sums start where they are told to.
template <class OneFactor>
struct FloatProduct {
  using Factor = OneFactor;
  using Sum = V16f;
  static constexpr int kSums = 1, kPacked = 1;
  static constexpr bool kOffset = false, kHalves = false;

  struct Row {
    Factor* factors;
  };
  static Sum start(const Row&) { return zero(); }
  static V16f value(Sum sum, const Row&) { return sum; }
};

// `Product::round` of two vectors that lie side by side, added to `sum`.
template <class Product>
inline V16f round_two(V16f sum, V16f x, V16f y, typename Product::Factor* out) {
  return add(add(sum, Product::round(x, out)), Product::round(y, out + 16));
}

struct F32Product : FloatProduct<float> {
  using Cell = float;
  using Line = V16f;
  static constexpr int kStep = 1, kFactors = 1, kParts = 1;

  template <int>
  static Line line(const Cell* p) {
    return load(p);
  }
  static Line first_of(const Cell* p, int) { return load(p); }
  template <int>
  static void add(Sum& sum, const Line& line, const Factor* factor) {
    sum = fma(set1(*factor), line, sum);
  }
  // Stores x rounded to factors; returns their values.
  static V16f round(V16f x, Factor* out) {
    store(out, x);
    return x;
  }
};

#if defined(TRILEMMA_SIMD_BF16)
struct Bf16Product : FloatProduct<uint16_t> {
  using Cell = uint16_t;
  using Line = V16u;
  static constexpr int kStep = 2, kFactors = 2, kParts = 1;

  template <int>
  static Line line(const Cell* p) {
    return {_mm512_loadu_si512(p)};
  }
  // A line whose second values were never stored.
  static Line first_of(const Cell* p, int) { return {_mm512_and_si512(line<0>(p).v, _mm512_set1_epi32(0xffff))}; }
  template <int>
  static void add(Sum& sum, const Line& line, const Factor* factor) {
    int32_t pair;
    __builtin_memcpy(&pair, factor, 4);
    sum.v = _mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)line.v);
  }
  static V16f round(V16f x, Factor* out) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(x.v);
    _mm256_storeu_si256((__m256i*)out, rounded);
    return {widen_bf16(rounded)};
  }
};

template <>
inline V16f round_two<Bf16Product>(V16f sum, V16f x, V16f y, uint16_t* out) {
  const __m512bh rounded = _mm512_cvtne2ps_pbh(y.v, x.v);
  _mm512_storeu_si512(out, (__m512i)rounded);
  return {_mm512_dpbf16_ps(sum.v, rounded, (__m512bh)_mm512_set1_epi32(0x3f803f80))};  // times one
}
#else
struct Bf16Product : FloatProduct<float> {
  using Cell = uint16_t;
  using Line = V16f;
  static constexpr int kStep = 2, kFactors = 2, kParts = 2;

  template <int Part>
  static Line line(const Cell* p) {
    const V16u pairs = load_line(reinterpret_cast<const uint8_t*>(p));
    return Part ? high_bf16(pairs) : low_bf16(pairs);
  }
  // A line whose second values were never stored.
  static Line first_of(const Cell* p, int) { return line<0>(p); }
  template <int Part>
  static void add(Sum& sum, const Line& line, const Factor* factor) {
    sum = fma(set1(factor[Part]), line, sum);
  }
  static V16f round(V16f x, Factor* out) {
    const V16f rounded = to_bf16(x);
    store(out, rounded);
    return rounded;
  }
};
#endif

// `kDegree`: of the polynomial behind a weight, as exact as what the weight is rounded to.
struct CacheF32 {
  using Keys = F32Product;
  using Values = F32Product;
  static constexpr int kDegree = 6;
  static constexpr bool kInteger = false;
};

struct CacheBf16 {
  using Keys = Bf16Product;
  using Values = Bf16Product;
  static constexpr int kDegree = 4;
  static constexpr bool kInteger = false;
};

struct CacheInt8 {
#if defined(TRILEMMA_SIMD_AMX)
  using Keys = Int8Tiled;
  using Values = Int8Tiled;
#else
  using Keys = Int8Keys;
  using Values = Int8Values;
#endif
  static constexpr int kDegree = 4;
  static constexpr bool kInteger = true;
};

struct CacheInt4 {
  using Keys = Int4Keys;
  using Values = Int4Values;
  static constexpr int kDegree = 4;
  static constexpr bool kInteger = true;
};

}  // namespace
}  // namespace trilemma
