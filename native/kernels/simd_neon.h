// V16f as four q registers: lanes 0-3, 4-7, 8-11, 12-15.
#pragma once

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

namespace trilemma {
namespace {

inline float bits_float(uint32_t b) { return vgetq_lane_f32(vreinterpretq_f32_u32(vdupq_n_u32(b)), 0); }

struct V16f {
  float32x4_t q[4];
};
struct V16u {
  uint32x4_t q[4];
};

#define TRILEMMA_EACH _Pragma("GCC unroll 4") for (int i = 0; i < 4; ++i)

// A copy with the first n of 16 elements, for reading less than a whole vector.
template <class T>
struct First {
  T v[16] = {};
  First(const T* p, int n) { memcpy(v, p, size_t(n) * sizeof(T)); }
};

inline V16f set1(float x) {
  const float32x4_t v = vdupq_n_f32(x);
  return {{v, v, v, v}};
}
inline V16f zero() { return set1(0.0f); }
inline V16f load(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
inline V16f load_n(const float* p, int n) { return load(First<float>(p, n).v); }
inline void store(float* p, V16f a) { TRILEMMA_EACH vst1q_f32(p + 4 * i, a.q[i]); }
inline void store_n(float* p, V16f a, int n) {
  float v[16];
  store(v, a);
  memcpy(p, v, size_t(n) * sizeof(float));
}

inline V16f add(V16f a, V16f b) {
  TRILEMMA_EACH a.q[i] = vaddq_f32(a.q[i], b.q[i]);
  return a;
}
inline V16f sub(V16f a, V16f b) {
  TRILEMMA_EACH a.q[i] = vsubq_f32(a.q[i], b.q[i]);
  return a;
}
inline V16f mul(V16f a, V16f b) {
  TRILEMMA_EACH a.q[i] = vmulq_f32(a.q[i], b.q[i]);
  return a;
}
inline V16f div(V16f a, V16f b) {
  TRILEMMA_EACH a.q[i] = vdivq_f32(a.q[i], b.q[i]);
  return a;
}
inline V16f fma(V16f a, V16f b, V16f c) {
  TRILEMMA_EACH c.q[i] = vfmaq_f32(c.q[i], a.q[i], b.q[i]);
  return c;
}
// As on x86, the second operand when either is NaN.
inline V16f min(V16f a, V16f b) {
  TRILEMMA_EACH a.q[i] = vbslq_f32(vcltq_f32(a.q[i], b.q[i]), a.q[i], b.q[i]);
  return a;
}
inline V16f max(V16f a, V16f b) {
  TRILEMMA_EACH a.q[i] = vbslq_f32(vcgtq_f32(a.q[i], b.q[i]), a.q[i], b.q[i]);
  return a;
}
inline V16f select_less(V16f a, V16f b, V16f x, V16f y) {
  TRILEMMA_EACH a.q[i] = vbslq_f32(vcltq_f32(a.q[i], b.q[i]), x.q[i], y.q[i]);
  return a;
}
inline V16f keep_range(V16f a, int begin, int end, float fill) {
  const int32_t first[4] = {0, 1, 2, 3};
  const int32x4_t lanes = vld1q_s32(first), from = vdupq_n_s32(begin), to = vdupq_n_s32(end);
  TRILEMMA_EACH {
    const int32x4_t lane = vaddq_s32(lanes, vdupq_n_s32(4 * i));
    const uint32x4_t kept = vandq_u32(vcgeq_s32(lane, from), vcltq_s32(lane, to));
    a.q[i] = vbslq_f32(kept, a.q[i], vdupq_n_f32(fill));
  }
  return a;
}
// Lane i and lane i ^ Apart change places.
template <int Apart>
inline V16f swap_lanes(V16f a) {
  V16f r;
  TRILEMMA_EACH {
    if constexpr (Apart == 1) r.q[i] = vrev64q_f32(a.q[i]);
    if constexpr (Apart == 2) r.q[i] = vextq_f32(a.q[i], a.q[i], 2);
    if constexpr (Apart >= 4) r.q[i] = a.q[i ^ (Apart / 4)];
  }
  return r;
}
inline float reduce_add(V16f a) {
  const float32x4_t q = vaddq_f32(vaddq_f32(a.q[0], a.q[2]), vaddq_f32(a.q[1], a.q[3]));
  const float32x2_t d = vadd_f32(vget_low_f32(q), vget_high_f32(q));
  return vget_lane_f32(d, 0) + vget_lane_f32(d, 1);
}
inline float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline float reduce_max(V16f a) {
  float32x4_t q = larger(larger(a.q[0], a.q[2]), larger(a.q[1], a.q[3]));
  q = larger(q, vextq_f32(q, q, 2));
  q = larger(q, vextq_f32(q, q, 1));
  return vgetq_lane_f32(q, 0);
}
inline V16f scale_pow2(V16f x, V16f n) {  // the conversion turns NaN into 0
  TRILEMMA_EACH {
    const int32x4_t power = vshlq_n_s32(vcvtq_s32_f32(n.q[i]), 23);
    x.q[i] = vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(x.q[i]), power));
  }
  return x;
}
// 2^n for an integral n >= -126 that comes as n + 1.5 * 2^23: the low bits of that float are n.
inline V16f power_of_shifted(V16f a) {
  TRILEMMA_EACH {
    const uint32x4_t power = vshlq_n_u32(vreinterpretq_u32_f32(a.q[i]), 23);
    a.q[i] = vreinterpretq_f32_u32(vaddq_u32(power, vdupq_n_u32(127u << 23)));
  }
  return a;
}

inline V16f load_bf16(const uint16_t* p) {
  V16f r;
  TRILEMMA_EACH r.q[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16));
  return r;
}
inline V16f load_bf16_n(const uint16_t* p, int n) { return load_bf16(First<uint16_t>(p, n).v); }
inline V16f load_f16(const uint16_t* p) {
  V16f r;
  TRILEMMA_EACH r.q[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
  return r;
}
inline V16f load_f16_n(const uint16_t* p, int n) { return load_f16(First<uint16_t>(p, n).v); }
inline V16f load_s8(const int8_t* p) {
  const int8x16_t b = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(b)), high = vmovl_s8(vget_high_s8(b));
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}
// The low and the high four bits of 16 bytes.
inline void load_nibbles(const int8_t* p, V16f& low, V16f& high) {
  const uint8x16_t b = vld1q_u8(reinterpret_cast<const uint8_t*>(p));
  const uint16x8_t first = vmovl_u8(vget_low_u8(b)), second = vmovl_u8(vget_high_u8(b));
  const uint32x4_t both[] = {vmovl_u16(vget_low_u16(first)), vmovl_u16(vget_high_u16(first)),
                             vmovl_u16(vget_low_u16(second)), vmovl_u16(vget_high_u16(second))};
  TRILEMMA_EACH {
    low.q[i] = vcvtq_f32_u32(vandq_u32(both[i], vdupq_n_u32(15)));
    high.q[i] = vcvtq_f32_u32(vshrq_n_u32(both[i], 4));
  }
}
inline void store_s8(int8_t* p, V16f a) {
  const int16x8_t low = vcombine_s16(vqmovn_s32(vcvtq_s32_f32(a.q[0])), vqmovn_s32(vcvtq_s32_f32(a.q[1])));
  const int16x8_t high = vcombine_s16(vqmovn_s32(vcvtq_s32_f32(a.q[2])), vqmovn_s32(vcvtq_s32_f32(a.q[3])));
  vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
}

inline V16u abs_bits(V16f a) {
  V16u r;
  TRILEMMA_EACH r.q[i] = vandq_u32(vreinterpretq_u32_f32(a.q[i]), vdupq_n_u32(0x7fffffff));
  return r;
}
inline V16u max_u(V16u a, V16u b) {
  TRILEMMA_EACH a.q[i] = vmaxq_u32(a.q[i], b.q[i]);
  return a;
}
inline float reduce_max_bits(V16u a) {
  return bits_float(vmaxvq_u32(vmaxq_u32(vmaxq_u32(a.q[0], a.q[1]), vmaxq_u32(a.q[2], a.q[3]))));
}
inline V16f to_bf16(V16f a) {
  TRILEMMA_EACH {
    const uint32x4_t b = vreinterpretq_u32_f32(a.q[i]);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(b, 16), vdupq_n_u32(1));
    const uint32x4_t r = vandq_u32(vaddq_u32(b, vaddq_u32(odd, vdupq_n_u32(0x7fff))), vdupq_n_u32(0xffff0000u));
    const uint32x4_t number = vceqq_f32(a.q[i], a.q[i]);
    a.q[i] = vreinterpretq_f32_u32(vbslq_u32(number, r, vdupq_n_u32(0x7fc00000)));
  }
  return a;
}
inline void store_bf16(uint16_t* p, V16f a) {
  TRILEMMA_EACH vst1_u16(p + 4 * i, vshrn_n_u32(vreinterpretq_u32_f32(a.q[i]), 16));
}

inline V16u load_line(const uint8_t* p) {
  V16u r;
  TRILEMMA_EACH r.q[i] = vreinterpretq_u32_u8(vld1q_u8(p + 16 * i));
  return r;
}
inline void store_line(uint8_t* p, V16u a) { TRILEMMA_EACH vst1q_u8(p + 16 * i, vreinterpretq_u8_u32(a.q[i])); }
// The masked bits of lanes shifted right (left where Right is negative).
template <int Right>
inline V16u take_bits(V16u a, uint32_t mask) {
  TRILEMMA_EACH a.q[i] = vandq_u32(vshlq_u32(a.q[i], vdupq_n_s32(-Right)), vdupq_n_u32(mask));
  return a;
}
// low | (a >> Right & mask)
template <int Right>
inline V16u join_bits(V16u low, V16u a, uint32_t mask) {
  const V16u bits = take_bits<Right>(a, mask);
  TRILEMMA_EACH low.q[i] = vorrq_u32(low.q[i], bits.q[i]);
  return low;
}
inline V16u sub_bytes(V16u a, int offset) {
  const uint8x16_t o = vdupq_n_u8(uint8_t(offset));
  TRILEMMA_EACH a.q[i] = vreinterpretq_u32_u8(vsubq_u8(vreinterpretq_u8_u32(a.q[i]), o));
  return a;
}
// table[byte] of every byte below 16.
inline V16u look_up_bytes(V16u a, const uint8_t* table) {
  const uint8x16_t values = vld1q_u8(table);
  TRILEMMA_EACH a.q[i] = vreinterpretq_u32_u8(vqtbl1q_u8(values, vreinterpretq_u8_u32(a.q[i])));
  return a;
}
// The two bf16 halves of every lane as f32.
inline V16f low_bf16(V16u pairs) {
  V16f r;
  TRILEMMA_EACH r.q[i] = vreinterpretq_f32_u32(vshlq_n_u32(pairs.q[i], 16));
  return r;
}
inline V16f high_bf16(V16u pairs) {
  V16f r;
  TRILEMMA_EACH r.q[i] = vreinterpretq_f32_u32(vandq_u32(pairs.q[i], vdupq_n_u32(0xffff0000u)));
  return r;
}
// Four bits of each lane, minus Offset.
template <int Shift, int Offset>
inline V16f nibble(V16u line) {
  V16f r;
  TRILEMMA_EACH {
    const uint32x4_t shifted = Shift ? vshlq_u32(line.q[i], vdupq_n_s32(-Shift)) : line.q[i];
    const int32x4_t code = vreinterpretq_s32_u32(vandq_u32(shifted, vdupq_n_u32(15)));
    r.q[i] = vcvtq_f32_s32(vsubq_s32(code, vdupq_n_s32(Offset)));
  }
  return r;
}
template <int Byte>
inline V16f signed_byte(V16u line) {
  V16f r;
  TRILEMMA_EACH {
    const int32x4_t raised = vshlq_s32(vreinterpretq_s32_u32(line.q[i]), vdupq_n_s32(24 - 8 * Byte));
    r.q[i] = vcvtq_f32_s32(vshrq_n_s32(raised, 24));
  }
  return r;
}

#undef TRILEMMA_EACH

}  // namespace
}  // namespace trilemma
