// y = W x for panel16.v1 with int8 activations in groups of 32.
//
// Per block of 32 columns the sum of products is an exact int32; then
//     total = fma(w_scale * x_scale, float(sum), total)         (+ fma(w_min, x_scale * sum(x codes), total))
// with blocks ascending. So all instruction sets, tile sizes and thread counts give the same bits.
#pragma once

#include "panel.h"

#if defined(TRILEMMA_SIMD_AVX512)
#include "block_dot_avx512.h"
#elif defined(TRILEMMA_SIMD_AVX2)
#include "block_dot_avx2.h"
#elif defined(TRILEMMA_SIMD_NEON)
#include "block_dot_neon.h"
#else
#include "block_dot_scalar.h"
#endif

namespace trilemma {
namespace {

// One block's contribution to T tokens, in nearly equal steps of at most kDotTokens.
template <int Bits, bool Symmetric, int T>
inline void add_blocks(const BlockWeights<Bits>& weights, const int8_t* x, const int32_t* bias, const float* x_scale,
                       const float* x_sum, V16f scale, V16f minimum, V16f* total) {
  constexpr int kSteps = (T + kDotTokens - 1) / kDotTokens, kStep = (T + kSteps - 1) / kSteps;
  V16f sum[kStep];
  block_dot<Bits, Symmetric, kStep>(weights, x, bias, sum);
#pragma GCC unroll 4
  for (int t = 0; t < kStep; ++t) {
    total[t] = fma(mul(scale, set1(x_scale[t])), sum[t], total[t]);
    if (!Symmetric) total[t] = fma(minimum, set1(x_sum[t]), total[t]);
  }
  if constexpr (T > kStep)
    add_blocks<Bits, Symmetric, T - kStep>(weights, x + kStep * kBlock, bias + kStep, x_scale + kStep, x_sum + kStep,
                                           scale, minimum, total + kStep);
}

template <int Bits, bool Symmetric, int T>
inline void int8_tile(const PackedView& w, int panel, const Int8Input& in, int token, const Output& out) {
  const PanelView p = panel_of(w, panel);
  const size_t width = T == kTokenTile ? size_t(kTokenTile) : size_t(in.width);
  const size_t first = size_t(token / kTokenTile) * size_t(in.blocks) * size_t(in.width) + size_t(token % kTokenTile);
  const int8_t* x = in.codes + first * kBlock;
  const int32_t* bias = (Bits == 8 ? in.bias128 : in.bias8) + first;
  const float* x_scale = in.scale + first;
  const float* x_sum = in.sum + first;
  const uint8_t* codes = p.codes;
  V16f total[T], scale = zero(), minimum = zero();
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) total[t] = zero();
  for (int b = 0, until = 0, group = 0; b < w.blocks; ++b) {
    if (b == until) {
      scale = load_f16(p.scales + group * kPanel);
      if (!Symmetric) minimum = load_f16(p.minima + group * kPanel);
      until += w.group_blocks;
      ++group;
    }
    const BlockWeights<Bits> weights(codes);
    add_blocks<Bits, Symmetric, T>(weights, x, bias, x_scale, x_sum, scale, minimum, total);
    codes += block_bytes(Bits);
    x += width * kBlock;
    bias += width;
    x_scale += width;
    x_sum += width;
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) write_panel(total[t], panel, w.rows, token + t, out);
}

// All tokens from `t` on, in tiles of T and then smaller ones: 16, 8, and what is left as one tile, so that weights are
// read as seldom as can be and no tile straddles two tiles of 16 of the input.
template <int Bits, bool Symmetric, int T = kIntTokens>
inline void int8_tokens(const PackedView& w, const Int8Input& x, int t, int tokens, int begin, int end,
                        const Output& out) {
  for (; t + T <= tokens; t += T)
    for (int p = begin; p < end; ++p) int8_tile<Bits, Symmetric, T>(w, p, x, t, out);
  if constexpr (T > 1)
    if (t < tokens) int8_tokens<Bits, Symmetric, (T > 8 ? T / 2 : T - 1)>(w, x, t, tokens, begin, end, out);
}

void matmul_int8(const PackedView& w, const Int8Input& x, int tokens, int begin, int end, const Output& out) {
  if (w.bits == 8) return int8_tokens<8, true>(w, x, 0, tokens, begin, end, out);
  if (w.minima) return int8_tokens<4, false>(w, x, 0, tokens, begin, end, out);
  int8_tokens<4, true>(w, x, 0, tokens, begin, end, out);
}

}  // namespace
}  // namespace trilemma
