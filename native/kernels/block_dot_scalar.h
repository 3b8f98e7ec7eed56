// The exact int32 sums of one block (32 columns) of a panel, in plain loops.
#pragma once

#include "simd.h"
#include "table.h"

namespace trilemma {
namespace {

constexpr int kIntTokens = 4, kDotTokens = 1;

template <int Bits>
struct BlockWeights {
  // codes[row][column]: unbiased s8 for 8 bits, the stored 0..15 for 4 bits.
  int8_t codes[kPanel][kBlock];

  explicit BlockWeights(const uint8_t* packed) {
    for (int k = 0; k < kBlock; ++k)
      for (int r = 0; r < kPanel; ++r) {
        if (Bits == 8) {
          codes[r][k] = int8_t(packed[(k / 4) * 64 + r * 4 + k % 4]);
        } else {
          const uint8_t byte = packed[(k / 8) * 64 + r * 4 + k % 4];
          codes[r][k] = int8_t((k / 4) % 2 ? byte >> 4 : byte & 15);
        }
      }
  }
};

template <int Bits, bool Symmetric, int T>
inline void block_dot(const BlockWeights<Bits>& w, const int8_t* x, const int32_t* bias, V16f* sum) {
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < kPanel; ++r) {
      int32_t s = Bits == 4 && Symmetric ? bias[t] : 0;
      for (int k = 0; k < kBlock; ++k) s += int32_t(w.codes[r][k]) * x[t * kBlock + k];
      sum[t].v[r] = float(s);
    }
}

}  // namespace
}  // namespace trilemma
