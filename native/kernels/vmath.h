// Elementary functions over V16f: own polynomials, so that every instruction set gives the same bits.
#pragma once

#include "simd.h"

namespace trilemma {
namespace {

// e^x; 0 below -87, infinity above 88.7. Cephes' reduction and degree-6 polynomial: within 2 ulp.
inline V16f exp(V16f x) {
  const V16f low = set1(-87.0f), high = set1(88.3f);
  // Operand order keeps NaN: min and max return the second operand when either is NaN.
  const V16f c = min(high, max(low, x));
  const V16f n = round_even(mul(c, set1(1.44269504088896341f)));
  V16f r = fma(n, set1(-0.693359375f), c);
  r = fma(n, set1(2.12194440e-4f), r);
  V16f p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1.0f)));
  p = scale_pow2(p, n);
  p = select_less(x, low, zero(), p);
  return select_less(high, x, set1(__builtin_inff()), p);
}

// 2^x for x <= 0; 0 below -125. Relative error 2e-9 before rounding of degree 6, 3e-6 of degree 4.
template <int Degree>
inline V16f exp2_negative(V16f x) {
  static_assert(Degree == 4 || Degree == 6);
  const V16f low = set1(-125.0f), magic = set1(12582912.0f);
  const V16f c = max(low, x);  // keeps NaN
  const V16f shifted = add(c, magic), n = sub(shifted, magic), r = sub(c, n);
  V16f p;
  if constexpr (Degree == 4) {
    p = fma(set1(9.5828529938e-3f), r, set1(5.5906424742e-2f));
    p = fma(p, r, set1(2.4024098613e-1f));
    p = fma(p, r, set1(6.9312419339e-1f));
  } else {
    p = fma(set1(1.5353361882e-4f), r, set1(1.3398874422e-3f));
    p = fma(p, r, set1(9.6184373578e-3f));
    p = fma(p, r, set1(5.5503324711e-2f));
    p = fma(p, r, set1(2.4022647914e-1f));
    p = fma(p, r, set1(6.9314720286e-1f));
  }
  p = fma(p, r, set1(1.0f));
  return select_less(x, low, zero(), mul(p, power_of_shifted(shifted)));
}

inline V16f sigmoid(V16f x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x)))); }

inline V16f tanh(V16f x) {
  const V16f e = exp(mul(set1(2.0f), x));
  return sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
}

// Abramowitz and Stegun 7.1.26: absolute error below 2e-7.
inline V16f erf(V16f x) {
  const V16f negative = sub(zero(), x);
  const V16f a = max(negative, x);
  const V16f t = div(set1(1.0f), fma(set1(0.3275911f), a, set1(1.0f)));
  V16f p = set1(1.061405429f);
  p = fma(p, t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  p = mul(p, t);
  const V16f y = sub(set1(1.0f), mul(p, exp(sub(zero(), mul(a, a)))));
  return select_less(x, zero(), sub(zero(), y), y);
}

}  // namespace
}  // namespace trilemma
