// Keys and values on their way into the cache, rounded to its type.
#pragma once

#include "hadamard.h"
#include "inputs.h"
#include "table.h"

namespace trilemma {
namespace {

inline float quantize_head(const float* x, int n, float* codes) {
  V16u peak = abs_bits(zero());
  for (int i = 0; i < n; i += 16) peak = max_u(peak, abs_bits(load_n(x + i, n - i < 16 ? n - i : 16)));
  const float scale = reduce_max_bits(peak) / 127.0f;
  const V16f inverse = set1(scale == 0.0f ? 0.0f : 1.0f / scale);
  for (int i = 0; i < n; i += 16) {
    const int lanes = n - i < 16 ? n - i : 16;
    store_n(codes + i, quantize(load_n(x + i, lanes), inverse), lanes);
  }
  return scale;
}

// Where one head's key and value of a position lie, in steps of `Step` values a lane.
template <class Cell, int Step>
struct HeadCells {
  Cell *k, *v;

  HeadCells(const KvView& kv, uint8_t* page, int head, int inside) {
    const size_t before = size_t(head) * size_t(kv.page), at = size_t(inside);
    k = reinterpret_cast<Cell*>(page + kv.k) + before * size_t(kv.key_dim) + at / 16 * 16 * size_t(kv.key_dim) +
        at % 16 * Step;
    v = reinterpret_cast<Cell*>(page + kv.v) + before * size_t(kv.padded_dim) +
        at / Step * Step * size_t(kv.padded_dim) + at % Step;
  }
  // Values come from f(dimension), key_dim and padded_dim of them. Cells of other positions are not written: their threads may.
  template <class Key, class Value>
  void write(const KvView& kv, const Key& key, const Value& value) {
    for (int d = 0; d < kv.key_dim; ++d) k[size_t(d / Step) * 16 * Step + size_t(d % Step)] = key(d);
    for (int d = 0; d < kv.padded_dim; ++d) v[size_t(d) * Step] = value(d);
  }
};

// Copies one head, rounded and padded with zeros to a multiple of 16.
template <class Round>
inline void round_head(const float* x, int n, float* out, const Round& round) {
  for (int d = 0; d < n; d += 16) store(out + d, round(load_n(x + d, n - d < 16 ? n - d : 16)));
}

inline uint16_t bf16_bits(float x) { return uint16_t(__builtin_bit_cast(uint32_t, x) >> 16); }

// Codes of 0 to 15 of one head's sums and differences; returns the bf16 bits of scale (low half) and minimum.
inline uint32_t quantize_mixed(const float* x, int n, float* codes) {
  round_head(x, n, codes, [](V16f v) { return v; });
  mix_dims(codes, n);
  V16u peak = abs_bits(zero());
  V16f high = set1(-__builtin_inff()), low = high;  // `low` of the negatives
  for (int d = 0; d < n; d += 16) {
    const V16f v = keep_range(load(codes + d), 0, n - d, 0.0f);
    peak = max_u(peak, abs_bits(v));
    high = max(high, keep_range(v, 0, n - d, -__builtin_inff()));
    low = max(low, keep_range(sub(zero(), v), 0, n - d, -__builtin_inff()));
  }
  const float none = reduce_max_bits(peak) * 0.0f;  // NaN where a value is no number
  const float least = -reduce_max(low);
  alignas(64) float pair[16] = {(reduce_max(high) - least) / 15.0f + none, least + none};
  store(pair, to_bf16(load(pair)));
  const V16f minimum = set1(pair[1]), inverse = set1(pair[0] < 1e-30f ? 0.0f : 1.0f / pair[0]);
  for (int d = 0; d < n; d += 16) {
    const V16f code = round_even(mul(sub(load(codes + d), minimum), inverse));
    store(codes + d, min(max(code, zero()), set1(15.0f)));
  }
  return uint32_t(bf16_bits(pair[1])) << 16 | bf16_bits(pair[0]);
}

inline uint8_t two_codes(const float* codes, int apart) { return uint8_t(int(codes[0]) | int(codes[apart]) << 4); }

// One head of an int4 cache, see KvView. A byte's two codes are of one position, so that no other thread writes it.
inline void store_int4(const KvView& kv, uint8_t* page, int head, int inside, const float* k, const float* v) {
  const size_t before = size_t(head) * size_t(kv.page), at = size_t(inside), wide = size_t(kv.value_dim);
  alignas(64) float key[kMaxHeadDim + 16] = {}, value[kMaxHeadDim + 16] = {};
  reinterpret_cast<uint32_t*>(page + kv.k_scale)[before + at] = quantize_mixed(k, kv.head_dim, key);
  reinterpret_cast<uint32_t*>(page + kv.v_scale)[before + at] = quantize_mixed(v, kv.head_dim, value);
  uint8_t* to = page + kv.k + before * size_t(kv.key_dim / 2) + at / 16 * 8 * size_t(kv.key_dim) + at % 16 * 4;
  for (int d = 0; d < kv.key_dim; d += 8, to += 64)
    for (int j = 0; j < 4; ++j) to[j] = two_codes(key + d + j, 4);
  to = page + kv.v + before * (wide / 2) + at / 4 * 2 * wide + at % 4;
  for (int d = 0; d < kv.value_dim; d += 32)
    for (int i = 0; i < 16; ++i, to += 4) *to = two_codes(value + d + i, 16);
}

// K and V of one position, (heads, head_dim) each, rounded to the cache's type.
void kv_store(const KvView& kv, const float* k, const float* v, int heads, int position) {
  const int dim = kv.head_dim, inside = position % kv.page;
  uint8_t* page = kv.pages[position / kv.page];
  alignas(64) float key[kMaxHeadDim + 16] = {}, value[kMaxHeadDim + 16] = {};
  for (int h = 0; h < heads; ++h, k += dim, v += dim) {
    if (kv.type == kKvInt4) {
      store_int4(kv, page, h, inside, k, v);
    } else if (kv.type == kKvInt8) {
      const size_t cell = size_t(h) * size_t(kv.page) + size_t(inside);
      reinterpret_cast<float*>(page + kv.k_scale)[cell] = quantize_head(k, dim, key);
      reinterpret_cast<float*>(page + kv.v_scale)[cell] = quantize_head(v, dim, value);
      HeadCells<int8_t, 4>(kv, page, h, inside)
          .write(kv, [&](int d) { return int8_t(key[d]); }, [&](int d) { return int8_t(value[d]); });
    } else if (kv.type == kKvBf16) {
      round_head(k, dim, key, to_bf16);
      round_head(v, dim, value, to_bf16);
      HeadCells<uint16_t, 2>(kv, page, h, inside)
          .write(kv, [&](int d) { return bf16_bits(key[d]); }, [&](int d) { return bf16_bits(value[d]); });
    } else {
      const auto as_it_is = [](V16f x) { return x; };
      round_head(k, dim, key, as_it_is);
      round_head(v, dim, value, as_it_is);
      HeadCells<float, 1>(kv, page, h, inside).write(kv, [&](int d) { return key[d]; }, [&](int d) { return value[d]; });
    }
  }
}

}  // namespace
}  // namespace trilemma
