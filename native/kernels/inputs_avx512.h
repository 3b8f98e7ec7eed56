// Maxima and sums of 16 blocks of 32 values side by side: each step halves what is left of all of them at once.
#pragma once

#include "simd.h"
#include "table.h"

namespace trilemma {
namespace {

// Lanes of four vectors as sums (or maxima) of four lanes: lane 4q + i holds those of lanes 4q .. 4q + 3 of vector i.
template <class Join>
inline __m512i join_fours(const __m512i* v, const Join& join) {
  const __m512i a = join(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
  const __m512i b = join(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
  return join(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

// Bit patterns of the largest magnitudes of `n` <= 16 blocks; 0 behind them.
inline void peaks_of(const float* x, int n, uint32_t* peaks) {
  const auto join = [](__m512i a, __m512i b) { return _mm512_max_epi32(a, b); };
  __m512i fours[4];
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    __m512i v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const float* block = x + (4 * q + i) * kBlock;
      v[i] = 4 * q + i < n ? max_u(abs_bits(load(block)), abs_bits(load(block + 16))).v : _mm512_setzero_si512();
    }
    fours[q] = join_fours(v, join);
  }
  const __m512i a = join(_mm512_shuffle_i32x4(fours[0], fours[1], 0x44), _mm512_shuffle_i32x4(fours[0], fours[1], 0xee));
  const __m512i b = join(_mm512_shuffle_i32x4(fours[2], fours[3], 0x44), _mm512_shuffle_i32x4(fours[2], fours[3], 0xee));
  _mm512_storeu_si512(peaks, join(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd)));
}

inline __m128i code_bytes(const float* x, __m512 inverse) {
  // What is no number converts to the least integer.
  const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), inverse));
  return _mm512_cvtsepi32_epi8(_mm512_max_epi32(code, _mm512_set1_epi32(-127)));
}

// Codes of `n` <= 16 blocks, `apart` bytes between two, and the sums of their halves.
inline void codes_of(const float* x, const float* inverse, int n, int8_t* codes, size_t apart, int32_t* low,
                     int32_t* high) {
  alignas(64) int32_t sums[16][8];
  for (int b = 0; b < n; ++b, x += kBlock, codes += apart) {
    const __m512 factor = _mm512_set1_ps(inverse[b]);
    const __m256i bytes = _mm256_set_m128i(code_bytes(x + 16, factor), code_bytes(x, factor));
    _mm256_storeu_si256((__m256i*)codes, bytes);
    _mm256_store_si256((__m256i*)sums[b],
                       _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), bytes));
  }
  // Of two blocks in a vector: lanes 0-3 the first one's low half, then its high one, then the second one's.
  const auto join = [](__m512i a, __m512i b) { return _mm512_add_epi32(a, b); };
  __m512i eights[2];
  for (int q = 0; q < 2; ++q) {
    __m512i v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[i] = _mm512_load_si512(sums[8 * q + 2 * i]);
    eights[q] = join_fours(v, join);
  }
  const __m512i lows = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 16, 24, 17, 25, 18, 26, 19, 27);
  const __m512i highs = _mm512_add_epi32(lows, _mm512_set1_epi32(4));
  _mm512_storeu_si512(low, _mm512_permutex2var_epi32(eights[0], lows, eights[1]));
  _mm512_storeu_si512(high, _mm512_permutex2var_epi32(eights[0], highs, eights[1]));
}

}  // namespace
}  // namespace trilemma
