// Both products of attention over a bf16 cache in tiles of the matrix unit: its pairs lie as the unit reads them.
//
// Eight rows at a time, present or not: what the unit makes of a row does not depend on the others. Positions go in groups
// of 32 that begin at multiples of 32, so that a row's sums are the same whatever rows came along.
#pragma once

#include "attention_products.h"
#include "tiles_amx.h"

namespace trilemma {
namespace {

constexpr int kTileRowsAmx = 8, kTileLines = 16;

// Shapes for heads whose keys have `key_steps` pairs: tiles 0, 1 sums; 2 and 4, 5 whole inputs and lines; 3 and 6 what is
// left of a key behind the last 16 pairs.
inline TileShapes attention_shapes(int key_steps) {
  const int left = key_steps % kTileLines ? key_steps % kTileLines : kTileLines;
  TileShapes shapes;
  shapes.set(0, 2, kTileRowsAmx, 64);
  shapes.set(3, 3, kTileRowsAmx, left * 4);
  shapes.set(4, 5, kTileLines, 64);
  shapes.set(6, 6, left, 64);
  return shapes;
}

// Lines are 64 bytes, `apart` bytes from one to the next.
inline void fetch_lines(const uint16_t* lines, size_t apart, int count, ptrdiff_t ahead) {
  for (int i = 0; i < count; ++i) fetch(reinterpret_cast<const uint8_t*>(lines) + size_t(i) * apart, ahead);
}

// Scores of vector `v` of positions, and of the next one where `Two`: sums that do not wait for each other.
template <bool Two>
inline void score_vectors(const KeyTile<Bf16Product>& k, int v, const uint16_t* q, size_t ld, float (*scores)[kTile]) {
  constexpr size_t kCells = kLine<Bf16Product>;
  const int whole = k.steps / kTileLines, left = k.steps % kTileLines;
  const size_t apart = size_t(k.steps) * kCells;
  const uint16_t* lines = k.cells + size_t(v) * apart;
  fetch_lines(lines, 64, k.steps * (Two ? 2 : 1), k.ahead);
  _tile_zero(0);
  if constexpr (Two) { _tile_zero(1); }
  for (int s = 0; s < whole; ++s, lines += kTileLines * kCells, q += 2 * kTileLines) {
    _tile_loadd(2, q, ld * 2);
    _tile_loadd(4, lines, 64);
    _tile_dpbf16ps(0, 2, 4);
    if constexpr (Two) {
      _tile_loadd(5, lines + apart, 64);
      _tile_dpbf16ps(1, 2, 5);
    }
  }
  if (left) {
    _tile_loadd(3, q, ld * 2);
    _tile_loadd(6, lines, 64);
    _tile_dpbf16ps(0, 3, 6);
    if constexpr (Two) {
      _tile_loadd(6, lines + apart, 64);
      _tile_dpbf16ps(1, 3, 6);
    }
  }
  _tile_stored(0, scores[0] + v * 16, kTile * 4);
  if constexpr (Two) { _tile_stored(1, scores[0] + v * 16 + 16, kTile * 4); }
}

// scores[row][position] for vectors [begin, end) of positions; rows of queries lie `ld` apart.
inline void score_tile_amx(const KeyTile<Bf16Product>& k, int begin, int end, const uint16_t* queries, size_t ld,
                           float (*scores)[kTile]) {
  int v = begin;
  for (; v + 2 <= end; v += 2) score_vectors<true>(k, v, queries, ld, scores);
  if (v < end) score_vectors<false>(k, v, queries, ld, scores);
}

// The lines of 16 steps from `from` on, the first `count` positions of them; zeros behind.
inline void copy_lines(const uint16_t* from, size_t stride, int count, uint16_t* to) {
  for (int s = 0; s < kTileLines; ++s, to += kLine<Bf16Product>) {
    const int here = count - 2 * s;
    const __mmask16 lanes = here > 0 ? 0xffff : 0;
    const __m512i line = _mm512_maskz_loadu_epi32(lanes, from + size_t(s) * (here > 0 ? stride : 0));
    _mm512_store_si512(to, here == 1 ? _mm512_and_si512(line, _mm512_set1_epi32(0xffff)) : line);
  }
}

// Dimensions d to d + 15, and the next 16 where `Two`.
template <bool Two>
inline void value_vectors(const ValueTile<Bf16Product>& v, int d, const uint16_t* weights, const Sums* sums, int count) {
  constexpr int kGroup = 2 * kTileLines, kVectors = Two ? 2 : 1;
  const int first = v.begin * 2 / kGroup, held = 2 * v.end + v.rest, last = (held + kGroup - 1) / kGroup;
  alignas(64) float tile[kVectors][kTileRowsAmx][16] = {};
  alignas(64) uint16_t copied[kVectors][kTileLines * kLine<Bf16Product>];
  for (int i = 0; i < kVectors; ++i)
    for (int r = 0; r < count; ++r) store(tile[i][r], mul(load(sums[r].out + d + i * 16), set1(sums[r].factor)));
  __asm__ volatile("" ::: "memory");  // the intrinsics that load tiles do not say what they read
  _tile_loadd(0, tile[0], 64);
  if constexpr (Two) { _tile_loadd(1, tile[1], 64); }
  for (int g = first; g < last; ++g) {
    const uint16_t* lines[2];
    size_t apart = v.stride * 2;
    for (int i = 0; i < kVectors; ++i) {
      lines[i] = v.cells + size_t(g) * kTileLines * v.stride + size_t(d / 16 + i) * kLine<Bf16Product>;
      fetch_lines(lines[i], v.stride * 2, kTileLines, v.ahead);
      if ((g + 1) * kGroup <= held) continue;
      copy_lines(lines[i], v.stride, held - g * kGroup, copied[i]);
      lines[i] = copied[i];
      apart = 64;
    }
    __asm__ volatile("" ::: "memory");
    _tile_loadd(2, weights + g * kGroup, kTile * 2);
    _tile_loadd(4, lines[0], apart);
    _tile_dpbf16ps(0, 2, 4);
    if constexpr (Two) {
      _tile_loadd(5, lines[1], apart);
      _tile_dpbf16ps(1, 2, 5);
    }
  }
  _tile_stored(0, tile[0], 64);
  if constexpr (Two) { _tile_stored(1, tile[1], 64); }
  for (int i = 0; i < kVectors; ++i)
    for (int r = 0; r < count; ++r) store(sums[r].out + d + i * 16, load(tile[i][r]));
}

// Adds weights times values to the rows' sums. Steps of `v` are counted in whole groups: positions up to v.end * 2 + v.rest
// hold values, weights behind them are zeros; rows of weights lie kTile apart.
inline void value_tile_amx(const ValueTile<Bf16Product>& v, const uint16_t* weights, const Sums* sums, int count) {
  int d = 0;
  for (; d + 32 <= v.padded_dim; d += 32) value_vectors<true>(v, d, weights, sums, count);
  if (d < v.padded_dim) value_vectors<false>(v, d, weights, sums, count);
}

}  // namespace
}  // namespace trilemma
