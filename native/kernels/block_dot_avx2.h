// The exact int32 sums of one block (32 columns) of a panel, with maddubs.
//
// 4 bits: u8 weights up to 15 times s8 up to 127: eight int16 sums of pairs stay below 8 * 2 * 15 * 127 = 30480.
// 5 bits: four of them stay below 4 * 2 * 31 * 127 = 31496; 6 bits: two below 2 * 2 * 63 * 127 = 32004.
// 8 bits: |w| times sign(x, w): a pair stays below 2 * 128 * 127 = 32512. None can saturate.
#pragma once

#include "panel.h"

namespace trilemma {
namespace {

constexpr int kIntTokens = 4, kDotTokens = 4;
constexpr bool kBiased8 = false;

// Lines as they lie in memory, or those of 5 and 6 bits as bytes.
template <class C, bool Expanded = C::kBits == 5 || C::kBits == 6>
struct BlockWeights {
  const uint8_t* packed;
  explicit BlockWeights(const uint8_t* codes) : packed(codes) {}
};
template <class C>
struct BlockWeights<C, true> {
  alignas(64) uint8_t packed[8 * 64];
  explicit BlockWeights(const uint8_t* codes) { expand_codes<C::kBits, 0>(codes, packed); }
};

inline __m256i broadcast4(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}
inline __m256i half_line(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }

// Rows 0-7 or 8-15 of the panel: `packed` points at that half of the first line.
template <int T>
inline void half_dot4(const uint8_t* packed, const int8_t* x, __m256i* acc) {
  const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256i pairs[T];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) pairs[t] = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i line = half_line(packed + 64 * i);
    const __m256i low = _mm256_and_si256(line, mask);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(line, 4), mask);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      pairs[t] = _mm256_add_epi16(pairs[t], _mm256_maddubs_epi16(low, broadcast4(x + t * kBlock + 8 * i)));
      pairs[t] = _mm256_add_epi16(pairs[t], _mm256_maddubs_epi16(high, broadcast4(x + t * kBlock + 8 * i + 4)));
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) acc[t] = _mm256_add_epi32(acc[t], _mm256_madd_epi16(pairs[t], ones));
}

template <int T>
inline void half_dot8(const uint8_t* packed, const int8_t* x, __m256i* acc) {
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m256i line = half_line(packed + 64 * i);
    const __m256i magnitude = _mm256_abs_epi8(line);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const __m256i signed_x = _mm256_sign_epi8(broadcast4(x + t * kBlock + 4 * i), line);
      acc[t] = _mm256_add_epi32(acc[t], _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, signed_x), ones));
    }
  }
}

// Columns [4 * First, 4 * First + 4 * Lines), unsigned codes of at most Bits bits, one a byte.
template <int Bits, int First, int Lines, int T>
inline void half_dot_bytes(const uint8_t* packed, const int8_t* x, __m256i* acc) {
  constexpr int kAdds = Bits == 5 ? 4 : 2;
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
  for (int first = First; first < First + Lines; first += kAdds) {
    __m256i pairs[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) pairs[t] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int i = first; i < first + kAdds; ++i) {
      const __m256i line = half_line(packed + 64 * i);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t)
        pairs[t] = _mm256_add_epi16(pairs[t], _mm256_maddubs_epi16(line, broadcast4(x + t * kBlock + 4 * i)));
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) acc[t] = _mm256_add_epi32(acc[t], _mm256_madd_epi16(pairs[t], ones));
  }
}

template <class C, int Part, int T>
inline void block_dot(const BlockWeights<C>& w, const int8_t* x, const int32_t* start, V16f* sum) {
  constexpr int kLines = 8 / C::kParts;
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m256i acc[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) acc[t] = C::kOffset ? _mm256_set1_epi32(start[t]) : _mm256_setzero_si256();
    if constexpr (C::kBits == 4)
      half_dot4<T>(w.packed + 32 * half, x, acc);
    else if constexpr (C::kBits == 8)
      half_dot8<T>(w.packed + 32 * half, x, acc);
    else
      half_dot_bytes<C::kBits, Part * kLines, kLines, T>(w.packed + 32 * half, x, acc);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) (half ? sum[t].hi : sum[t].lo) = _mm256_cvtepi32_ps(acc[t]);
  }
}

}  // namespace
}  // namespace trilemma
