// The exact int32 sums of one block (32 columns) of a panel, in plain loops.
#pragma once

#include "panel.h"

namespace trilemma {
namespace {

constexpr int kIntTokens = 4, kDotTokens = 1;

constexpr bool kBiased8 = false;

template <class C>
struct BlockWeights {
  // codes[row][column]: unbiased s8 for 8 bits, what is stored for fewer.
  int8_t codes[kPanel][kBlock];

  explicit BlockWeights(const uint8_t* packed) {
    for (int k = 0; k < kBlock; ++k)
      for (int r = 0; r < kPanel; ++r) {
        if (C::kBits == 8) {
          codes[r][k] = int8_t(packed[(k / 4) * 64 + r * 4 + k % 4]);
          continue;
        }
        const int at = r * 4 + k % 4, line = k / 4;
        const uint8_t byte = packed[line / 2 * 64 + at];
        int code = line % 2 ? byte >> 4 : byte & 15;
        if (C::kBits == 5) code |= (packed[256 + at] >> line & 1) << 4;
        if (C::kBits == 6) code |= (packed[256 + line / 4 * 64 + at] >> line % 4 * 2 & 3) << 4;
        codes[r][k] = int8_t(code);
      }
  }
};

template <class C, int Part, int T>
inline void block_dot(const BlockWeights<C>& w, const int8_t* x, const int32_t* start, V16f* sum) {
  constexpr int kColumns = kBlock / C::kParts, kFirst = Part * kColumns;
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < kPanel; ++r) {
      int32_t s = C::kOffset ? start[t] : 0;
      for (int k = kFirst; k < kFirst + kColumns; ++k) s += int32_t(w.codes[r][k]) * x[t * kBlock + k];
      sum[t].v[r] = float(s);
    }
}

}  // namespace
}  // namespace trilemma
