// The exact int32 sums of one block (32 columns) of a panel, with sdot: four columns of four rows a register.
// Bytes are signed as they are; those of fewer bits are stored from 0 on, which the accumulator's start undoes.
#pragma once

#include "panel.h"

namespace trilemma {
namespace {

constexpr int kIntTokens = 4, kDotTokens = 4;

constexpr bool kBiased8 = false;

// Lines as they lie in memory, or as bytes.
template <class C, bool Expanded = C::kExpands>
struct BlockWeights {
  const uint8_t* packed;
  explicit BlockWeights(const uint8_t* codes) : packed(codes) {}
};
template <class C>
struct BlockWeights<C, true> {
  alignas(64) uint8_t packed[8 * 64];
  explicit BlockWeights(const uint8_t* codes) { expand_codes<C, 0>(codes, packed); }
};

// Four columns of 16 rows (one 64-byte line of signed bytes) times columns 4*Lane.. of 16 inputs.
template <int Lane, int T>
TRILEMMA_INLINE void dot_line(const int8x16_t* line, const int8x16_t* x, int32x4_t (*acc)[4]) {
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) acc[t][q] = vdotq_laneq_s32(acc[t][q], line[q], x[t], Lane);
}

// Columns 4*Lane .. of the 16 inputs in `x`: one line of 8-bit codes, or (every other Lane) a line of 4-bit ones, whose
// high nibbles are the next four columns.
template <int Bits, int Lane, int T>
TRILEMMA_INLINE void dot_columns(const uint8_t* packed, const int8x16_t* x, int32x4_t (*acc)[4]) {
  int8x16_t line[4], high[4];
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const uint8x16_t codes = vld1q_u8(packed + 16 * q);
    line[q] = vreinterpretq_s8_u8(Bits == 4 ? vandq_u8(codes, vdupq_n_u8(15)) : codes);
    if (Bits == 4) high[q] = vreinterpretq_s8_u8(vshrq_n_u8(codes, 4));
  }
  dot_line<Lane, T>(line, x, acc);
  if constexpr (Bits == 4) dot_line<Lane + 1, T>(high, x, acc);
}

template <class C, int Part, int T>
TRILEMMA_INLINE void block_dot(const BlockWeights<C>& w, const int8_t* x, const int32_t* start, V16f* sum) {
  constexpr int kLineBits = C::kBits == 8 || C::kExpands ? 8 : 4, kFirst = Part, kLast = C::kParts == 2 ? Part + 1 : 2;
  int32x4_t acc[T][4];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) acc[t][q] = vdupq_n_s32(kHasStart<C, kBiased8> ? start[t] : 0);
#pragma GCC unroll 4
  for (int half = kFirst; half < kLast; ++half) {
    int8x16_t in[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) in[t] = vld1q_s8(x + t * kBlock + 16 * half);
    const uint8_t* packed = w.packed + half * kPanel * 16 * kLineBits / 8;
    dot_columns<kLineBits, 0, T>(packed, in, acc);
    if constexpr (kLineBits == 8) {
      dot_columns<8, 1, T>(packed + 64, in, acc);
      dot_columns<8, 2, T>(packed + 128, in, acc);
      dot_columns<8, 3, T>(packed + 192, in, acc);
    } else {
      dot_columns<4, 2, T>(packed + 64, in, acc);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) sum[t].q[q] = C::kSharedRows ? vreinterpretq_f32_s32(acc[t][q]) : vcvtq_f32_s32(acc[t][q]);
}

}  // namespace
}  // namespace trilemma
