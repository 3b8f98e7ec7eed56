// Attention of one KV head over the cache: tiles of 128 positions by the online softmax, in chunks of 512 that are summed
// apart and merged in ascending order, so that chunks may be summed by different threads.
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

constexpr int kTile = kKvPage, kRows = 8;
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
// `k_scale` and `v_scale` start at `base`, as the scores do.
inline float softmax_tile(State& s, int row, int base, int vectors, int begin, int end, const float* k_scale,
                          const float* v_scale) {
  float* scores = s.scores[row];
  const float low = -__builtin_inff();
  V16f peak = set1(low);
  for (int v = 0; v < vectors; ++v) {
    V16f x = load(scores + v * 16);
    if (k_scale) x = mul(x, load(k_scale + v * 16));
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
    store(scores + v * 16, v_scale ? mul(weight, load(v_scale + v * 16)) : weight);
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

inline void clear(State& s, int row, int padded_dim) {
  s.maximum[row] = -__builtin_inff();
  s.total[row] = 0.0f;
  for (int d = 0; d < padded_dim; d += 16) store(s.out[row] + d, zero());
}

// Adds a later chunk's sums, its largest score and its total weight, to those of a row.
inline void merge(State& s, int row, const float* out, float maximum, float total, int padded_dim) {
  const float before = s.maximum[row], now = before > maximum ? before : maximum;
  if (now == -__builtin_inff()) return;  // nothing on either side, or NaN: `total` stays 0 and the row ends as NaN
  alignas(64) float factor[16], other[16];
  store(factor, exp(set1(before - now)));
  store(other, exp(set1(maximum - now)));
  for (int d = 0; d < padded_dim; d += 16)
    store(s.out[row] + d, fma(load(out + d), set1(other[0]), mul(load(s.out[row] + d), set1(factor[0]))));
  s.maximum[row] = now;
  s.total[row] = s.total[row] * factor[0] + total * other[0];
}

inline void write_rows(const KvView& kv, const Rows& rows, const State& s) {
  for (int r = 0; r < rows.count; ++r) {
    const V16f total = set1(s.total[r]);
    for (int d = 0; d < kv.head_dim; d += 16) {
      const int n = kv.head_dim - d < 16 ? kv.head_dim - d : 16;
      store_n(rows.out[r] + d, div(load(s.out[r] + d), total), n);
    }
  }
}

// Positions [first, last) of one chunk, from a clear state.
template <class Cache>
inline void attend_chunk(const KvView& kv, int head, const Rows& rows, int first, int last, State& s) {
  const size_t before = size_t(head) * size_t(kv.page);  // cells of earlier heads in a page
  for (int r = 0; r < rows.count; ++r) clear(s, r, kv.padded_dim);
  for (int base = first / kTile * kTile; base < last; base += kTile) {
    const uint8_t* page = kv.pages[base / kTile];
    const auto* k = reinterpret_cast<const typename Cache::type*>(page + kv.k) + before * size_t(kv.head_dim);
    const auto* v = reinterpret_cast<const typename Cache::type*>(page + kv.v) + before * size_t(kv.padded_dim);
  const bool scaled = kv.type == kKvInt8;
    const float* k_scale = scaled ? reinterpret_cast<const float*>(page + kv.k_scale) + before : nullptr;
    const float* v_scale = scaled ? reinterpret_cast<const float*>(page + kv.v_scale) + before : nullptr;
    const int positions = last - base < kTile ? last - base : kTile;
    const int vectors = (positions + 15) / 16;
    score_tile<Cache>(k, kv.head_dim, vectors, rows.q, s.scores, rows.count);
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
    value_tile<Cache>(v, kv.padded_dim, positions, s.scores, factor, s.out,
                      rows.count);
  }
}

// The positions that any row attends to, cut to one chunk.
inline bool span_of(const Rows& rows, int chunk, int& first, int& last) {
  first = rows.begin[0];
  last = rows.end[0];
  for (int r = 1; r < rows.count; ++r) {
    first = rows.begin[r] < first ? rows.begin[r] : first;
    last = rows.end[r] > last ? rows.end[r] : last;
  }
  first = first > chunk * kKvChunk ? first : chunk * kKvChunk;
  last = last < (chunk + 1) * kKvChunk ? last : (chunk + 1) * kKvChunk;
  return first < last;
}

template <class Cache>
inline void attend(const KvView& kv, int head, const Rows& rows, State& s, State& later) {
  int first, last, chunk = 0;
  while (!span_of(rows, chunk, first, last)) ++chunk;
  attend_chunk<Cache>(kv, head, rows, first, last, s);
  while (span_of(rows, ++chunk, first, last)) {
    attend_chunk<Cache>(kv, head, rows, first, last, later);
    for (int r = 0; r < rows.count; ++r) merge(s, r, later.out[r], later.maximum[r], later.total[r], kv.padded_dim);
  }
  write_rows(kv, rows, s);
}

template <class Cache>
inline void attend_partly(const KvView& kv, const AttentionTask& task, const Rows& rows, float* partial, State& s) {
  int first, last;
  if (span_of(rows, task.chunk, first, last))
    attend_chunk<Cache>(kv, task.kv_head, rows, first, last, s);
  else
    for (int r = 0; r < rows.count; ++r) clear(s, r, kv.padded_dim);
  for (int r = 0; r < rows.count; ++r, partial += kv.padded_dim + kPanel) {
    for (int d = 0; d < kv.padded_dim; d += 16) store(partial + d, load(s.out[r] + d));
    partial[kv.padded_dim] = s.maximum[r];
    partial[kv.padded_dim + 1] = s.total[r];
  }
}

// Up to kRows rows of a task from `at` on.
inline Rows rows_of(const KvView& kv, const AttentionTask& task, int at) {
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
  return rows;
}

template <class Cache>
inline void attend_rows(const KvView& kv, const AttentionTask& task) {
  State state, later;
  for (int at = task.row_begin; at < task.row_end; at += kRows) {
    const Rows rows = rows_of(kv, task, at);
    const size_t row = size_t(at - task.row_begin) * size_t(kv.padded_dim + kPanel);
    if (task.partial)
      attend_partly<Cache>(kv, task, rows, task.partial + row, state);
    else
      attend<Cache>(kv, task.kv_head, rows, state, later);
  }
}

void attention(const KvView& kv, const AttentionTask& task) {
  if (kv.type == kKvF32) attend_rows<CacheF32>(kv, task);
  if (kv.type == kKvBf16) attend_rows<CacheBf16>(kv, task);
  if (kv.type == kKvInt8) attend_rows<CacheInt8>(kv, task);
}

void attention_merge(const KvView& kv, const AttentionTask& task, int chunks, size_t stride) {
  State state;
  for (int at = task.row_begin; at < task.row_end; at += kRows) {
    const Rows rows = rows_of(kv, task, at);
    const int width = kv.padded_dim + kPanel;
    const float* partial = task.partial + size_t(at - task.row_begin) * size_t(width);
    for (int r = 0; r < rows.count; ++r, partial += width) {
      for (int d = 0; d < kv.padded_dim; d += 16) store(state.out[r] + d, load(partial + d));
      state.maximum[r] = partial[kv.padded_dim];
      state.total[r] = partial[kv.padded_dim + 1];
      for (int c = 1; c < chunks; ++c) {
        const float* next = partial + size_t(c) * stride;
        merge(state, r, next, next[kv.padded_dim], next[kv.padded_dim + 1], kv.padded_dim);
      }
    }
    write_rows(kv, rows, state);
  }
}

}  // namespace
}  // namespace trilemma
