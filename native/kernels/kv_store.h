// Keys and values on their way into the cache, rounded to its type.
#pragma once

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

// K and V of one position, (heads, head_dim) each, rounded to the cache's type.
void kv_store(const KvView& kv, const float* k, const float* v, int heads, int position) {
  const size_t dim = size_t(kv.head_dim), page = size_t(kv.page), padded_dim = size_t(kv.padded_dim);
  uint8_t* at = kv.pages[position / kv.page];
  const size_t inside = size_t(position % kv.page);
  alignas(64) float key[kMaxHeadDim + 16], value[kMaxHeadDim + 16];
  for (int h = 0; h < heads; ++h, k += dim, v += dim) {
    const size_t k_at = size_t(h) * page * dim + inside / 16 * dim * 16 + inside % 16;
    const size_t cell = size_t(h) * page + inside, v_at = cell * padded_dim;
    for (size_t d = dim; d < padded_dim; ++d) value[d] = 0.0f;
    if (kv.type == kKvInt8) {
      reinterpret_cast<float*>(at + kv.k_scale)[cell] = quantize_head(k, kv.head_dim, key);
      reinterpret_cast<float*>(at + kv.v_scale)[cell] = quantize_head(v, kv.head_dim, value);
      for (size_t d = 0; d < dim; ++d) reinterpret_cast<int8_t*>(at + kv.k)[k_at + d * 16] = int8_t(key[d]);
      for (size_t d = 0; d < padded_dim; d += 16) store_s8(reinterpret_cast<int8_t*>(at + kv.v) + v_at + d, load(value + d));
      continue;
    }
    for (size_t d = 0; d < dim; d += 16) {
      const int n = dim - d < 16 ? int(dim - d) : 16;
      const V16f a = load_n(k + d, n), b = load_n(v + d, n);
      store(key + d, kv.type == kKvBf16 ? to_bf16(a) : a);
      store_n(value + d, kv.type == kKvBf16 ? to_bf16(b) : b, n);
    }
    if (kv.type == kKvBf16) {
      for (size_t d = 0; d < dim; ++d)
        reinterpret_cast<uint16_t*>(at + kv.k)[k_at + d * 16] = uint16_t(__builtin_bit_cast(uint32_t, key[d]) >> 16);
      for (size_t d = 0; d < padded_dim; d += 16) store_bf16(reinterpret_cast<uint16_t*>(at + kv.v) + v_at + d, load(value + d));
    } else {
      for (size_t d = 0; d < dim; ++d) reinterpret_cast<float*>(at + kv.k)[k_at + d * 16] = key[d];
      for (size_t d = 0; d < padded_dim; d += 16) store(reinterpret_cast<float*>(at + kv.v) + v_at + d, load(value + d));
    }
  }
}

}  // namespace
}  // namespace trilemma
