// The exact int32 sums of one block (32 columns) of a panel, with vpdpbusd: u8 weights in 8 registers,
// four activations broadcast from memory. Biased weights are undone by the accumulator's start.
#pragma once

#include "simd.h"
#include "table.h"

namespace trilemma {
namespace {

constexpr int kIntTokens = 16, kDotTokens = 4;

template <int Bits>
struct BlockWeights {
  __m512i lines[8];

  explicit BlockWeights(const uint8_t* packed) {
    if (Bits == 4) {
      const __m512i mask = _mm512_set1_epi8(15);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512i line = _mm512_loadu_si512(packed + 64 * i);
        lines[2 * i] = _mm512_and_si512(line, mask);
        lines[2 * i + 1] = _mm512_and_si512(_mm512_srli_epi16(line, 4), mask);
      }
    } else {
      const __m512i flip = _mm512_set1_epi8(char(0x80));
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) lines[i] = _mm512_xor_si512(_mm512_loadu_si512(packed + 64 * i), flip);
    }
  }
};

inline __m512i broadcast4(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}

template <int Bits, bool Symmetric, int T>
inline void block_dot(const BlockWeights<Bits>& w, const int8_t* x, const int32_t* bias, V16f* sum) {
  // With few tokens the additions of one sum would wait for each other: two chains, exact all the same.
  constexpr int kChains = T <= 2 ? 2 : 1;
  __m512i acc[T][kChains];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int c = 0; c < kChains; ++c)
      acc[t][c] = Symmetric && c == 0 ? _mm512_set1_epi32(bias[t]) : _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t)
      acc[t][i % kChains] = _mm512_dpbusd_epi32(acc[t][i % kChains], w.lines[i], broadcast4(x + t * kBlock + 4 * i));
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t)
    sum[t].v = _mm512_cvtepi32_ps(kChains == 2 ? _mm512_add_epi32(acc[t][0], acc[t][kChains - 1]) : acc[t][0]);
}

}  // namespace
}  // namespace trilemma
