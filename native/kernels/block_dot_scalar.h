// The exact int32 sums of one block (32 columns) of a panel, in plain loops.
#pragma once

#include "panel.h"

namespace trilemma {
namespace {

constexpr int kIntTokens = 4, kDotTokens = 1;

constexpr bool kBiased8 = false;

template <class C>
struct BlockWeights {
  // codes[row][column]: signed bytes, or codes as they are stored.
  int8_t codes[kPanel][kBlock];

  explicit BlockWeights(const uint8_t* packed) {
    uint8_t expanded[C::kBits == 8 ? 1 : 8 * 64];
    const uint8_t* bytes = packed;
    if constexpr (C::kBits != 8) expand_codes<C, 0>(packed, expanded), bytes = expanded;
    for (int k = 0; k < kBlock; ++k)
      for (int r = 0; r < kPanel; ++r) codes[r][k] = int8_t(bytes[k / 4 * 64 + r * 4 + k % 4]);
  }
};

template <class C, int Part, int T>
inline void block_dot(const BlockWeights<C>& w, const int8_t* x, const int32_t* start, V16f* sum) {
  constexpr int kColumns = kBlock / C::kParts, kFirst = Part * kColumns;
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < kPanel; ++r) {
      int32_t s = kHasStart<C, kBiased8> ? start[t] : 0;
      for (int k = kFirst; k < kFirst + kColumns; ++k) s += int32_t(w.codes[r][k]) * x[t * kBlock + k];
      sum[t].v[r] = C::kSharedRows ? __builtin_bit_cast(float, s) : float(s);
    }
}

}  // namespace
}  // namespace trilemma
