// y = W x for rows.v1 (f32, f16, bf16): dot products with one 16-lane accumulator per (row, token).
//
// Lane k % 16 sums columns k in ascending order whatever the tile sizes, so a result does not depend on how many
// tokens came along. The ragged end of a row is a masked load; activations are padded with zeros.
#pragma once

#include "simd.h"
#include "table.h"

namespace trilemma {
namespace {

struct WeightF32 {
  using type = float;
  static V16f read(const float* p) { return load(p); }
  static V16f read_n(const float* p, int n) { return load_n(p, n); }
};
struct WeightF16 {
  using type = uint16_t;
  static V16f read(const uint16_t* p) { return load_f16(p); }
  static V16f read_n(const uint16_t* p, int n) { return load_f16_n(p, n); }
};

// Registers of a tile: rows x tokens accumulators, one input per token, one weight.
#if defined(TRILEMMA_SIMD_AVX512)
constexpr int kPlainRows = 4, kPlainTokens = 5;
#elif defined(TRILEMMA_SIMD_AVX2)
constexpr int kPlainRows = 2, kPlainTokens = 2;
#else
constexpr int kPlainRows = 4, kPlainTokens = 1;
#endif

template <class W, int R, int T>
inline void plain_tile(const typename W::type* w, int k, const float* x, size_t ldx, float* y, size_t ldy,
                       const float* bias, int accumulate) {
  V16f acc[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) acc[r][t] = zero();
  int c = 0;
  for (; c + 16 <= k; c += 16) {
    V16f in[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) in[t] = load(x + size_t(t) * ldx + c);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      // Rows are short streams, which the hardware notices too late: ask for the next tile's now.
      if (R > 1) __builtin_prefetch(w + size_t(r + R) * size_t(k) + c);
      const V16f weight = W::read(w + size_t(r) * size_t(k) + c);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) acc[r][t] = fma(weight, in[t], acc[r][t]);
    }
  }
  if (c < k)
    for (int r = 0; r < R; ++r) {
      const V16f weight = W::read_n(w + size_t(r) * size_t(k) + c, k - c);
      for (int t = 0; t < T; ++t) acc[r][t] = fma(weight, load(x + size_t(t) * ldx + c), acc[r][t]);
    }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      float sum = reduce_add(acc[r][t]);
      if (bias) sum += bias[r];
      float* out = y + size_t(t) * ldy + r;
      *out = accumulate ? *out + sum : sum;
    }
}

template <class W, int T>
inline void plain_rows(const typename W::type* w, int k, const float* x, size_t ldx, int begin, int end,
                       const Output& out, float* y) {
  // Few tokens wait for memory, which is fastest at a single sequential stream.
  constexpr int kRows = T == 1 || T < kPlainTokens ? 1 : kPlainRows;
  int row = begin;
  for (; row + kRows <= end; row += kRows)
    plain_tile<W, kRows, T>(w + size_t(row) * size_t(k), k, x, ldx, y + row, out.ld,
                            out.bias ? out.bias + row : nullptr, out.accumulate);
  for (; row < end; ++row)
    plain_tile<W, 1, T>(w + size_t(row) * size_t(k), k, x, ldx, y + row, out.ld, out.bias ? out.bias + row : nullptr,
                        out.accumulate);
}

// All tokens from `t` on, in tiles of T and then smaller ones.
template <class W, int T>
inline void plain_tokens(const PlainView& view, const FloatInput& in, int t, int tokens, int begin, int end,
                         const Output& out) {
  const auto* w = static_cast<const typename W::type*>(view.data);
  for (; t + T <= tokens; t += T)
    plain_rows<W, T>(w, view.cols, in.x + size_t(t) * in.ld, in.ld, begin, end, out, out.y + size_t(t) * out.ld);
  if constexpr (T > 1)
    if (t < tokens) plain_tokens<W, T - 1>(view, in, t, tokens, begin, end, out);
}

template <class W>
inline void plain(const PlainView& view, const FloatInput& in, int tokens, int begin, int end, const Output& out) {
  plain_tokens<W, kPlainTokens>(view, in, 0, tokens, begin, end, out);
}

void matmul_plain(const PlainView& w, const FloatInput& x, int tokens, int begin, int end, const Output& out) {
  const int first = begin * kPanel, last = end * kPanel < w.rows ? end * kPanel : w.rows;
  switch (w.dtype) {
    case kF32:
      return plain<WeightF32>(w, x, tokens, first, last, out);
    case kF16:
      return plain<WeightF16>(w, x, tokens, first, last, out);
    case kBf16:
      return;  // held as pairs: matmul_pairs
  }
}

}  // namespace
}  // namespace trilemma
