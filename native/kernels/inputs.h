// What a matrix product needs of its input beside the f32 row: zero padding, bf16 rounding, sums,
// and the dynamic int8 codes of groups of 32: scales of their own, absmax / 127, or powers of two of their row's; round to
// nearest even.
#pragma once

#include "simd.h"
#include "table.h"

#if defined(TRILEMMA_SIMD_AVX512)
#include "inputs_avx512.h"
#endif

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

void half_sums(const float* x, int blocks, float* sums) {
  for (int i = 0; i < 2 * blocks; ++i) sums[i] = reduce_add(load(x + i * kBlock / 2));
}

inline V16f quantize(V16f x, V16f inverse) {
  return round_even(min(max(mul(x, inverse), set1(-127.0f)), set1(127.0f)));
}

#if !defined(TRILEMMA_SIMD_AVX512)
// Bit patterns of the largest magnitudes of `n` <= 16 blocks; a NaN wins and poisons the scale instead of vanishing.
inline void peaks_of(const float* x, int n, uint32_t* peaks) {
  for (int b = 0; b < n; ++b, x += kBlock)
    peaks[b] = bits_of(reduce_max_bits(max_u(abs_bits(load(x)), abs_bits(load(x + 16)))));
  for (int b = n; b < 16; ++b) peaks[b] = 0;
}

// Stores 16 codes; returns their sum, exact in any order.
inline int32_t store_codes(const float* x, V16f inverse, int8_t* codes) {
  const V16f code = quantize(load(x), inverse);
  store_s8(codes, code);
  return int32_t(reduce_add(code));
}

// Codes of `n` <= 16 blocks, `apart` bytes between two, and the sums of their halves.
inline void codes_of(const float* x, const float* inverse, int n, int8_t* codes, size_t apart, int32_t* low,
                     int32_t* high) {
  for (int b = 0; b < n; ++b, x += kBlock, codes += apart) {
    low[b] = store_codes(x, set1(inverse[b]), codes);
    high[b] = store_codes(x + 16, set1(inverse[b]), codes + 16);
  }
}
#endif

// The largest e with peak * 2^e <= row, of the bits of both: these are in the order of the values, so the exponent of the
// quotient is a difference of integers. 0 for a row that counts as 0.
inline uint32_t shift_of(uint32_t row, uint32_t peak) {
  const uint32_t e = row < peak ? 0 : (row - peak) >> 23;
  return e < kMaxShift ? e : uint32_t(kMaxShift);
}
inline float power_of_two(uint32_t biased_exponent) { return __builtin_bit_cast(float, biased_exponent << 23); }

// What values of 16 blocks are multiplied with to be codes, and codes to be values (of a row's scale, if that is shared).
struct CodeScales {
  alignas(64) float inverse[16], scale[16];

  // Scales of their own; where their inverse might be infinite, codes are 0.
  explicit CodeScales(const uint32_t* peaks) {
    const V16f own = div(load_bits(peaks), set1(127.0f));
    store(scale, own);
    store(inverse, select_less(set1(0x1p-126f), own, div(set1(1.0f), own), zero()));
  }
  // Powers of two of a row's.
  CodeScales(const uint32_t* peaks, uint32_t row_peak, float row_inverse) {
    for (int b = 0; b < 16; ++b) {
      const uint32_t e = shift_of(row_peak, peaks[b]);
      inverse[b] = row_inverse * power_of_two(127 + e);
      scale[b] = power_of_two(127 - e);
    }
  }

 private:
  static V16f load_bits(const uint32_t* peaks) {
    alignas(64) float values[16];
    __builtin_memcpy(values, peaks, sizeof values);
    return load(values);
  }
};

// The scale of all blocks of a row.
struct RowScale {
  uint32_t peak;
  float scale, inverse;

  RowScale() = default;
  RowScale(const float* x, int blocks) {
    V16u low = abs_bits(zero()), high = low;
    for (int i = 0; i < blocks * kBlock; i += kBlock) {
      low = max_u(low, abs_bits(load(x + i)));
      high = max_u(high, abs_bits(load(x + i + 16)));
    }
    const float greatest = reduce_max_bits(max_u(low, high));
    peak = bits_of(greatest);
    const bool vanishes = greatest < 0x1p-80f;  // else the inverse times 2^kMaxShift might be infinite
    scale = vanishes ? 0.0f : greatest / 127.0f;
    inverse = vanishes ? 0.0f : 1.0f / scale;
  }
  CodeScales of_blocks(const uint32_t* peaks) const { return {peaks, inverse == 0.0f ? 0 : peak, inverse}; }
};

// Adding integers of up to 2^22 to the bits of this float adds them to its value; sums of a block's products are smaller.
constexpr float kSumOffset = 0x1.8p23f;

void quantize_int8(const float* x, int token, const Int8Input& out) {
  const size_t width = size_t(out.width);
  size_t at = size_t(token / kTokenTile) * size_t(out.blocks) * width + size_t(token % kTokenTile);
  RowScale row{};
  if (out.row_scale) {
    row = RowScale(x, out.blocks);
    out.row_scale[token] = row.scale;
  }
  for (int first = 0; first < out.blocks; first += 16, x += 16 * kBlock, at += 16 * width) {
    const int n = out.blocks - first < 16 ? out.blocks - first : 16;
    alignas(64) uint32_t peaks[16];
    alignas(64) int32_t low[16], high[16];
    peaks_of(x, n, peaks);
    const CodeScales scales = out.row_scale ? row.of_blocks(peaks) : CodeScales(peaks);
    codes_of(x, scales.inverse, n, out.codes + at * kBlock, width * kBlock, low, high);
    for (int b = 0; b < n; ++b) out.scale[at + size_t(b) * width] = scales.scale[b];
    if (out.sum)
      for (int b = 0; b < n; ++b) out.sum[at + size_t(b) * width] = scales.scale[b] * float(low[b] + high[b]);
    const auto half = [&](float* to, const int32_t* of) {
      for (int b = 0; to && b < n; ++b) to[at + size_t(b) * width] = scales.scale[b] * float(of[b]);
    };
    half(out.half_sum[0], low);
    half(out.half_sum[1], high);
    alignas(64) int32_t first_bits[16] = {};
    for (int b = 0; out.base && b < n; ++b) {
      const float base = kSumOffset * scales.scale[b];
      out.base[at + size_t(b) * width] = -base;
      first_bits[b] = int32_t(bits_of(base));
    }
    const auto start = [&](Int8Start which, int offset, int of_low, int of_high) {
      if (int32_t* to = out.start[which])
        for (int b = 0; b < n; ++b) to[at + size_t(b) * width] = first_bits[b] - offset * (of_low * low[b] + of_high * high[b]);
    };
    start(kStart0, 0, 0, 0);
    start(kStart4, 4, 1, 1);
    start(kStart8, 8, 1, 1);
    start(kStart16, 16, 1, 1);
    start(kStart32, 32, 1, 1);
    start(kStart128, 128, 1, 1);
    start(kStart4Low, 4, 1, 0);
    start(kStart4High, 4, 0, 1);
    start(kStart32Low, 32, 1, 0);
    start(kStart32High, 32, 0, 1);
  }
}

}  // namespace
}  // namespace trilemma
