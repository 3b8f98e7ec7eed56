// Attention of one KV head over the cache: tiles of 128 positions, merged in ascending order by the online softmax.
//
// Up to kRows rows (token, query head) share every tile that is loaded. A row's arithmetic does not depend on which
// rows came along: masked positions contribute exactly nothing, and a tile without any position of a row leaves
// that row untouched.
#pragma once

#include "inputs.h"
#include "table.h"
#include "vmath.h"

namespace trilemma {
namespace {

constexpr int kTile = 128, kRows = 8;
// A register tile is rows x vectors; with few rows more vectors keep the fma units busy.
#if defined(TRILEMMA_SIMD_AVX512)
constexpr int kTileRows = 8;
constexpr int vectors_for(int rows) { return rows >= 4 ? 2 : 4; }
#elif defined(TRILEMMA_SIMD_AVX2)
constexpr int kTileRows = 2;
constexpr int vectors_for(int rows) { return rows >= 2 ? 2 : 4; }
#elif defined(TRILEMMA_SIMD_NEON)
constexpr int kTileRows = 2;
constexpr int vectors_for(int) { return 2; }
#else
constexpr int kTileRows = 1;
constexpr int vectors_for(int) { return 1; }
#endif

struct CacheF32 {
  using type = float;
  static V16f read(const float* p) { return load(p); }
};
struct CacheBf16 {
  using type = uint16_t;
  static V16f read(const uint16_t* p) { return load_bf16(p); }
};
struct CacheInt8 {
  using type = int8_t;
  static V16f read(const int8_t* p) { return load_s8(p); }
};

struct Rows {
  const float* q[kRows];
  float* out[kRows];
  int begin[kRows], end[kRows];  // positions attended to
  int count;
};

struct State {
  alignas(64) float scores[kRows][kTile];
  alignas(64) float out[kRows][kMaxHeadDim];
  float maximum[kRows], total[kRows];
};

// scores[row][position] = q . k for `R` rows and `V` vectors of positions.
template <class Cache, int R, int V>
inline void score_block(const typename Cache::type* k, int head_dim, const float* const* q, float (*scores)[kTile]) {
  V16f acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = zero();
  for (int d = 0; d < head_dim; ++d) {
    V16f key[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) key[v] = Cache::read(k + (size_t(v) * size_t(head_dim) + size_t(d)) * 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V16f query = set1(q[r][d]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] = fma(query, key[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(scores[r] + v * 16, acc[r][v]);
}

// Rows of a two-dimensional array, from column `at` on.
template <int Width>
inline float (*from_column(float (*rows)[Width], int at))[Width] {
  return reinterpret_cast<float(*)[Width]>(&rows[0][at]);
}

template <class Cache, int R, int V = vectors_for(R)>
inline void score_rows(const typename Cache::type* k, int head_dim, int v, int vectors, const float* const* q,
                       float (*scores)[kTile]) {
  for (; v + V <= vectors; v += V)
    score_block<Cache, R, V>(k + size_t(v) * size_t(head_dim) * 16, head_dim, q, from_column(scores, v * 16));
  if constexpr (V > 1) score_rows<Cache, R, V / 2>(k, head_dim, v, vectors, q, scores);
}

template <class Cache, int R = kTileRows>
inline void score_tile(const typename Cache::type* k, int head_dim, int vectors, const float* const* q,
                       float (*scores)[kTile], int count) {
  int r = 0;
  for (; r + R <= count; r += R) score_rows<Cache, R>(k, head_dim, 0, vectors, q + r, scores + r);
  if constexpr (R > 1) score_tile<Cache, R / 2>(k, head_dim, vectors, q + r, scores + r, count - r);
}

// Turns scores of one row into weights; returns the factor for what was summed before.
inline float softmax_tile(State& s, int row, int base, int vectors, int begin, int end, const float* k_scale,
                          const float* v_scale) {
  float* scores = s.scores[row];
  const float low = -__builtin_inff();
  V16f peak = set1(low);
  for (int v = 0; v < vectors; ++v) {
    V16f x = load(scores + v * 16);
    if (k_scale) x = mul(x, load(k_scale + base + v * 16));
    x = keep_range(x, begin - base - v * 16, end - base - v * 16, low);
    store(scores + v * 16, x);
    peak = max(peak, x);
  }
  const float before = s.maximum[row];
  const float tile_peak = reduce_max(peak);
  const float now = before > tile_peak ? before : tile_peak;
  if (now == low) {  // every score is -inf or NaN: nothing to add; the row ends as 0/0 = NaN if this goes on
    for (int v = 0; v < vectors; ++v) store(scores + v * 16, zero());
    return 1.0f;
  }
  V16f sum = zero();
  const V16f shift = set1(now);
  for (int v = 0; v < vectors; ++v) {
    const V16f weight = exp(sub(load(scores + v * 16), shift));
    sum = add(sum, weight);
    store(scores + v * 16, v_scale ? mul(weight, load(v_scale + base + v * 16)) : weight);
  }
  if (v_scale)  // stale scales behind the end must not turn a weight of zero into NaN
    for (int v = 0; v < vectors; ++v)
      store(scores + v * 16, keep_range(load(scores + v * 16), begin - base - v * 16, end - base - v * 16, 0.0f));
  alignas(64) float factor[16];
  store(factor, exp(set1(before - now)));
  s.maximum[row] = now;
  s.total[row] = s.total[row] * factor[0] + reduce_add(sum);
  return factor[0];
}

// out[row] = out[row] * factor[row] + weights . V, for `R` rows and `D` vectors of the head.
template <class Cache, int R, int D>
inline void value_block(const typename Cache::type* v, int padded_dim, int positions, const float (*weights)[kTile],
                        const float* factor, float (*out)[kMaxHeadDim]) {
  V16f acc[R][D];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) acc[r][d] = mul(load(out[r] + d * 16), set1(factor[r]));
  for (int p = 0; p < positions; ++p) {
    V16f value[D];
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) value[d] = Cache::read(v + size_t(p) * size_t(padded_dim) + size_t(d) * 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V16f weight = set1(weights[r][p]);
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) acc[r][d] = fma(weight, value[d], acc[r][d]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) store(out[r] + d * 16, acc[r][d]);
}

template <class Cache, int R, int D = vectors_for(R)>
inline void value_rows(const typename Cache::type* v, int d, int padded_dim, int positions,
                       const float (*weights)[kTile], const float* factor, float (*out)[kMaxHeadDim]) {
  for (; d + D * 16 <= padded_dim; d += D * 16)
    value_block<Cache, R, D>(v + d, padded_dim, positions, weights, factor, from_column(out, d));
  if constexpr (D > 1) value_rows<Cache, R, D / 2>(v, d, padded_dim, positions, weights, factor, out);
}

template <class Cache, int R = kTileRows>
inline void value_tile(const typename Cache::type* v, int padded_dim, int positions, const float (*weights)[kTile],
                       const float* factor, float (*out)[kMaxHeadDim], int count) {
  int r = 0;
  for (; r + R <= count; r += R) value_rows<Cache, R>(v, 0, padded_dim, positions, weights + r, factor + r, out + r);
  if constexpr (R > 1) value_tile<Cache, R / 2>(v, padded_dim, positions, weights + r, factor + r, out + r, count - r);
}

template <class Cache>
inline void attend(const KvView& kv, int head, const Rows& rows, State& s) {
  const size_t capacity = size_t(kv.capacity);
  const auto* k = static_cast<const typename Cache::type*>(kv.k) + size_t(head) * capacity * size_t(kv.head_dim);
  const auto* v = static_cast<const typename Cache::type*>(kv.v) + size_t(head) * capacity * size_t(kv.padded_dim);
  const float* k_scale = kv.k_scale ? kv.k_scale + size_t(head) * capacity : nullptr;
  const float* v_scale = kv.v_scale ? kv.v_scale + size_t(head) * capacity : nullptr;
  int first = rows.begin[0], last = rows.end[0];
  for (int r = 0; r < rows.count; ++r) {
    first = rows.begin[r] < first ? rows.begin[r] : first;
    last = rows.end[r] > last ? rows.end[r] : last;
    s.maximum[r] = -__builtin_inff();
    s.total[r] = 0.0f;
    for (int d = 0; d < kv.padded_dim; d += 16) store(s.out[r] + d, zero());
  }
  for (int base = first / kTile * kTile; base < last; base += kTile) {
    const int positions = last - base < kTile ? last - base : kTile;
    const int vectors = (positions + 15) / 16;
    score_tile<Cache>(k + size_t(base) * size_t(kv.head_dim), kv.head_dim, vectors, rows.q, s.scores, rows.count);
    float factor[kRows];
    for (int r = 0; r < rows.count; ++r) {
      const bool any = rows.begin[r] < base + kTile && rows.end[r] > base;
      if (any) {
        factor[r] = softmax_tile(s, r, base, vectors, rows.begin[r], rows.end[r], k_scale, v_scale);
      } else {
        factor[r] = 1.0f;
        for (int i = 0; i < vectors; ++i) store(s.scores[r] + i * 16, zero());
      }
    }
    value_tile<Cache>(v + size_t(base) * size_t(kv.padded_dim), kv.padded_dim, positions, s.scores, factor, s.out,
                      rows.count);
  }
  for (int r = 0; r < rows.count; ++r) {
    const V16f total = set1(s.total[r]);
    for (int d = 0; d < kv.head_dim; d += 16) {
      const int n = kv.head_dim - d < 16 ? kv.head_dim - d : 16;
      store_n(rows.out[r] + d, div(load(s.out[r] + d), total), n);
    }
  }
}

void attention(const KvView& kv, const AttentionTask& task) {
  State state;
  for (int at = task.row_begin; at < task.row_end; at += kRows) {
    Rows rows;
    rows.count = task.row_end - at < kRows ? task.row_end - at : kRows;
    for (int r = 0; r < rows.count; ++r) {
      const int token = (at + r) / task.group, member = (at + r) % task.group;
      const size_t head = size_t(member) * size_t(kv.head_dim);
      rows.q[r] = task.q + size_t(token) * task.ld_q + head;
      rows.out[r] = task.out + size_t(token) * task.ld_out + head;
      rows.end[r] = task.first_position + token + 1;
      rows.begin[r] = task.window && rows.end[r] > task.window ? rows.end[r] - task.window : 0;
    }
    if (kv.type == kKvF32) attend<CacheF32>(kv, task.kv_head, rows, state);
    if (kv.type == kKvBf16) attend<CacheBf16>(kv, task.kv_head, rows, state);
    if (kv.type == kKvInt8) attend<CacheInt8>(kv, task.kv_head, rows, state);
  }
}

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
  const size_t dim = size_t(kv.head_dim), capacity = size_t(kv.capacity), padded_dim = size_t(kv.padded_dim);
  alignas(64) float key[kMaxHeadDim + 16], value[kMaxHeadDim + 16];
  for (int h = 0; h < heads; ++h, k += dim, v += dim) {
    const size_t k_at = size_t(h) * capacity * dim + size_t(position / 16) * dim * 16 + size_t(position % 16);
    const size_t v_at = (size_t(h) * capacity + size_t(position)) * padded_dim;
    for (size_t d = dim; d < padded_dim; ++d) value[d] = 0.0f;
    if (kv.type == kKvInt8) {
      kv.k_scale[size_t(h) * capacity + size_t(position)] = quantize_head(k, kv.head_dim, key);
      kv.v_scale[size_t(h) * capacity + size_t(position)] = quantize_head(v, kv.head_dim, value);
      for (size_t d = 0; d < dim; ++d) static_cast<int8_t*>(kv.k)[k_at + d * 16] = int8_t(key[d]);
      for (size_t d = 0; d < padded_dim; d += 16) store_s8(static_cast<int8_t*>(kv.v) + v_at + d, load(value + d));
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
        static_cast<uint16_t*>(kv.k)[k_at + d * 16] = uint16_t(__builtin_bit_cast(uint32_t, key[d]) >> 16);
      for (size_t d = 0; d < padded_dim; d += 16) store_bf16(static_cast<uint16_t*>(kv.v) + v_at + d, load(value + d));
    } else {
      for (size_t d = 0; d < dim; ++d) static_cast<float*>(kv.k)[k_at + d * 16] = key[d];
      for (size_t d = 0; d < padded_dim; d += 16) store(static_cast<float*>(kv.v) + v_at + d, load(value + d));
    }
  }
}

}  // namespace
}  // namespace trilemma
