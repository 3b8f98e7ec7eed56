// Operations on one row of activations: RMS norm, rotary embedding, gated nonlinearity.
#pragma once

#include "table.h"
#include "vmath.h"

namespace trilemma {
namespace {

// out = x / sqrt(mean(x^2) + eps) * weight
void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
  V16f squares = zero();
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const V16f v = load(x + i);
    squares = fma(v, v, squares);
  }
  if (i < n) {
    const V16f v = load_n(x + i, n - i);
    squares = fma(v, v, squares);
  }
  const V16f inverse = set1(1.0f / __builtin_sqrtf(reduce_add(squares) / float(n) + eps));
  for (i = 0; i + 16 <= n; i += 16) store(out + i, mul(mul(load(x + i), inverse), load(weight + i)));
  if (i < n) store_n(out + i, mul(mul(load_n(x + i, n - i), inverse), load_n(weight + i, n - i)), n - i);
}

inline void rotate(float* low, float* high, const float* cos, const float* sin, V16f scale, int n) {
  const V16f a = load_n(low, n), b = load_n(high, n), c = load_n(cos, n), s = load_n(sin, n);
  store_n(low, mul(sub(mul(a, c), mul(b, s)), scale), n);
  store_n(high, mul(add(mul(b, c), mul(a, s)), scale), n);
}

void rope(float* x, int heads, int head_dim, int rotary_half, const float* cos, const float* sin, float scale) {
  const V16f factor = set1(scale);
  for (int h = 0; h < heads; ++h, x += head_dim) {
    for (int i = 0; i < rotary_half; i += 16) {
      const int n = rotary_half - i < 16 ? rotary_half - i : 16;
      rotate(x + i, x + i + rotary_half, cos + i, sin + i, factor, n);
    }
    for (int i = 2 * rotary_half; i < head_dim; i += 16) {
      const int n = head_dim - i < 16 ? head_dim - i : 16;
      store_n(x + i, mul(load_n(x + i, n), factor), n);
    }
  }
}

inline V16f nonlinear(V16f x, Nonlinearity kind) {
  switch (kind) {
    case kSilu:
      return mul(x, sigmoid(x));
    case kGelu:
      return mul(mul(set1(0.5f), x), add(set1(1.0f), erf(mul(x, set1(0.70710678118654752f)))));
    case kGeluTanh: {
      const V16f cube = mul(mul(x, x), x);
      const V16f inner = mul(set1(0.79788456080286536f), fma(set1(0.044715f), cube, x));
      return mul(mul(set1(0.5f), x), add(set1(1.0f), tanh(inner)));
    }
    case kRelu:
      break;
  }
  return max(zero(), x);
}

void glu(float* gate, const float* up, int n, Nonlinearity kind) {
  for (int i = 0; i < n; i += 16) {
    const int lanes = n - i < 16 ? n - i : 16;
    V16f y = nonlinear(load_n(gate + i, lanes), kind);
    if (up) y = mul(y, load_n(up + i, lanes));
    store_n(gate + i, y, lanes);
  }
}

}  // namespace
}  // namespace trilemma
