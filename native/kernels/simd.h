// The virtual vector of 16 floats that every kernel is written in, in the version of this translation unit.
//
// Each operation is defined lane by lane, with explicit fma and one fixed reduction tree
// (lane i + lane i+8, then +4, +2, +1), so that all instruction sets give the same bits.
// Everything has internal linkage: a copy compiled for AVX-512 must never be linked into another path.
#pragma once

#include <stddef.h>
#include <stdint.h>

// For what an inner loop consists of: a call there, which GCC makes of large bodies, empties all vector registers.
#define TRILEMMA_INLINE inline __attribute__((always_inline))

#if defined(TRILEMMA_SIMD_AVX512)
#include "simd_avx512.h"
#elif defined(TRILEMMA_SIMD_AVX2)
#include "simd_avx2.h"
#elif defined(TRILEMMA_SIMD_NEON)
#include "simd_neon.h"
#else
#include "simd_scalar.h"
#endif

namespace trilemma {
namespace {

// IEEE half to float, exact; NaN payloads are kept (quieted), as F16C does.
[[maybe_unused]] inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  if (exponent == 0) {
    const float value = float(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t high = exponent == 31 ? 0x7f800000u | (mantissa ? 0x400000u : 0) : (exponent + 112) << 23;
  return bits_float(sign | high | (mantissa << 13));
}

// Multiples of 0.5 ulp resolve to even; exact for |x| < 2^22 in every set, no rounding-mode instruction needed.
inline V16f round_even(V16f x) {
  const V16f magic = set1(12582912.0f);
  return sub(add(x, magic), magic);
}

}  // namespace
}  // namespace trilemma
