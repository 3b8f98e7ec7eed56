// The exact int32 sums of one block (32 columns) of a panel, with maddubs.
//
// Up to 4 bits: u8 weights up to 15 times s8 up to 127: eight int16 sums of pairs stay below 8 * 2 * 15 * 127 = 30480.
// 5 bits: four of them stay below 4 * 2 * 31 * 127 = 31496; 6 bits: two below 2 * 2 * 63 * 127 = 32004.
// Signed bytes: |w| times sign(x, w): a pair stays below 2 * 128 * 127 = 32512. None can saturate.
#pragma once

#include "block_lines_avx2.h"

namespace trilemma {
namespace {

constexpr bool kBiased8 = false;

// How many int16 sums of pairs may be added before they are widened, within a part of a block.
template <class C>
constexpr int kPairSums = C::kBits <= 4 ? 8 / C::kParts : C::kBits == 5 ? 4 : C::kBits == 6 ? 2 : 1;

TRILEMMA_INLINE __m256i widen_add(__m256i sum, __m256i pairs) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// Lines [I, Last): `pairs` holds the int16 sums since the last widening.
template <class C, int I, int Last, int T>
TRILEMMA_INLINE void add_lines(const BlockWeights<C>& w, const int8_t* x, V16u* pairs, V16u* sum) {
  constexpr int kRun = kPairSums<C>;
  constexpr bool kFirst = I % kRun == 0, kWiden = (I + 1) % kRun == 0 || I + 1 == Last;
  const V16u line = w.template line<I, T>();
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    const __m256i four = broadcast4(x + t * kBlock + 4 * I);
    const __m256i lo = _mm256_maddubs_epi16(line.lo, four), hi = _mm256_maddubs_epi16(line.hi, four);
    pairs[t].lo = kFirst ? lo : _mm256_add_epi16(pairs[t].lo, lo);
    pairs[t].hi = kFirst ? hi : _mm256_add_epi16(pairs[t].hi, hi);
    pin(pairs[t].lo), pin(pairs[t].hi);
    if (!kWiden) continue;
    sum[t] = {widen_add(sum[t].lo, pairs[t].lo), widen_add(sum[t].hi, pairs[t].hi)};
    pin(sum[t].lo), pin(sum[t].hi);
  }
  if constexpr (I + 1 < Last) add_lines<C, I + 1, Last, T>(w, x, pairs, sum);
}

template <class C, int I, int T>
TRILEMMA_INLINE void add_signed_lines(const BlockWeights<C>& w, const int8_t* x, V16u* sum) {
  const V16u line = w.template line<I, T>();
  const __m256i lo = _mm256_abs_epi8(line.lo), hi = _mm256_abs_epi8(line.hi);
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    const __m256i four = broadcast4(x + t * kBlock + 4 * I);
    sum[t].lo = widen_add(sum[t].lo, _mm256_maddubs_epi16(lo, _mm256_sign_epi8(four, line.lo)));
    sum[t].hi = widen_add(sum[t].hi, _mm256_maddubs_epi16(hi, _mm256_sign_epi8(four, line.hi)));
    pin(sum[t].lo), pin(sum[t].hi);
  }
  if constexpr (I < 7) add_signed_lines<C, I + 1, T>(w, x, sum);
}

template <class C, int Part, int T>
TRILEMMA_INLINE void block_dot(const BlockWeights<C>& w, const int8_t* x, const int32_t* start, V16f* out) {
  constexpr int kLines = 8 / C::kParts, kFirst = Part * kLines;
  V16u sum[T];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) sum[t].lo = sum[t].hi = kHasStart<C, kBiased8> ? _mm256_set1_epi32(start[t]) : _mm256_setzero_si256();
  if constexpr (C::kSigned) {
    add_signed_lines<C, 0, T>(w, x, sum);
  } else {
    V16u pairs[T];
    add_lines<C, kFirst, kFirst + kLines, T>(w, x, pairs, sum);
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) out[t] = as_float<C>(sum[t]);
}

}  // namespace
}  // namespace trilemma
