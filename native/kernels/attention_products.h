// The two products of attention over one tile of positions: scores = q . k, and out = out * factor + weights . v.
//
// Every sum is one chain in ascending order, whatever rows and vectors share a register tile, so that a row's bits do not
// depend on its company.
#pragma once

#include "attention_cache.h"

namespace trilemma {
namespace {

constexpr int kTile = kKvPage;

template <int R>
constexpr int vectors_for() {
  int vectors = 1;
  while (vectors * 2 <= kTileVectors && vectors * 2 * R <= kTileSums) vectors *= 2;
  return vectors;
}

// Cells of one line.
template <class Cache>
constexpr size_t kLine = 16 * Cache::kStep;

template <class Cache, int Part, int R, int V>
inline void add_lines(const typename Cache::Cell* lines, size_t apart, const typename Cache::Factor* const* factor,
                      size_t at, V16f (*sum)[V]) {
  typename Cache::Line line[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) line[v] = Cache::template line<Part>(lines + size_t(v) * apart);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = Cache::template multiply<Part>(sum[r][v], line[v], factor[r] + at);
  if constexpr (Part + 1 < Cache::kParts) add_lines<Cache, Part + 1, R, V>(lines, apart, factor, at, sum);
}

// Keys of one tile and head: `steps` lines for every 16 positions.
template <class Cache>
struct KeyTile {
  const typename Cache::Cell* cells;
  int steps;
};

// scores[row][position] for `R` rows and `V` vectors of positions from vector `v` on.
template <class Cache, int R, int V>
inline void score_block(const KeyTile<Cache>& k, int v, const typename Cache::Factor* const* q, float (*scores)[kTile]) {
  const size_t apart = size_t(k.steps) * kLine<Cache>;
  const typename Cache::Cell* lines = k.cells + size_t(v) * apart;
  V16f sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) sum[r][i] = zero();
  for (int s = 0; s < k.steps; ++s)
    add_lines<Cache, 0, R, V>(lines + size_t(s) * kLine<Cache>, apart, q, size_t(s) * Cache::kStep, sum);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) store(scores[r] + (v + i) * 16, sum[r][i]);
}

template <class Cache, int R, int V = vectors_for<R>()>
inline void score_rows(const KeyTile<Cache>& k, int v, int end, const typename Cache::Factor* const* q,
                       float (*scores)[kTile]) {
  for (; v + V <= end; v += V) score_block<Cache, R, V>(k, v, q, scores);
  if constexpr (V > 1) score_rows<Cache, R, V / 2>(k, v, end, q, scores);
}

// Vectors [begin, end) of `count` rows.
template <class Cache, int R = kTileRows>
inline void score_tile(const KeyTile<Cache>& k, int begin, int end, const typename Cache::Factor* const* q,
                       float (*scores)[kTile], int count) {
  int r = 0;
  for (; r + R <= count; r += R) score_rows<Cache, R>(k, begin, end, q + r, scores + r);
  if constexpr (R > 1)
    if (r < count) score_tile<Cache, R - 1>(k, begin, end, q + r, scores + r, count - r);
}

// Values of one tile and head: for every kStep positions padded_dim / 16 lines. Steps [begin, end) are whole; `rest`
// values of step `end` are not.
template <class Cache>
struct ValueTile {
  const typename Cache::Cell* cells;
  int padded_dim, begin, end, rest;
};

// What rows of values are summed with and to.
template <class Cache>
struct Mixing {
  const typename Cache::Factor* weights[kTileRows];
  float* out[kTileRows];
  float factor[kTileRows];
};

template <class Cache, int R, int D>
inline void value_block(const ValueTile<Cache>& v, int d, const Mixing<Cache>& m) {
  const size_t apart = size_t(v.padded_dim) * Cache::kStep;
  const typename Cache::Cell* lines = v.cells + size_t(d) * Cache::kStep;
  V16f sum[R][D];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < D; ++i) sum[r][i] = mul(load(m.out[r] + d + i * 16), set1(m.factor[r]));
  for (int s = v.begin; s < v.end; ++s)
    add_lines<Cache, 0, R, D>(lines + size_t(s) * apart, kLine<Cache>, m.weights, size_t(s) * Cache::kStep, sum);
  if constexpr (Cache::kStep > 1) if (v.rest) {
    const typename Cache::Cell* last = lines + size_t(v.end) * apart;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < D; ++i)
        sum[r][i] = Cache::multiply_first(sum[r][i], last + size_t(i) * kLine<Cache>, v.rest,
                                          m.weights[r] + size_t(v.end) * Cache::kStep);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < D; ++i) store(m.out[r] + d + i * 16, sum[r][i]);
}

template <class Cache, int R, int D = vectors_for<R>()>
inline void value_rows(const ValueTile<Cache>& v, int d, const Mixing<Cache>& m) {
  for (; d + D * 16 <= v.padded_dim; d += D * 16) value_block<Cache, R, D>(v, d, m);
  if constexpr (D > 1) value_rows<Cache, R, D / 2>(v, d, m);
}

// Up to kTileRows rows.
template <class Cache, int R = kTileRows>
inline void value_tile(const ValueTile<Cache>& v, const Mixing<Cache>& m, int count) {
  if (count == R) return value_rows<Cache, R>(v, 0, m);
  if constexpr (R > 1) value_tile<Cache, R - 1>(v, m, count);
}

}  // namespace
}  // namespace trilemma
