// V16f as an array of 16 floats: the portable version, and the definition the others are tested against.
#pragma once

#include <stdint.h>
#include <string.h>

namespace trilemma {
namespace {

inline float bits_float(uint32_t b) {
  float f;
  memcpy(&f, &b, 4);
  return f;
}
inline uint32_t float_bits(float f) {
  uint32_t b;
  memcpy(&b, &f, 4);
  return b;
}
float half_to_float(uint16_t h);

struct V16f {
  float v[16];
};
struct V16u {
  uint32_t v[16];
};

#define TRILEMMA_EACH for (int i = 0; i < 16; ++i)

inline V16f set1(float x) {
  V16f r;
  TRILEMMA_EACH r.v[i] = x;
  return r;
}
inline V16f zero() { return set1(0.0f); }
inline V16f load(const float* p) {
  V16f r;
  memcpy(r.v, p, sizeof r.v);
  return r;
}
inline V16f load_n(const float* p, int n) {
  V16f r = zero();
  memcpy(r.v, p, size_t(n) * 4);
  return r;
}
inline void store(float* p, V16f a) { memcpy(p, a.v, sizeof a.v); }
inline void store_n(float* p, V16f a, int n) { memcpy(p, a.v, size_t(n) * 4); }

inline V16f add(V16f a, V16f b) {
  TRILEMMA_EACH a.v[i] += b.v[i];
  return a;
}
inline V16f sub(V16f a, V16f b) {
  TRILEMMA_EACH a.v[i] -= b.v[i];
  return a;
}
inline V16f mul(V16f a, V16f b) {
  TRILEMMA_EACH a.v[i] *= b.v[i];
  return a;
}
inline V16f div(V16f a, V16f b) {
  TRILEMMA_EACH a.v[i] /= b.v[i];
  return a;
}
inline V16f fma(V16f a, V16f b, V16f c) {
  TRILEMMA_EACH a.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return a;
}
// As x86 does: the second operand where either is NaN.
inline V16f min(V16f a, V16f b) {
  TRILEMMA_EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline V16f max(V16f a, V16f b) {
  TRILEMMA_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
// a < b ? x : y
inline V16f select_less(V16f a, V16f b, V16f x, V16f y) {
  TRILEMMA_EACH x.v[i] = a.v[i] < b.v[i] ? x.v[i] : y.v[i];
  return x;
}
// Lanes outside [begin, end) become `fill`.
inline V16f keep_range(V16f a, int begin, int end, float fill) {
  TRILEMMA_EACH if (i < begin || i >= end) a.v[i] = fill;
  return a;
}
// Lane i and lane i ^ Apart change places.
template <int Apart>
inline V16f swap_lanes(V16f a) {
  V16f r;
  TRILEMMA_EACH r.v[i] = a.v[i ^ Apart];
  return r;
}
inline float reduce_add(V16f a) {
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  return a.v[0];
}
inline float reduce_max(V16f a) {
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) a.v[i] = a.v[i] > a.v[i + width] ? a.v[i] : a.v[i + width];
  return a.v[0];
}
// x * 2^n for integral n, by the exponent field; the result must be normal.
inline V16f scale_pow2(V16f x, V16f n) {
  TRILEMMA_EACH {
    const int32_t power = n.v[i] == n.v[i] ? int32_t(n.v[i]) : 0;
    x.v[i] = bits_float(float_bits(x.v[i]) + (uint32_t(power) << 23));
  }
  return x;
}
// 2^n for an integral n >= -126 that comes as n + 1.5 * 2^23: the low bits of that float are n.
inline V16f power_of_shifted(V16f a) {
  TRILEMMA_EACH a.v[i] = bits_float((float_bits(a.v[i]) << 23) + (127u << 23));
  return a;
}

inline V16f load_bf16(const uint16_t* p) {
  V16f r;
  TRILEMMA_EACH r.v[i] = bits_float(uint32_t(p[i]) << 16);
  return r;
}
inline V16f load_bf16_n(const uint16_t* p, int n) {
  uint16_t b[16] = {};
  memcpy(b, p, size_t(n) * 2);
  return load_bf16(b);
}
inline V16f load_f16(const uint16_t* p) {
  V16f r;
  TRILEMMA_EACH r.v[i] = half_to_float(p[i]);
  return r;
}
inline V16f load_f16_n(const uint16_t* p, int n) {
  uint16_t b[16] = {};
  memcpy(b, p, size_t(n) * 2);
  return load_f16(b);
}
inline V16f load_s8(const int8_t* p) {
  V16f r;
  TRILEMMA_EACH r.v[i] = float(p[i]);
  return r;
}
// Integral values in [-128, 127].
// The low and the high four bits of 16 bytes.
inline void load_nibbles(const int8_t* p, V16f& low, V16f& high) {
  TRILEMMA_EACH {
    low.v[i] = float(uint8_t(p[i]) & 15);
    high.v[i] = float(uint8_t(p[i]) >> 4);
  }
}
inline void store_s8(int8_t* p, V16f a) { TRILEMMA_EACH p[i] = int8_t(a.v[i]); }

inline V16u abs_bits(V16f a) {
  V16u r;
  TRILEMMA_EACH r.v[i] = float_bits(a.v[i]) & 0x7fffffffu;
  return r;
}
inline V16u max_u(V16u a, V16u b) {
  TRILEMMA_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline float reduce_max_bits(V16u a) {
  uint32_t m = 0;
  TRILEMMA_EACH m = a.v[i] > m ? a.v[i] : m;
  return bits_float(m);
}
// Rounded to bf16 (nearest even), as f32 values; NaN becomes the quiet NaN 0x7fc0.
inline V16f to_bf16(V16f a) {
  TRILEMMA_EACH {
    const uint32_t b = float_bits(a.v[i]);
    a.v[i] = a.v[i] == a.v[i] ? bits_float((b + 0x7fffu + ((b >> 16) & 1)) & 0xffff0000u) : bits_float(0x7fc00000u);
  }
  return a;
}
// Values that are bf16 already.
inline void store_bf16(uint16_t* p, V16f a) { TRILEMMA_EACH p[i] = uint16_t(float_bits(a.v[i]) >> 16); }

inline V16u load_line(const uint8_t* p) {
  V16u r;
  memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void store_line(uint8_t* p, V16u a) { memcpy(p, a.v, sizeof a.v); }
// The masked bits of lanes shifted right (left where Right is negative).
template <int Right>
inline V16u take_bits(V16u a, uint32_t mask) {
  TRILEMMA_EACH a.v[i] = (Right >= 0 ? a.v[i] >> (Right & 31) : a.v[i] << (-Right & 31)) & mask;
  return a;
}
// low | (a >> Right & mask)
template <int Right>
inline V16u join_bits(V16u low, V16u a, uint32_t mask) {
  const V16u bits = take_bits<Right>(a, mask);
  TRILEMMA_EACH low.v[i] |= bits.v[i];
  return low;
}
inline V16u sub_bytes(V16u a, int offset) {
  TRILEMMA_EACH {
    uint8_t bytes[4];
    memcpy(bytes, &a.v[i], 4);
    for (uint8_t& byte : bytes) byte = uint8_t(byte - offset);
    memcpy(&a.v[i], bytes, 4);
  }
  return a;
}
// table[byte] of every byte below 16.
inline V16u look_up_bytes(V16u a, const uint8_t* table) {
  TRILEMMA_EACH {
    uint8_t bytes[4];
    memcpy(bytes, &a.v[i], 4);
    for (uint8_t& byte : bytes) byte = table[byte];
    memcpy(&a.v[i], bytes, 4);
  }
  return a;
}
// The two bf16 halves of every lane as f32.
inline V16f low_bf16(V16u pairs) {
  V16f r;
  TRILEMMA_EACH r.v[i] = bits_float(pairs.v[i] << 16);
  return r;
}
inline V16f high_bf16(V16u pairs) {
  V16f r;
  TRILEMMA_EACH r.v[i] = bits_float(pairs.v[i] & 0xffff0000u);
  return r;
}
// Four bits of each lane, minus Offset.
template <int Shift, int Offset>
inline V16f nibble(V16u line) {
  V16f r;
  TRILEMMA_EACH r.v[i] = float(int((line.v[i] >> Shift) & 15) - Offset);
  return r;
}
template <int Byte>
inline V16f signed_byte(V16u line) {
  V16f r;
  TRILEMMA_EACH r.v[i] = float(int8_t(line.v[i] >> (8 * Byte)));
  return r;
}

#undef TRILEMMA_EACH

}  // namespace
}  // namespace trilemma
