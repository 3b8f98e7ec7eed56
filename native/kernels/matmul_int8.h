// y = W x for panel16 with int8 activations in blocks of 32.
//
// Per block (or half of one, where that has a scale of its own) the sum of products is an exact int32; then, with blocks
// ascending,
//     total = fma(w_scale * x_scale, float(sum), total)         (+ fma(w_min, x_scale * sum(x codes), total))
// A w_scale of a whole row of 8 bits multiplies the total instead; and for weights of few bits x_scale is a power of two of
// a row's scale, which multiplies the total: x_scale * sum is exact then, and one addition away from what the accumulator's bits are
// as a float (docs/decisions/0022). So all instruction sets, tile sizes and thread counts give the same bits.
#pragma once

#include "panel.h"

#if defined(TRILEMMA_SIMD_AVX512)
#include "block_dot_avx512.h"
#elif defined(TRILEMMA_SIMD_AVXVNNI)
#include "block_dot_avxvnni.h"
#elif defined(TRILEMMA_SIMD_AVX2)
#include "block_dot_avx2.h"
#elif defined(TRILEMMA_SIMD_NEON)
#include "block_dot_neon.h"
#else
#include "block_dot_scalar.h"
#endif

namespace trilemma {
namespace {

// The inputs of a tile of tokens, from one block on; null is what this kind of codes has no use for.
template <class C>
struct Int8Tile {
  static constexpr bool kStarts = kHasStart<C, kBiased8>, kOffsets = kHasOffset<C, kBiased8>;
  static constexpr Int8Start kStart = !kOffsets        ? kStart0
                                      : C::kSigned     ? kStart128
                                      : C::kBits == 6  ? (C::kParts == 2 ? kStart32Low : kStart32)
                                      : C::kBits == 5  ? kStart16
                                      : C::kBits == 4  ? kStart8
                                      : C::kParts == 2 ? kStart4Low
                                                       : kStart4;
  const int8_t* x;
  const float *scale, *sum[C::kParts] = {};  // `scale`: of scales 2^-e the base instead
  const int32_t* start[C::kParts] = {};
  size_t width;

  Int8Tile(const Int8Input& in, int token, size_t width) : width(width) {
    const size_t first = size_t(token / kTokenTile) * size_t(in.blocks) * size_t(in.width) + size_t(token % kTokenTile);
    x = in.codes + first * kBlock;
    scale = (C::kSharedRows ? in.base : in.scale) + first;
    for (int part = 0; part < C::kParts; ++part) {
      if (!C::kSymmetric) sum[part] = (C::kParts == 2 ? in.half_sum[part] : in.sum) + first;
      if (kStarts) start[part] = in.start[kStart + (kOffsets ? part : 0)] + first;
    }
  }
  void next_block() {
    x += width * kBlock;
    scale += width;
    for (int part = 0; part < C::kParts; ++part) {
      if (!C::kSymmetric) sum[part] += width;
      if (kStarts) start[part] += width;
    }
  }
};

// Codes whose rows have one scale each: it multiplies the total.
struct RowCodes8 : Codes<8, true> {
  static constexpr bool kRowScales = true;
};

// What a sum adds to a total. Scales 2^-e of inputs are in the sum already; its base is what it has too much.
template <class C>
TRILEMMA_INLINE V16f add_sum(V16f sum, V16f x_scale, V16f w_scale, V16f total) {
  if (C::kSharedRows) return fma(w_scale, add(sum, x_scale), total);
  return fma(C::kRowScales ? x_scale : mul(w_scale, x_scale), sum, total);
}

// What one part of a block adds to T tokens from `token` on, in nearly equal steps of at most kDotTokens.
template <class C, int Part, int T>
TRILEMMA_INLINE void add_blocks(const BlockWeights<C>& weights, const Int8Tile<C>& in, int token, V16f scale, V16f minimum,
                                V16f* total) {
  constexpr int kSteps = (T + kDotTokens - 1) / kDotTokens, kStep = (T + kSteps - 1) / kSteps;
  V16f sum[kStep];
  const int32_t* start = Int8Tile<C>::kStarts ? in.start[Part] + token : nullptr;
  block_dot<C, Part, kStep>(weights, in.x + token * kBlock, start, sum);
#pragma GCC unroll 4
  for (int t = 0; t < kStep; ++t) {
    total[t] = add_sum<C>(sum[t], set1(in.scale[token + t]), scale, total[t]);
    if (!C::kSymmetric) total[t] = fma(minimum, set1(in.sum[Part][token + t]), total[t]);
  }
  if constexpr (T > kStep)
    add_blocks<C, Part, T - kStep>(weights, in, token + kStep, scale, minimum, total + kStep);
}

constexpr size_t kAhead = 2048;  // bytes of codes
// One token or two read as fast as memory gives. Where they wait for lines that no stream fetched (Zen), they do so without
// prefetch, panel after panel. The server cores that have AMX read two fifths faster with it (docs/log.md): scales as well
// as codes, several panels side by side, and little at once; more of short panels, whose ends come soon.
#if defined(TRILEMMA_SIMD_AMX)
constexpr int kPrefetchTokens = 1, kPageTokens = 3, kLongPanels = 2, kShortPanels = 4;
#else
constexpr int kPrefetchTokens = 4, kPageTokens = kTokenTile + 1, kLongPanels = 1, kShortPanels = 1;
#endif
constexpr int kLongBlocks = 64;    // of a panel that is not short
constexpr int kScalesAhead = 16;   // blocks
constexpr int kWindowBlocks = 64;  // as many as a page has lines

// Panels that T tokens read side by side: more tokens wait for their own products.
constexpr int panels_abreast(int tokens, bool is_long) { return tokens >= 3 ? 1 : is_long ? kLongPanels : kShortPanels; }
// Blocks ahead that their codes are fetched.
template <class C, int P>
constexpr int codes_ahead() {
  return P == 1 ? int(kAhead / block_bytes(C::kBits)) : P == kLongPanels ? 4 : 8;
}

// From kPageTokens on, products take longer than reads that are begun early enough. What the processor fetches ahead of a stream of
// lines suits one token, which waits for nothing else, and ends with the 4 KB page; and a prefetch that waits for memory keeps others
// from being begun. So the next 64 blocks are touched a line of each of their pages at a time: streams side by side, that have time.
template <class C>
TRILEMMA_INLINE void fetch_pages(const uint8_t* block) {
  constexpr size_t kPage = 4096, kBytes = block_bytes(C::kBits), kWindow = kWindowBlocks * kBytes;
  const size_t at = uintptr_t(block) % kWindow;
  const uint8_t* next = block - at + kWindow + at / kBytes * 64;
  for (size_t page = 0; page < kBytes / 64; ++page) __builtin_prefetch(next + page * kPage, 0, 2);
}

// T tokens and P panels.
template <class C, int T, int P = 1>
inline void int8_tile(const PackedView& w, int panel, const Int8Input& input, int token, const Output& out) {
  const uint8_t* codes = panel_codes(w, panel);
  const size_t apart = size_t(w.blocks) * block_bytes(C::kBits);
  constexpr int kCodesAhead = codes_ahead<C, P>();
  const ScalesAhead<C> near(w, kScalesAhead, 0), beyond(w, kScalesAhead, P - 1), window(w, kWindowBlocks, 0);
  Int8Tile<C> in(input, token, T == kTokenTile ? size_t(kTokenTile) : size_t(input.width));
  BlockScales<C> scales[P];
  V16f total[P][T];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
    scales[p] = BlockScales<C>(w, panel + p);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) total[p][t] = zero();
  }
  for (int b = 0; b < w.blocks; ++b) {
    // What comes behind the end of these panels is the beginning of the next ones.
    const size_t ahead = kCodesAhead * block_bytes(C::kBits) + (b + kCodesAhead >= w.blocks ? (P - 1) * apart : 0);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      const uint8_t* from = codes + size_t(p) * apart;
      scales[p].next();
      const BlockWeights<C> weights(from);
      if (T >= kPageTokens) {
        fetch_pages<C>(from);
        scales[p].fetch(window);
      } else if (T >= kPrefetchTokens) {
        for (size_t line = 0; line < block_bytes(C::kBits); line += 64) __builtin_prefetch(from + ahead + line);
        if (P > 1) scales[p].fetch(b + kScalesAhead >= w.blocks ? beyond : near);
      }
      add_blocks<C, 0, T>(weights, in, 0, scales[p].scale[0], scales[p].minimum[0], total[p]);
      if constexpr (C::kParts == 2)
        add_blocks<C, 1, T>(weights, in, 0, scales[p].scale[1], scales[p].minimum[1], total[p]);
    }
    codes += block_bytes(C::kBits);
    in.next_block();
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      if (C::kRowScales) total[p][t] = mul(total[p][t], scales[p].scale[0]);
      if (C::kSharedRows) total[p][t] = mul(total[p][t], set1(input.row_scale[token + t]));
      write_panel(total[p][t], panel + p, w.rows, token + t, out);
    }
}

template <class C, int T, int P>
inline void int8_panels(const PackedView& w, const Int8Input& x, int t, int begin, int end, const Output& out) {
  int p = begin;
  for (; p + P <= end; p += P) int8_tile<C, T, P>(w, p, x, t, out);
  for (; p < end; ++p) int8_tile<C, T>(w, p, x, t, out);
}

// All tokens from `t` on, in tiles of T and then smaller ones: 16, 8, and what is left as one tile, so that weights are
// read as seldom as can be and no tile straddles two tiles of 16 of the input.
template <class C, int T = kIntTokens>
inline void int8_tokens(const PackedView& w, const Int8Input& x, int t, int tokens, int begin, int end,
                        const Output& out) {
  for (; t + T <= tokens; t += T) {
    if (w.blocks < kLongBlocks)
      int8_panels<C, T, panels_abreast(T, false)>(w, x, t, begin, end, out);
    else
      int8_panels<C, T, panels_abreast(T, true)>(w, x, t, begin, end, out);
  }
  if constexpr (T > 1)
    if (t < tokens) int8_tokens<C, (T > 8 ? T / 2 : T - 1)>(w, x, t, tokens, begin, end, out);
}

void matmul_int8(const PackedView& w, const Int8Input& x, int tokens, int begin, int end, const Output& out) {
  if (w.bits == 8 && w.groups == 1) return int8_tokens<RowCodes8>(w, x, 0, tokens, begin, end, out);
  with_codes(w, [&](auto codes) { int8_tokens<decltype(codes)>(w, x, 0, tokens, begin, end, out); });
}

}  // namespace
}  // namespace trilemma
