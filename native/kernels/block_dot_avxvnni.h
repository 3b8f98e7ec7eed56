// The exact int32 sums of one block (32 columns) of a panel, with the 256-bit vpdpbusd of processors that have no AVX-512.
// Biased weights are undone by the accumulator's start.
#pragma once

#include "block_lines_avx2.h"

namespace trilemma {
namespace {

constexpr bool kBiased8 = true;  // signed bytes are multiplied as byte + 128

// TRILEMMA_EVEX: the same instruction as AVX-512 encodes it, so that the kernels run where only that one is known.
TRILEMMA_INLINE __m256i dot4(__m256i sum, __m256i u8, __m256i s8) {
#if defined(TRILEMMA_EVEX)
  return _mm256_dpbusd_epi32(sum, u8, s8);
#else
  return _mm256_dpbusd_avx_epi32(sum, u8, s8);
#endif
}

template <class C, int I, int Last, int T>
TRILEMMA_INLINE void add_lines(const BlockWeights<C>& w, const int8_t* x, V16u* sum) {
  V16u line = w.template line<I, T>();
  if constexpr (C::kSigned) {
    const __m256i bias = _mm256_set1_epi8(char(0x80));
    line = {_mm256_xor_si256(line.lo, bias), _mm256_xor_si256(line.hi, bias)};
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    const __m256i four = broadcast4(x + t * kBlock + 4 * I);
    sum[t] = {dot4(sum[t].lo, line.lo, four), dot4(sum[t].hi, line.hi, four)};
  }
  if constexpr (I + 1 < Last) add_lines<C, I + 1, Last, T>(w, x, sum);
}

template <class C, int Part, int T>
TRILEMMA_INLINE void block_dot(const BlockWeights<C>& w, const int8_t* x, const int32_t* start, V16f* out) {
  constexpr int kLines = 8 / C::kParts, kFirst = Part * kLines;
  V16u sum[T];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t)
    sum[t].lo = sum[t].hi = kHasStart<C, kBiased8> ? _mm256_set1_epi32(start[t]) : _mm256_setzero_si256();
  add_lines<C, kFirst, kFirst + kLines, T>(w, x, sum);
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) out[t] = as_float<C>(sum[t]);
}

}  // namespace
}  // namespace trilemma
