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
    if (sums) sums[2 * b] = reduce_add(low), sums[2 * b + 1] = reduce_add(high);
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

// Codes as bf16: a look-up by the low bits of 16-bit indices. vpermw reads five bits of them, so that a table of fewer
// bits repeats; vpermt2w reads six.
template <class C, int Bits = C::kBits>
struct CodeTable {
  __m512i low, high;

  CodeTable() {
    alignas(64) uint16_t table[64];
    for (int i = 0; i < 64; ++i) {
      const int code = i % (1 << Bits);
      const float value = float(C::kCodebook ? kCodebook[code % 16] : code - C::kOffset);
      uint32_t bits;
      __builtin_memcpy(&bits, &value, 4);
      table[i] = uint16_t(bits >> 16);
    }
    low = _mm512_load_si512(table);
    high = _mm512_load_si512(table + 32);
  }
  TRILEMMA_INLINE V16u operator[](__m512i index) const {
    if constexpr (Bits == 6) return {_mm512_permutex2var_epi16(low, index, high)};
    return {_mm512_permutexvar_epi16(index, low)};
  }
};
template <class C>
struct CodeTable<C, 8> {};

// The index of a byte shuffle that does the same in every 32-bit lane: from which byte each comes, 0x80 for a zero.
TRILEMMA_INLINE __m512i byte_moves(uint32_t from) {
  const __m512i lanes = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
  return _mm512_or_si512(lanes, _mm512_set1_epi32(int(from)));
}
// Bytes 0, 1 or 2, 3 of a lane at its two even places: codes as 16-bit indices.
template <int I>
TRILEMMA_INLINE __m512i byte_indices(__m512i line) {
  return _mm512_shuffle_epi8(line, byte_moves(I ? 0x80038002u : 0x80018000u));
}

// Column `I` of four of an 8-bit line as f32, times kByteScale: the byte lies on top of its lane.
constexpr float kByteScale = 0x1p24f;
template <int I>
TRILEMMA_INLINE __m512 byte_column(__m512i line) {
  if constexpr (I == 0) return _mm512_cvtepi32_ps(_mm512_slli_epi32(line, 24));
  if constexpr (I == 3) return _mm512_cvtepi32_ps(_mm512_and_si512(line, _mm512_set1_epi32(int(0xff000000u))));
  return _mm512_cvtepi32_ps(_mm512_shuffle_epi8(line, byte_moves(uint32_t(I) << 24 | 0x808080u)));
}
// Pair `I` (columns 2I, 2I+1 of 4) of an 8-bit line: |code| <= 128 has 8 significant bits, exact in bf16, which is the
// upper half of f32.
template <int I>
TRILEMMA_INLINE V16u byte_pair(__m512i line) {
  const __m512i first = _mm512_castps_si512(byte_column<2 * I>(line));
  const __m512i second = _mm512_castps_si512(byte_column<2 * I + 1>(line));
  return {_mm512_mask_shuffle_epi8(second, 0x3333333333333333ull, first, byte_moves(0x0302u))};
}

template <int T>
TRILEMMA_INLINE void add_pair(V16u weights, const uint16_t* x, V16f* sum) {
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) sum[t] = dot_bf16(sum[t], weights, x + t * kBlock);
}

// Columns 4*I .. 4*Last of a block: `even` takes the first pair of four, `odd` the second.
template <class C, int I, int Last, int T>
TRILEMMA_INLINE void bf16_lines(const uint8_t* codes, const uint16_t* x, const CodeTable<C>& values, V16f* even,
                                V16f* odd) {
  if constexpr (C::kBits == 8) {
    const __m512i line = load_line(codes + I * 64).v;
    add_pair<T>(byte_pair<0>(line), x + 4 * I, even);
    add_pair<T>(byte_pair<1>(line), x + 4 * I + 2, odd);
  } else if constexpr (C::kBits == 4) {
    const __m512i line = load_line(codes + I / 2 * 64).v;
    const __m512i first = byte_indices<0>(line), second = byte_indices<1>(line);
    add_pair<T>(values[I % 2 ? _mm512_srli_epi16(first, 4) : first], x + 4 * I, even);
    add_pair<T>(values[I % 2 ? _mm512_srli_epi16(second, 4) : second], x + 4 * I + 2, odd);
  } else {
    const __m512i line = code_line<C::kBits, I>(codes).v;
    add_pair<T>(values[byte_indices<0>(line)], x + 4 * I, even);
    add_pair<T>(values[byte_indices<1>(line)], x + 4 * I + 2, odd);
  }
  if constexpr (I + 1 < Last) bf16_lines<C, I + 1, Last, T>(codes, x, values, even, odd);
}

// What one part of a block adds to T tokens.
template <class C, int Part, int T>
TRILEMMA_INLINE void bf16_part(const uint8_t* codes, const uint16_t* x, const CodeTable<C>& values, V16f scale, V16f minimum,
                               const float* sums, size_t ld_sums, int block, V16f* total) {
  constexpr int kLines = 8 / C::kParts;
  V16f even[T], odd[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) even[t] = odd[t] = zero();
  bf16_lines<C, Part * kLines, (Part + 1) * kLines, T>(codes, x, values, even, odd);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    total[t] = fma(scale, add(even[t], odd[t]), total[t]);
    if (!C::kSymmetric) total[t] = fma(minimum, set1(sum_of<C>(sums + size_t(t) * ld_sums, block, Part)), total[t]);
  }
}

template <class C, int T>
inline void packed_bf16_tile(const PackedView& w, int panel, const Bf16Input& in, const float* sums, int token,
                             const Output& out) {
  const uint8_t* codes = panel_codes(w, panel);
  const CodeTable<C> values;
  const size_t ld_sums = size_t(w.blocks) * 2;
  if (!C::kSymmetric) sums += size_t(token) * ld_sums;
  BlockScales<C> scales(w, panel);
  Bf16Tile tile(in, token);
  V16f total[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) total[t] = zero();
  for (int b = 0; b < w.blocks; ++b, tile.x += tile.stride, codes += block_bytes(C::kBits)) {
    scales.next();
    bf16_part<C, 0, T>(codes, tile.x, values, scales.scale[0], scales.minimum[0], sums, ld_sums, b, total);
    if constexpr (C::kParts == 2)
      bf16_part<C, 1, T>(codes, tile.x, values, scales.scale[1], scales.minimum[1], sums, ld_sums, b, total);
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    if (C::kBits == 8) total[t] = mul(total[t], set1(1 / kByteScale));
    write_panel(total[t], panel, w.rows, token + t, out);
  }
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
