// V16f as one zmm register.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace trilemma {
namespace {

inline float bits_float(uint32_t b) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(int(b)))); }

struct V16f {
  __m512 v;
};
struct V16u {
  __m512i v;
};

inline __mmask16 first_lanes(int n) { return __mmask16((1u << n) - 1); }

inline V16f set1(float x) { return {_mm512_set1_ps(x)}; }
inline V16f zero() { return {_mm512_setzero_ps()}; }
inline V16f load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline V16f load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
inline void store(float* p, V16f a) { _mm512_storeu_ps(p, a.v); }
inline void store_n(float* p, V16f a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }

inline V16f add(V16f a, V16f b) { return {_mm512_add_ps(a.v, b.v)}; }
inline V16f sub(V16f a, V16f b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline V16f mul(V16f a, V16f b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline V16f div(V16f a, V16f b) { return {_mm512_div_ps(a.v, b.v)}; }
inline V16f fma(V16f a, V16f b, V16f c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline V16f min(V16f a, V16f b) { return {_mm512_min_ps(a.v, b.v)}; }
inline V16f max(V16f a, V16f b) { return {_mm512_max_ps(a.v, b.v)}; }
inline V16f select_less(V16f a, V16f b, V16f x, V16f y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
inline V16f keep_range(V16f a, int begin, int end, float fill) {
  const uint32_t low = begin <= 0 ? 0 : begin >= 16 ? 0xffffu : (1u << begin) - 1;
  const uint32_t high = end >= 16 ? 0xffffu : end <= 0 ? 0 : (1u << end) - 1;
  return {_mm512_mask_blend_ps(__mmask16(high & ~low), _mm512_set1_ps(fill), a.v)};
}
// Lane i and lane i ^ Apart change places.
template <int Apart>
inline V16f swap_lanes(V16f a) {
  if constexpr (Apart == 1) return {_mm512_permute_ps(a.v, 0xb1)};
  if constexpr (Apart == 2) return {_mm512_permute_ps(a.v, 0x4e)};
  if constexpr (Apart == 4) return {_mm512_shuffle_f32x4(a.v, a.v, 0xb1)};
  return {_mm512_shuffle_f32x4(a.v, a.v, 0x4e)};
}
inline __m256 upper_half(__m512 a) { return _mm512_extractf32x8_ps(a, 1); }
inline float reduce_add(V16f a) {
  const __m256 e = _mm256_add_ps(_mm512_castps512_ps256(a.v), upper_half(a.v));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline float reduce_max(V16f a) {
  const __m256 e = _mm256_max_ps(_mm512_castps512_ps256(a.v), upper_half(a.v));
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline V16f scale_pow2(V16f x, V16f n) {
  const __mmask16 number = _mm512_cmp_ps_mask(n.v, n.v, _CMP_ORD_Q);
  const __m512i power = _mm512_slli_epi32(_mm512_maskz_cvttps_epi32(number, n.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x.v), power))};
}
// 2^n for an integral n >= -126 that comes as n + 1.5 * 2^23: the low bits of that float are n.
inline V16f power_of_shifted(V16f a) {
  const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(a.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(power, _mm512_set1_epi32(127 << 23)))};
}

inline __m512 widen_bf16(__m256i b) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16)); }
inline V16f load_bf16(const uint16_t* p) { return {widen_bf16(_mm256_loadu_si256((const __m256i*)p))}; }
inline V16f load_bf16_n(const uint16_t* p, int n) { return {widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p))}; }
inline V16f load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline V16f load_f16_n(const uint16_t* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))};
}
inline V16f load_s8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
// The low and the high four bits of 16 bytes.
inline void load_nibbles(const int8_t* p, V16f& low, V16f& high) {
  const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  low = {_mm512_cvtepi32_ps(_mm512_and_si512(both, _mm512_set1_epi32(15)))};
  high = {_mm512_cvtepi32_ps(_mm512_srli_epi32(both, 4))};
}
inline void store_s8(int8_t* p, V16f a) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

inline V16u abs_bits(V16f a) { return {_mm512_and_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff))}; }
inline V16u max_u(V16u a, V16u b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline float reduce_max_bits(V16u a) { return bits_float(uint32_t(_mm512_reduce_max_epi32(a.v))); }
inline V16f to_bf16(V16f a) {
  const __m512i b = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  r = _mm512_and_epi32(r, _mm512_set1_epi32(int(0xffff0000u)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return {_mm512_castsi512_ps(_mm512_mask_blend_epi32(nan, r, _mm512_set1_epi32(0x7fc00000)))};
}
inline void store_bf16(uint16_t* p, V16f a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(a.v), 16)));
}

// The two bf16 halves of every lane as f32.
inline V16f low_bf16(V16u pairs) { return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs.v, 16))}; }
inline V16f high_bf16(V16u pairs) {
  return {_mm512_castsi512_ps(_mm512_and_epi32(pairs.v, _mm512_set1_epi32(int(0xffff0000u))))};
}

inline V16u load_line(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_line(uint8_t* p, V16u a) { _mm512_storeu_si512(p, a.v); }
// Lanes shifted right (left where Right is negative).
template <int Right>
inline V16u shift_lanes(V16u a) {
  if constexpr (Right == 0) return a;
  if constexpr (Right > 0) return {_mm512_srli_epi32(a.v, Right)};
  return {_mm512_slli_epi32(a.v, -Right & 31)};
}
template <int Right>
inline V16u take_bits(V16u a, uint32_t mask) {
  return {_mm512_and_si512(shift_lanes<Right>(a).v, _mm512_set1_epi32(int(mask)))};
}
// mask ? a : b
inline V16u select_bits(uint32_t mask, V16u a, V16u b) {
  return {_mm512_ternarylogic_epi32(_mm512_set1_epi32(int(mask)), a.v, b.v, 0xca)};
}
inline V16u sub_bytes(V16u a, int offset) { return {_mm512_sub_epi8(a.v, _mm512_set1_epi8(char(offset)))}; }
// table[byte] of every byte below 16.
inline V16u look_up_bytes(V16u a, const uint8_t* table) {
  return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), a.v)};
}
// A look-up: vpermps reads the low four bits of each index only, so no mask, conversion or subtraction is needed.
template <int Shift, int Offset>
inline V16f nibble(V16u line) {
  const __m512 values = _mm512_setr_ps(0 - Offset, 1 - Offset, 2 - Offset, 3 - Offset, 4 - Offset, 5 - Offset,
                                       6 - Offset, 7 - Offset, 8 - Offset, 9 - Offset, 10 - Offset, 11 - Offset,
                                       12 - Offset, 13 - Offset, 14 - Offset, 15 - Offset);
  return {_mm512_permutexvar_ps(_mm512_srli_epi32(line.v, Shift), values)};
}
template <int Byte>
inline V16f signed_byte(V16u line) {
  return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(line.v, 24 - 8 * Byte), 24))};
}

}  // namespace
}  // namespace trilemma
