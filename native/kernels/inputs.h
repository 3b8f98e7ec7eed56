// What a matrix product needs of its input beside the f32 row: zero padding, bf16 rounding, block sums,
// and the dynamic int8 codes (groups of 32, scale = absmax / 127, round to nearest even).
#pragma once

#include "simd.h"
#include "table.h"

namespace trilemma {
namespace {

inline int padded(int k) { return (k + kBlock - 1) / kBlock * kBlock; }

void pad_row(float* row, int k) {
  for (int i = k; i < padded(k); ++i) row[i] = 0.0f;
}

void round_bf16(const float* x, int padded_k, float* out) {
  for (int i = 0; i < padded_k; i += 16) store(out + i, to_bf16(load(x + i)));
}

void block_sums(const float* x, int blocks, float* sums) {
  for (int b = 0; b < blocks; ++b) sums[b] = reduce_add(add(load(x + b * kBlock), load(x + b * kBlock + 16)));
}

inline V16f quantize(V16f x, V16f inverse) {
  return round_even(min(max(mul(x, inverse), set1(-127.0f)), set1(127.0f)));
}

void quantize_int8(const float* x, int token, const Int8Input& out) {
  const size_t width = size_t(out.width);
  const size_t first = size_t(token / kTokenTile) * size_t(out.blocks) * width + size_t(token % kTokenTile);
  for (int b = 0; b < out.blocks; ++b) {
    const V16f lo = load(x + b * kBlock), hi = load(x + b * kBlock + 16);
    // The maximum is taken over bit patterns: a NaN wins and poisons the scale instead of vanishing.
    const float scale = reduce_max_bits(max_u(abs_bits(lo), abs_bits(hi))) / 127.0f;
    const size_t at = first + size_t(b) * width;
    int8_t* codes = out.codes + at * kBlock;
    V16f qlo = zero(), qhi = zero();
    if (scale != 0.0f) {
      const V16f inverse = set1(1.0f / scale);
      qlo = quantize(lo, inverse);
      qhi = quantize(hi, inverse);
    }
    store_s8(codes, qlo);
    store_s8(codes + 16, qhi);
    // Integers far below 2^24: exact in any order.
    const float low = reduce_add(qlo), high = reduce_add(qhi), sum = low + high;
    out.scale[at] = scale;
    if (out.sum) out.sum[at] = scale * sum;
    const auto start = [&](Int8Start which, int offset, float codes_sum) {
      if (out.start[which]) out.start[which][at] = -offset * int32_t(codes_sum);
    };
    start(kStart8, 8, sum);
    start(kStart16, 16, sum);
    start(kStart32Low, 32, low);
    start(kStart32High, 32, high);
    start(kStart128, 128, sum);
  }
}

}  // namespace
}  // namespace trilemma
