// V16f as two ymm registers: lanes 0-7 and 8-15.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace trilemma {
namespace {

inline float bits_float(uint32_t b) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(int(b)))); }

struct V16f {
  __m256 lo, hi;
};
struct V16u {
  __m256i lo, hi;
};

inline __m256i lane_numbers(int first) {
  return _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(first));
}
inline __m256i lanes_below(int n, int first) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane_numbers(first)); }

inline V16f set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V16f zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline V16f load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline V16f load_n(const float* p, int n) {
  return {_mm256_maskload_ps(p, lanes_below(n, 0)), _mm256_maskload_ps(p + 8, lanes_below(n, 8))};
}
inline void store(float* p, V16f a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline void store_n(float* p, V16f a, int n) {
  _mm256_maskstore_ps(p, lanes_below(n, 0), a.lo);
  _mm256_maskstore_ps(p + 8, lanes_below(n, 8), a.hi);
}

inline V16f add(V16f a, V16f b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline V16f sub(V16f a, V16f b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline V16f mul(V16f a, V16f b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline V16f div(V16f a, V16f b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline V16f fma(V16f a, V16f b, V16f c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline V16f min(V16f a, V16f b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline V16f max(V16f a, V16f b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline V16f select_less(V16f a, V16f b, V16f x, V16f y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
inline V16f keep_range(V16f a, int begin, int end, float fill) {
  const __m256 f = _mm256_set1_ps(fill);
  const __m256i lo = _mm256_andnot_si256(lanes_below(begin, 0), lanes_below(end, 0));
  const __m256i hi = _mm256_andnot_si256(lanes_below(begin, 8), lanes_below(end, 8));
  return {_mm256_blendv_ps(f, a.lo, _mm256_castsi256_ps(lo)), _mm256_blendv_ps(f, a.hi, _mm256_castsi256_ps(hi))};
}
// Lane i and lane i ^ Apart change places.
template <int Apart>
inline V16f swap_lanes(V16f a) {
  if constexpr (Apart == 1) return {_mm256_permute_ps(a.lo, 0xb1), _mm256_permute_ps(a.hi, 0xb1)};
  if constexpr (Apart == 2) return {_mm256_permute_ps(a.lo, 0x4e), _mm256_permute_ps(a.hi, 0x4e)};
  if constexpr (Apart == 4) return {_mm256_permute2f128_ps(a.lo, a.lo, 1), _mm256_permute2f128_ps(a.hi, a.hi, 1)};
  return {a.hi, a.lo};
}
inline float reduce_add(V16f a) {
  const __m256 e = _mm256_add_ps(a.lo, a.hi);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline float reduce_max(V16f a) {
  const __m256 e = _mm256_max_ps(a.lo, a.hi);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline __m256 scale_pow2_half(__m256 x, __m256 n) {
  const __m256 number = _mm256_and_ps(n, _mm256_cmp_ps(n, n, _CMP_ORD_Q));
  const __m256i power = _mm256_slli_epi32(_mm256_cvttps_epi32(number), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), power));
}
inline V16f scale_pow2(V16f x, V16f n) { return {scale_pow2_half(x.lo, n.lo), scale_pow2_half(x.hi, n.hi)}; }
// 2^n for an integral n >= -126 that comes as n + 1.5 * 2^23: the low bits of that float are n.
inline __m256 power_of_shifted_half(__m256 a) {
  const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(a), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(power, _mm256_set1_epi32(127 << 23)));
}
inline V16f power_of_shifted(V16f a) { return {power_of_shifted_half(a.lo), power_of_shifted_half(a.hi)}; }

inline __m256 widen_bf16(__m128i b) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(b), 16)); }
inline V16f load_bf16(const uint16_t* p) {
  return {widen_bf16(_mm_loadu_si128((const __m128i*)p)), widen_bf16(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline V16f load_bf16_n(const uint16_t* p, int n) {
  uint16_t b[16] = {};
  memcpy(b, p, size_t(n) * 2);
  return load_bf16(b);
}
inline V16f load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline V16f load_f16_n(const uint16_t* p, int n) {
  uint16_t b[16] = {};
  memcpy(b, p, size_t(n) * 2);
  return load_f16(b);
}
inline V16f load_s8(const int8_t* p) {
  const __m128i b = _mm_loadu_si128((const __m128i*)p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(b, 8)))};
}
inline __m128i narrow_s16(__m256 a) {
  const __m256i i = _mm256_cvtps_epi32(a);
  return _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
}
// The low and the high four bits of 16 bytes.
inline void load_nibbles(const int8_t* p, V16f& low, V16f& high) {
  const __m128i b = _mm_loadu_si128((const __m128i*)p);
  const __m256i first = _mm256_cvtepu8_epi32(b), second = _mm256_cvtepu8_epi32(_mm_srli_si128(b, 8));
  const __m256i mask = _mm256_set1_epi32(15);
  low = {_mm256_cvtepi32_ps(_mm256_and_si256(first, mask)), _mm256_cvtepi32_ps(_mm256_and_si256(second, mask))};
  high = {_mm256_cvtepi32_ps(_mm256_srli_epi32(first, 4)), _mm256_cvtepi32_ps(_mm256_srli_epi32(second, 4))};
}
inline void store_s8(int8_t* p, V16f a) {
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(narrow_s16(a.lo), narrow_s16(a.hi)));
}

inline V16u abs_bits(V16f a) {
  const __m256i m = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_and_si256(_mm256_castps_si256(a.lo), m), _mm256_and_si256(_mm256_castps_si256(a.hi), m)};
}
inline V16u max_u(V16u a, V16u b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
inline float reduce_max_bits(V16u a) {
  const __m256i e = _mm256_max_epi32(a.lo, a.hi);
  __m128i q = _mm_max_epi32(_mm256_castsi256_si128(e), _mm256_extracti128_si256(e, 1));
  q = _mm_max_epi32(q, _mm_shuffle_epi32(q, 0x4e));
  q = _mm_max_epi32(q, _mm_shuffle_epi32(q, 0xb1));
  return bits_float(uint32_t(_mm_cvtsi128_si32(q)));
}
inline __m256 to_bf16_half(__m256 a) {
  const __m256i b = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  r = _mm256_and_si256(r, _mm256_set1_epi32(int(0xffff0000u)));
  const __m256 quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  return _mm256_blendv_ps(_mm256_castsi256_ps(r), quiet, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}
inline V16f to_bf16(V16f a) { return {to_bf16_half(a.lo), to_bf16_half(a.hi)}; }
inline __m128i narrow_bf16(__m256 a) {
  const __m256i i = _mm256_srli_epi32(_mm256_castps_si256(a), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
}
inline void store_bf16(uint16_t* p, V16f a) {
  _mm_storeu_si128((__m128i*)p, narrow_bf16(a.lo));
  _mm_storeu_si128((__m128i*)(p + 8), narrow_bf16(a.hi));
}

inline V16u load_line(const uint8_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
inline void store_line(uint8_t* p, V16u a) {
  _mm256_storeu_si256((__m256i*)p, a.lo);
  _mm256_storeu_si256((__m256i*)(p + 32), a.hi);
}
template <int Right>
inline __m256i shift_half(__m256i a) {
  return Right >= 0 ? _mm256_srli_epi32(a, Right & 31) : _mm256_slli_epi32(a, -Right & 31);
}
// The masked bits of lanes shifted right (left where Right is negative).
template <int Right>
inline V16u take_bits(V16u a, uint32_t mask) {
  const __m256i m = _mm256_set1_epi32(int(mask));
  return {_mm256_and_si256(shift_half<Right>(a.lo), m), _mm256_and_si256(shift_half<Right>(a.hi), m)};
}
// low | (a >> Right & mask)
template <int Right>
inline V16u join_bits(V16u low, V16u a, uint32_t mask) {
  const V16u bits = take_bits<Right>(a, mask);
  return {_mm256_or_si256(low.lo, bits.lo), _mm256_or_si256(low.hi, bits.hi)};
}
inline V16u sub_bytes(V16u a, int offset) {
  const __m256i o = _mm256_set1_epi8(char(offset));
  return {_mm256_sub_epi8(a.lo, o), _mm256_sub_epi8(a.hi, o)};
}
// table[byte] of every byte below 16.
inline V16u look_up_bytes(V16u a, const uint8_t* table) {
  const __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
  return {_mm256_shuffle_epi8(values, a.lo), _mm256_shuffle_epi8(values, a.hi)};
}
// The two bf16 halves of every lane as f32.
inline V16f low_bf16(V16u pairs) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs.lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(pairs.hi, 16))};
}
inline V16f high_bf16(V16u pairs) {
  const __m256i mask = _mm256_set1_epi32(int(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(pairs.lo, mask)), _mm256_castsi256_ps(_mm256_and_si256(pairs.hi, mask))};
}

template <int Shift, int Offset>
inline __m256 nibble_half(__m256i line) {
  const __m256i code = _mm256_and_si256(_mm256_srli_epi32(line, Shift), _mm256_set1_epi32(15));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(code, _mm256_set1_epi32(Offset)));
}
template <int Shift, int Offset>
inline V16f nibble(V16u line) {
  return {nibble_half<Shift, Offset>(line.lo), nibble_half<Shift, Offset>(line.hi)};
}
template <int Byte>
inline __m256 signed_byte_half(__m256i line) {
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(line, 24 - 8 * Byte), 24));
}
template <int Byte>
inline V16f signed_byte(V16u line) {
  return {signed_byte_half<Byte>(line.lo), signed_byte_half<Byte>(line.hi)};
}

}  // namespace
}  // namespace trilemma
