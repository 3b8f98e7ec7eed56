// The exact int32 sums of one block (32 columns) of a panel, with vpdpbusd: u8 weights in 8 registers,
// four activations broadcast from memory. Biased weights are undone by the accumulator's start.
#pragma once

#include "panel.h"

namespace trilemma {
namespace {

constexpr int kIntTokens = 16, kDotTokens = 4;
constexpr bool kBiased8 = true;  // signed bytes are multiplied as byte + 128

template <class C>
struct BlockWeights {
  __m512i lines[8];
  const uint8_t* packed;

  explicit BlockWeights(const uint8_t* codes) : packed(codes) { set<0>(codes); }

 private:
  template <int I>
  void set(const uint8_t* packed) {
    if constexpr (C::kBits == 8)
      lines[I] = _mm512_xor_si512(_mm512_loadu_si512(packed + 64 * I), _mm512_set1_epi8(char(0x80)));
    else
      lines[I] = byte_line<C, C::kCodebook ? -128 : 0, I>(packed).v;
    if constexpr (I < 7) set<I + 1>(packed);
  }
};

inline __m512i broadcast4(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}

// A sum as a float: a conversion, or what its start has made of its bits.
template <class C>
inline V16f as_float(__m512i sum) {
  return {C::kSharedRows ? _mm512_castsi512_ps(sum) : _mm512_cvtepi32_ps(sum)};
}

// Four bits and few tokens: high nibbles stay where they are, sixteen times their value, in a chain of their own.
template <class C, int T>
inline void nibble_dot(const uint8_t* packed, const int8_t* x, const int32_t* start, V16f* sum) {
  const __m512i low_bits = _mm512_set1_epi8(0x0f), high_bits = _mm512_set1_epi8(char(0xf0));
  __m512i low[T], high[T];
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t) {
    low[t] = _mm512_set1_epi32(start[t]);
    high[t] = _mm512_setzero_si512();
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, packed += 64, x += 8) {
    const __m512i line = _mm512_loadu_si512(packed);
    const __m512i even = _mm512_and_si512(line, low_bits), odd = _mm512_and_si512(line, high_bits);
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) {
      low[t] = _mm512_dpbusd_epi32(low[t], even, broadcast4(x + t * kBlock));
      high[t] = _mm512_dpbusd_epi32(high[t], odd, broadcast4(x + t * kBlock + 4));
    }
  }
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t)
    sum[t] = as_float<C>(_mm512_add_epi32(low[t], _mm512_srai_epi32(high[t], 4)));
}

template <class C, int Part, int T>
inline void block_dot(const BlockWeights<C>& w, const int8_t* x, const int32_t* start, V16f* sum) {
  if constexpr (C::kBits == 4 && !C::kCodebook && T <= 2) return nibble_dot<C, T>(w.packed, x, start, sum);
  constexpr int kLines = 8 / C::kParts, kFirst = Part * kLines;
  // With few tokens the additions of one sum would wait for each other: two chains (or parts), exact all the same.
  constexpr int kChains = T <= 2 && C::kParts == 1 ? 2 : 1;
  __m512i acc[T][kChains];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int c = 0; c < kChains; ++c)
      acc[t][c] = kHasStart<C, kBiased8> && c == 0 ? _mm512_set1_epi32(start[t]) : _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int i = kFirst; i < kFirst + kLines; ++i)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t)
      acc[t][i % kChains] = _mm512_dpbusd_epi32(acc[t][i % kChains], w.lines[i], broadcast4(x + t * kBlock + 4 * i));
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t)
    sum[t] = as_float<C>(kChains == 2 ? _mm512_add_epi32(acc[t][0], acc[t][kChains - 1]) : acc[t][0]);
}

}  // namespace
}  // namespace trilemma
