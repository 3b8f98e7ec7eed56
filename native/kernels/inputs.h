// What a matrix product needs of its input beside the f32 row: zero padding, bf16 rounding, block sums,
// and the dynamic int8 codes of groups of 32: scales of their own, absmax / 127, or powers of two of their row's; round to
// nearest even.
#pragma once

#include "simd.h"
#include "table.h"

namespace trilemma {
namespace {

inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }

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

// The largest e with peak * 2^e <= row, of the bits of both: these are in the order of the values, so the exponent of the
// quotient is a difference of integers.
inline uint32_t shift_of(uint32_t row, uint32_t peak) {
  const uint32_t e = (row - peak) >> 23;
  return e < kMaxShift ? e : uint32_t(kMaxShift);
}
inline float power_of_two(uint32_t biased_exponent) { return bits_float(biased_exponent << 23); }

// What a block's values are multiplied with to be codes, and its codes to be values (of a row's scale, if that is shared).
struct CodeScale {
  float inverse, scale;
};
inline CodeScale scale_of_block(uint32_t peak) {
  const float scale = bits_float(peak) / 127.0f;
  return {scale == 0.0f ? 0.0f : 1.0f / scale, scale};
}

// The same for all blocks of a row.
struct RowScale {
  uint32_t peak;
  float scale, inverse;

  RowScale(const float* x, int blocks) {
    V16u peaks = abs_bits(zero());
    for (int i = 0; i < blocks * kBlock; i += 16) peaks = max_u(peaks, abs_bits(load(x + i)));
    const float greatest = reduce_max_bits(peaks);
    peak = bits_of(greatest);
    const bool vanishes = greatest < 0x1p-80f;  // else the inverse times 2^kMaxShift might be infinite
    scale = vanishes ? 0.0f : greatest / 127.0f;
    inverse = vanishes ? 0.0f : 1.0f / scale;
  }
  CodeScale of_block(uint32_t block_peak) const {
    const uint32_t e = shift_of(peak, block_peak);
    return {inverse * power_of_two(127 + e), power_of_two(127 - e)};
  }
};

template <bool Shared>
inline void quantize_row(const float* x, int token, const Int8Input& out, const RowScale* row) {
  const size_t width = size_t(out.width);
  const size_t first = size_t(token / kTokenTile) * size_t(out.blocks) * width + size_t(token % kTokenTile);
  for (int b = 0; b < out.blocks; ++b) {
    const V16f lo = load(x + b * kBlock), hi = load(x + b * kBlock + 16);
    // The maximum is taken over bit patterns: a NaN wins and poisons the scale instead of vanishing.
    const uint32_t peak = bits_of(reduce_max_bits(max_u(abs_bits(lo), abs_bits(hi))));
    const auto [inverse, scale] = Shared ? row->of_block(peak) : scale_of_block(peak);
    const size_t at = first + size_t(b) * width;
    int8_t* codes = out.codes + at * kBlock;
    const V16f qlo = quantize(lo, set1(inverse)), qhi = quantize(hi, set1(inverse));
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

void quantize_int8(const float* x, int token, const Int8Input& out) {
  if (!out.row_scale) return quantize_row<false>(x, token, out, nullptr);
  const RowScale row(x, out.blocks);
  out.row_scale[token] = row.scale;
  quantize_row<true>(x, token, out, &row);
}

}  // namespace
}  // namespace trilemma
