// y = W x for panel16 with float activations (f32, or f32 values rounded to bf16): the accuracy mode.
//
// Lanes are rows. Per block of 32 columns (or half of one, where that has a scale of its own): two chains (columns k%8 < 4 and the others) of code * x, added,
// then one fma with the group's scale. Codes are exact in f32, so the scale is the only rounding of a weight.
#pragma once

#include "panel.h"

namespace trilemma {
namespace {

#if defined(TRILEMMA_SIMD_AVX512)
constexpr int kFloatTokens = 6;
#elif defined(TRILEMMA_SIMD_AVX2)
constexpr int kFloatTokens = 2;
#else
constexpr int kFloatTokens = 2;
#endif

template <int T>
inline void step(V16f weight, const float* x, size_t ldx, V16f* sum) {
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) sum[t] = fma(weight, set1(x[size_t(t) * ldx]), sum[t]);
}

// 8 columns of a 4-bit panel: one line.
template <bool Symmetric, int T>
inline void columns4(const uint8_t* codes, const float* x, size_t ldx, V16f* even, V16f* odd) {
  constexpr int kOffset = Symmetric ? 8 : 0;
  const V16u line = load_line(codes);
  step<T>(nibble<0, kOffset>(line), x + 0, ldx, even);
  step<T>(nibble<8, kOffset>(line), x + 1, ldx, even);
  step<T>(nibble<16, kOffset>(line), x + 2, ldx, even);
  step<T>(nibble<24, kOffset>(line), x + 3, ldx, even);
  step<T>(nibble<4, kOffset>(line), x + 4, ldx, odd);
  step<T>(nibble<12, kOffset>(line), x + 5, ldx, odd);
  step<T>(nibble<20, kOffset>(line), x + 6, ldx, odd);
  step<T>(nibble<28, kOffset>(line), x + 7, ldx, odd);
}

template <int T>
inline void columns8(const uint8_t* codes, const float* x, size_t ldx, V16f* sum) {
  const V16u line = load_line(codes);
  step<T>(signed_byte<0>(line), x + 0, ldx, sum);
  step<T>(signed_byte<1>(line), x + 1, ldx, sum);
  step<T>(signed_byte<2>(line), x + 2, ldx, sum);
  step<T>(signed_byte<3>(line), x + 3, ldx, sum);
}

// Columns [begin, end) of a block of nibbles, or of lines of bytes, which codes of other widths come as.
template <class C, int T>
inline void columns(const uint8_t* codes, int begin, int end, const float* x, size_t ldx, V16f* even, V16f* odd) {
  for (int i = begin; i < end; i += 8)
    if constexpr (C::kBits == 4 && !C::kExpands) {
      columns4<C::kSymmetric, T>(codes + i * 8, x + i, ldx, even, odd);
    } else {
      columns8<T>(codes + i * 16, x + i, ldx, even);
      columns8<T>(codes + i * 16 + 64, x + i + 4, ldx, odd);
    }
}

template <class C, int T>
inline void float_tile(const PackedView& w, int panel, const FloatInput& in, int token, const Output& out) {
  const float* x = in.x + size_t(token) * in.ld;
  const size_t ld_sums = in.ld / (kBlock / 2);
  const float* sums = C::kSymmetric ? nullptr : in.sums + size_t(token) * ld_sums;
  const uint8_t* packed = panel_codes(w, panel);
  alignas(64) uint8_t expanded[C::kExpands ? 8 * 64 : 1];
  BlockScales<C> scales(w, panel);
  V16f total[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) total[t] = zero();
  for (int b = 0; b < w.blocks; ++b, x += kBlock, packed += block_bytes(C::kBits)) {
    scales.next();
    const uint8_t* codes = packed;
    if constexpr (C::kExpands) expand_codes<C, C::kOffset>(packed, expanded), codes = expanded;
    for (int part = 0; part < C::kParts; ++part) {
      V16f even[T], odd[T];
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) even[t] = odd[t] = zero();
      constexpr int kColumns = kBlock / C::kParts;
      columns<C, T>(codes, part * kColumns, (part + 1) * kColumns, x, in.ld, even, odd);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        total[t] = fma(scales.scale[part], add(even[t], odd[t]), total[t]);
        if (!C::kSymmetric)
          total[t] = fma(scales.minimum[part], set1(sum_of<C>(sums + size_t(t) * ld_sums, b, part)), total[t]);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) write_panel(total[t], panel, w.rows, token + t, out);
}

template <class C>
inline void float_panels(const PackedView& w, const FloatInput& x, int tokens, int begin, int end, const Output& out) {
  int t = 0;
  for (; t + kFloatTokens <= tokens; t += kFloatTokens)
    for (int p = begin; p < end; ++p) float_tile<C, kFloatTokens>(w, p, x, t, out);
  for (; t < tokens; ++t)
    for (int p = begin; p < end; ++p) float_tile<C, 1>(w, p, x, t, out);
}

void matmul_float(const PackedView& w, const FloatInput& x, int tokens, int begin, int end, const Output& out) {
  with_codes(w, [&](auto codes) { float_panels<decltype(codes)>(w, x, tokens, begin, end, out); });
}

}  // namespace
}  // namespace trilemma
