// y = W x with bf16 inputs and vdpbf16ps: two columns a lane and instruction, twice the rate of f32.
//
// The instruction adds both products in its own way (no denormals, its own rounding), so that this path agrees with
// itself for every tile, thread and batch, but with other instruction sets only within rounding.
// Weights are bf16 pairs, or panel16 codes, which bf16 holds exactly: their group's scale is applied in f32.
#pragma once

#include "matmul_pairs.h"

namespace trilemma {
namespace {

constexpr int kBf16Tokens = 8;  // x 2 chains: 16 accumulators
constexpr int kBf16Pairs = kBlock / 2;

inline V16f dot_bf16(V16f sum, V16u weights, const uint16_t* two) {
  int32_t pair;
  __builtin_memcpy(&pair, two, 4);
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)weights.v, (__m512bh)_mm512_set1_epi32(pair))};
}

void round_bf16_tile(const float* x, int token, const Bf16Input& out, float* sums) {
  const size_t first = size_t(token / kTokenTile) * size_t(out.blocks) * size_t(out.width) + size_t(token % kTokenTile);
  for (int b = 0; b < out.blocks; ++b) {
    const V16f low = to_bf16(load(x + b * kBlock)), high = to_bf16(load(x + b * kBlock + 16));
    uint16_t* codes = out.codes + (first + size_t(b) * size_t(out.width)) * kBlock;
    store_bf16(codes, low);
    store_bf16(codes + 16, high);
    if (sums) sums[b] = reduce_add(add(low, high));
  }
}

// Inputs of tokens from `token` on, all in one tile: block b of token t is at [b * width + t][32].
struct Bf16Tile {
  const uint16_t* x;
  size_t stride;
  Bf16Tile(const Bf16Input& in, int token) {
    const size_t first = size_t(token / kTokenTile) * size_t(in.blocks) * size_t(in.width) + size_t(token % kTokenTile);
    x = in.codes + first * kBlock;
    stride = size_t(in.width) * kBlock;
  }
};

template <int P, int T>
inline void bf16_tile(const PairView& w, int panel, const Bf16Input& in, int token, const Output& out) {
  Bf16Tile tile(in, token);
  const uint8_t* lines = pair_panel(w, panel);
  const size_t stride = pair_panel_bytes(w);
  V16f sum[P][T][2];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[p][t][0] = sum[p][t][1] = zero();
  for (int b = 0; b < w.blocks; ++b, lines += kBlock * kPanel * 2, tile.x += tile.stride)
#pragma GCC unroll 16
    for (int i = 0; i < kBf16Pairs; ++i)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const V16u line = load_line(lines + size_t(p) * stride + 64 * i);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) sum[p][t][i % 2] = dot_bf16(sum[p][t][i % 2], line, tile.x + t * kBlock + 2 * i);
      }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) write_panel(add(sum[p][t][0], sum[p][t][1]), panel + p, w.rows, token + t, out);
}

template <int T = kBf16Tokens>
inline void bf16_tokens(const PairView& w, const Bf16Input& x, int t, int tokens, int begin, int end,
                        const Output& out) {
  constexpr int kPanels = T <= 2 ? 4 / T : 1;
  for (; t + T <= tokens; t += T) {
    int p = begin;
    for (; p + kPanels <= end; p += kPanels) bf16_tile<kPanels, T>(w, p, x, t, out);
    for (; p < end; ++p) bf16_tile<1, T>(w, p, x, t, out);
  }
  if constexpr (T > 1)
    if (t < tokens) bf16_tokens<T - 1>(w, x, t, tokens, begin, end, out);
}

void matmul_pairs_bf16(const PairView& w, const Bf16Input& x, int tokens, int begin, int end, const Output& out) {
  bf16_tokens(w, x, 0, tokens, begin, end, out);
}

// Small integers as bf16, for a look-up by the low four bits of an index of five.
inline __m512i bf16_values(int offset) {
  alignas(64) uint16_t table[32];
  for (int i = 0; i < 32; ++i) {
    const float value = float(i % 16 - offset);
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    table[i] = uint16_t(bits >> 16);
  }
  return _mm512_load_si512(table);
}

// Pair `I` (columns 2I, 2I+1 of 8) of a 4-bit line. vpermw reads five bits of an index; the table repeats after 16.
template <int I>
inline V16u nibble_pair(__m512i line, __m512i values) {
  constexpr int kShift = 16 * (I % 2) + 4 * (I / 2);  // of the first column's nibble
  const __m512i first = kShift ? _mm512_srli_epi32(line, kShift) : line;
  const __m512i second = kShift >= 8 ? _mm512_srli_epi32(line, kShift - 8) : _mm512_slli_epi32(line, 8 - kShift);
  const __m512i index = _mm512_mask_blend_epi16(0xaaaaaaaau, first, second);
  return {_mm512_permutexvar_epi16(index, values)};
}

// Pair `I` (columns 2I, 2I+1 of 4) of an 8-bit line: |code| <= 128 has 8 significant bits, exact in bf16.
template <int I>
inline V16u byte_pair(__m512i line) {
  const __m512i first = _mm512_srai_epi32(_mm512_slli_epi32(line, 24 - 16 * I), 24);
  const __m512i second = _mm512_srai_epi32(_mm512_slli_epi32(line, 16 - 16 * I), 24);
  const __m512i a = _mm512_castps_si512(_mm512_cvtepi32_ps(first)), b = _mm512_castps_si512(_mm512_cvtepi32_ps(second));
  return {_mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(a, 16), b)};
}

template <int T>
inline void add_pair(V16u weights, const uint16_t* x, V16f* sum) {
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) sum[t] = dot_bf16(sum[t], weights, x + t * kBlock);
}

// Columns [begin, end) of a block; those of 5 and 6 bits come as lines of bytes.
template <class C, int T>
inline void bf16_columns(const uint8_t* codes, int begin, int end, const uint16_t* x, __m512i values, V16f* even,
                         V16f* odd) {
#pragma GCC unroll 4
  for (int i = begin; i < end; i += 8)
    if constexpr (C::kBits == 4) {
      const __m512i line = load_line(codes + i * 8).v;
      add_pair<T>(nibble_pair<0>(line, values), x + i, even);
      add_pair<T>(nibble_pair<1>(line, values), x + i + 2, odd);
      add_pair<T>(nibble_pair<2>(line, values), x + i + 4, even);
      add_pair<T>(nibble_pair<3>(line, values), x + i + 6, odd);
    } else {
      const __m512i line = load_line(codes + i * 16).v, next = load_line(codes + i * 16 + 64).v;
      add_pair<T>(byte_pair<0>(line), x + i, even);
      add_pair<T>(byte_pair<1>(line), x + i + 2, odd);
      add_pair<T>(byte_pair<0>(next), x + i + 4, even);
      add_pair<T>(byte_pair<1>(next), x + i + 6, odd);
    }
}

template <class C, int T>
inline void packed_bf16_tile(const PackedView& w, int panel, const Bf16Input& in, const float* sums, int token,
                             const Output& out) {
  const uint8_t* packed = panel_codes(w, panel);
  const __m512i values = bf16_values(C::kOffset);
  constexpr bool kExpanded = C::kBits == 5 || C::kBits == 6;
  alignas(64) uint8_t expanded[kExpanded ? 8 * 64 : 1];
  BlockScales<C> scales(w, panel);
  Bf16Tile tile(in, token);
  V16f total[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) total[t] = zero();
  for (int b = 0; b < w.blocks; ++b, tile.x += tile.stride, packed += block_bytes(C::kBits)) {
    scales.next();
    const uint8_t* codes = packed;
    if constexpr (kExpanded) expand_codes<C::kBits, C::kOffset>(packed, expanded), codes = expanded;
    for (int part = 0; part < C::kParts; ++part) {
      V16f even[T], odd[T];
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) even[t] = odd[t] = zero();
      constexpr int kColumns = kBlock / C::kParts;
      bf16_columns<C, T>(codes, part * kColumns, (part + 1) * kColumns, tile.x, values, even, odd);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        total[t] = fma(scales.scale[part], add(even[t], odd[t]), total[t]);
        if (!C::kSymmetric)
          total[t] = fma(scales.minimum, set1(sums[size_t(token + t) * size_t(w.blocks) + size_t(b)]), total[t]);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) write_panel(total[t], panel, w.rows, token + t, out);
}

template <class C, int T = kBf16Tokens>
inline void packed_bf16_tokens(const PackedView& w, const Bf16Input& x, const float* sums, int t, int tokens, int begin,
                               int end, const Output& out) {
  for (; t + T <= tokens; t += T)
    for (int p = begin; p < end; ++p) packed_bf16_tile<C, T>(w, p, x, sums, t, out);
  if constexpr (T > 1)
    if (t < tokens) packed_bf16_tokens<C, T - 1>(w, x, sums, t, tokens, begin, end, out);
}

void matmul_packed_bf16(const PackedView& w, const Bf16Input& x, const float* sums, int tokens, int begin, int end,
                        const Output& out) {
  with_codes(w, [&](auto codes) { packed_bf16_tokens<decltype(codes)>(w, x, sums, 0, tokens, begin, end, out); });
}

}  // namespace
}  // namespace trilemma
