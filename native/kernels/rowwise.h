// Operations on one row of activations: norms, rotary embedding, gated nonlinearity, sums.
#pragma once

#include "table.h"
#include "vmath.h"

namespace trilemma {
namespace {

// body(i, lanes) for every vector of a row.
template <class Body>
inline void each_vector(int n, const Body& body) {
  int i = 0;
  for (; i + 16 <= n; i += 16) body(i, 16);
  if (i < n) body(i, n - i);
}

// out = (x - mean) * inverse * weight (+ bias)
inline void scale_row(const float* x, const float* weight, const float* bias, int n, V16f mean, V16f inverse,
                      float* out) {
  each_vector(n, [&](int i, int lanes) {
    V16f y = mul(mul(sub(load_n(x + i, lanes), mean), inverse), load_n(weight + i, lanes));
    if (bias) y = add(y, load_n(bias + i, lanes));
    store_n(out + i, y, lanes);
  });
}

inline V16f inverse_root(V16f squares, int n, float eps) {
  return set1(1.0f / __builtin_sqrtf(reduce_add(squares) / float(n) + eps));
}

void rms_norm(const float* x, const float* weight, const float* bias, int n, float eps, float* out) {
  V16f squares = zero();
  each_vector(n, [&](int i, int lanes) {
    const V16f v = load_n(x + i, lanes);
    squares = fma(v, v, squares);
  });
  scale_row(x, weight, bias, n, zero(), inverse_root(squares, n, eps), out);
}

void layer_norm(const float* x, const float* weight, const float* bias, int n, float eps, float* out) {
  V16f sum = zero(), squares = zero();
  each_vector(n, [&](int i, int lanes) { sum = add(sum, load_n(x + i, lanes)); });
  const V16f mean = set1(reduce_add(sum) / float(n));
  each_vector(n, [&](int i, int lanes) {
    const V16f v = keep_range(sub(load_n(x + i, lanes), mean), 0, lanes, 0.0f);
    squares = fma(v, v, squares);
  });
  scale_row(x, weight, bias, n, mean, inverse_root(squares, n, eps), out);
}

void add_scaled(float* x, const float* y, float scale, int n) {
  each_vector(n, [&](int i, int lanes) {
    store_n(x + i, fma(set1(scale), load_n(y + i, lanes), load_n(x + i, lanes)), lanes);
  });
}

void exp_row(float* x, int n, float shift) {
  each_vector(n, [&](int i, int lanes) { store_n(x + i, exp(sub(load_n(x + i, lanes), set1(shift))), lanes); });
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
