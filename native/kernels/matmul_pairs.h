// y = W x for bf16 weights in panels of 16 rows (pairs16.v1), with float inputs.
//
// A line holds two columns of 16 rows, so a product needs no horizontal sum. Two chains, even and odd columns, added
// at the end; columns ascending: the same bits whatever the tile, the thread or the instruction set.
#pragma once

#include "panel.h"

namespace trilemma {
namespace {

#if defined(TRILEMMA_SIMD_AVX512)
constexpr int kPairTokens = 6, kPairPanels = 2;
#else
constexpr int kPairTokens = 2, kPairPanels = 1;
#endif

inline size_t pair_panel_bytes(const PairView& w) { return size_t(w.blocks) * kBlock * kPanel * 2; }
inline const uint8_t* pair_panel(const PairView& w, int panel) {
  return reinterpret_cast<const uint8_t*>(w.pairs) + size_t(panel) * pair_panel_bytes(w);
}

template <int P, int T>
inline void pair_tile(const PairView& w, int panel, const FloatInput& in, int token, const Output& out) {
  const size_t stride = pair_panel_bytes(w);
  const uint8_t* lines = pair_panel(w, panel);
  const float* x = in.x + size_t(token) * in.ld;
  V16f even[P][T], odd[P][T];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) even[p][t] = odd[p][t] = zero();
  for (int k = 0; k < w.blocks * kBlock; k += 2, lines += 64)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const V16u line = load_line(lines + size_t(p) * stride);
      const V16f low = low_bf16(line), high = high_bf16(line);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        even[p][t] = fma(low, set1(x[size_t(t) * in.ld + size_t(k)]), even[p][t]);
        odd[p][t] = fma(high, set1(x[size_t(t) * in.ld + size_t(k) + 1]), odd[p][t]);
      }
    }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) write_panel(add(even[p][t], odd[p][t]), panel + p, w.rows, token + t, out);
}

// All tokens from `t` on, in tiles of T and then what is left as one tile; few tokens take more panels at once.
template <int T = kPairTokens>
inline void pair_tokens(const PairView& w, const FloatInput& x, int t, int tokens, int begin, int end,
                        const Output& out) {
  constexpr int kPanels = T <= kPairTokens / 2 ? kPairPanels : 1;
  for (; t + T <= tokens; t += T) {
    int p = begin;
    for (; p + kPanels <= end; p += kPanels) pair_tile<kPanels, T>(w, p, x, t, out);
    for (; p < end; ++p) pair_tile<1, T>(w, p, x, t, out);
  }
  if constexpr (T > 1)
    if (t < tokens) pair_tokens<T - 1>(w, x, t, tokens, begin, end, out);
}

void matmul_pairs(const PairView& w, const FloatInput& x, int tokens, int begin, int end, const Output& out) {
  pair_tokens(w, x, 0, tokens, begin, end, out);
}

}  // namespace
}  // namespace trilemma
