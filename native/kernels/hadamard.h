// Sums and differences of a head's dimensions, which spread a channel much larger than the others over all of them.
#pragma once

#include "simd.h"

namespace trilemma {
namespace {

// Dimensions that are mixed with one another: the largest power of two that divides those of a head.
inline int mixed_dims(int head_dim) { return head_dim & -head_dim; }

// Each lane's sum with the one `Apart` lanes behind it, and there the difference.
template <int Apart>
inline V16f mix_lanes(V16f x) {
  alignas(64) float sign[16];
  for (int i = 0; i < 16; ++i) sign[i] = i & Apart ? -1.0f : 1.0f;
  return fma(x, load(sign), swap_lanes<Apart>(x));
}

// In place; n values, padded to whole vectors. Twice gives mixed_dims(n) times the values.
inline void mix_dims(float* x, int n) {
  const int mixed = mixed_dims(n);
  for (int d = 0; d < n && mixed > 1; d += 16) {
    V16f v = mix_lanes<1>(load(x + d));
    if (mixed > 2) v = mix_lanes<2>(v);
    if (mixed > 4) v = mix_lanes<4>(v);
    if (mixed > 8) v = mix_lanes<8>(v);
    store(x + d, v);
  }
  for (int apart = 16; apart < mixed; apart *= 2)
    for (int first = 0; first < n; first += 2 * apart)
      for (int d = first; d < first + apart; d += 16) {
        const V16f a = load(x + d), b = load(x + d + apart);
        store(x + d, add(a, b));
        store(x + d + apart, sub(a, b));
      }
}

// The inverse, and what queries become for such keys.
inline void mix_back(float* x, int n) {
  mix_dims(x, n);
  const V16f share = set1(1.0f / float(mixed_dims(n)));
  for (int d = 0; d < n; d += 16) store(x + d, mul(load(x + d), share));
}

}  // namespace
}  // namespace trilemma
