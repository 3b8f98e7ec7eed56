// Products in tiles of the matrix unit (AMX): 16 tokens x 16 rows x 32 columns a step, of bf16 numbers.
//
// Int8 activations: their codes and the weights' are whole numbers of at most eight bits, exact in bf16, and the sum over
// a block (or half of one) stays below 2^24, exact in the f32 that the unit adds in. A power of two in the inputs changes
// none of that. Sums then take the same multiply-adds, blocks ascending, as in matmul_int8.h: the bits of every other
// instruction set. Why tiles of bf16 and not of int8: docs/decisions/0029-amx.md.
#pragma once

#include "amx_tiles.h"
#include "matmul_bf16.h"
#include "matmul_int8.h"

namespace trilemma {
namespace {

// What a unit of weights is: a part of a block that has one scale, as bf16 in lines of pairs of columns, 16 rows a line.
template <class C>
struct Units {
  static constexpr int kLines = kBlock / 2 / C::kParts, kBytes = kLines * 64;
  static constexpr int kHeld = 4;  // units whose inputs stay in tiles while panels walk by
};

// Columns 4*I .. 4*I + 3 of a block as two lines of bf16 pairs: the first and third, the second and fourth, as a look-up
// finds them without moving bytes; inputs lie in the same order (codes_as_bf16).
template <class C, int I>
TRILEMMA_INLINE void store_pairs(const uint8_t* codes, const CodeTable<C>& values, uint8_t* to) {
  if constexpr (C::kBits == 8) {
    const __m512i line = load_line(codes + I * 64).v;
    const auto column = [&](int left) { return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(line, left), 24)); };
    const auto pair = [](__m512 low, __m512 high) {
      return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(_mm512_castps_si512(low), 16), _mm512_castps_si512(high));
    };
    store_line(to, {pair(column(24), column(8))});
    store_line(to + 64, {pair(column(16), column(0))});
  } else if constexpr (C::kBits == 4) {
    // Bits above the fourth of an index change nothing: the table repeats.
    const __m512i line = load_line(codes + I / 2 * 64).v;
    store_line(to, values[I % 2 ? _mm512_srli_epi16(line, 4) : line]);
    store_line(to + 64, values[_mm512_srli_epi16(line, I % 2 ? 12 : 8)]);
  } else {
    const __m512i line = code_line<C::kBits, I>(codes).v;
    store_line(to, values[line]);
    store_line(to + 64, values[_mm512_srli_epi16(line, 8)]);
  }
  if constexpr (I < 7) store_pairs<C, I + 1>(codes, values, to + 128);
}

// Some panels' weights as products of whole tiles walk over them, some blocks at a time: by groups of units, then panels,
// then units.
template <class C>
class AmxWeights {
 public:
  static constexpr int kHeld = Units<C>::kHeld;

  AmxWeights(const PackedView& w, int first, int panels, void* workspace)
      : blocks_(w.blocks), panels_(panels), lines_(static_cast<uint8_t*>(workspace)) {
    scales_ = reinterpret_cast<float*>(lines_ + size_t(kAmxPanels) * kAmxBlocks * kBlock * kPanel * 2);
    minima_ = scales_ + size_t(kAmxPanels) * kAmxBlocks * 2 * kPanel;
    for (int p = 0; p < panels; ++p) scale_at_[p] = BlockScales<C>(w, first + p), codes_[p] = panel_codes(w, first + p);
  }

  // Takes the next blocks; false where none are left.
  bool next() {
    block_ += chunk_;
    chunk_ = blocks_ - block_ < kAmxBlocks ? blocks_ - block_ : kAmxBlocks;
    const CodeTable<C> values;
    for (int p = 0; p < panels_ && chunk_ > 0; ++p) {
      for (int b = 0; b < chunk_; ++b, codes_[p] += block_bytes(C::kBits)) {
        scale_at_[p].next();
        // Units of a block lie side by side.
        store_pairs<C, 0>(codes_[p], values, lines_ + slot_of(b * C::kParts, p) * Units<C>::kBytes);
        for (int part = 0; part < C::kParts; ++part) {
          const size_t slot = slot_of(b * C::kParts + part, p);
          store(scales_ + slot * kPanel, scale_at_[p].scale[part]);
          if (!C::kSymmetric) store(minima_ + slot * kPanel, scale_at_[p].minimum[part]);
        }
      }
    }
    return chunk_ > 0;
  }

  int block() const { return block_; }  // the first of those taken
  int units() const { return chunk_ * C::kParts; }
  bool last() const { return block_ + chunk_ == blocks_; }
  int panels() const { return panels_; }
  // Four units of a panel lie side by side, and behind them the next panel's.
  size_t slot_of(int unit, int panel) const {
    return size_t(unit / kHeld * panels_ + panel) * kHeld + size_t(unit % kHeld);
  }
  const uint8_t* lines(size_t slot) const { return lines_ + slot * Units<C>::kBytes; }
  V16f scale(size_t slot) const { return load(scales_ + slot * kPanel); }
  V16f minimum(size_t slot) const { return load(minima_ + slot * kPanel); }

 private:
  int blocks_, panels_, block_ = 0, chunk_ = 0;
  uint8_t* lines_;
  float *scales_, *minima_;
  BlockScales<C> scale_at_[kAmxPanels];
  const uint8_t* codes_[kAmxPanels];
};

// Two more than are used, so that what is stored for one panel does not lie 4 KB from what is read for another.
using TileSums = float[6][kTokenTile * kPanel];

// Numbers of tiles are part of the instructions.
#define TRILEMMA_UNIT(held, lines_tile, sums_tile) \
  _tile_loadd(lines_tile, lines, 64);              \
  _tile_zero(sums_tile);                           \
  _tile_dpbf16ps(sums_tile, held, lines_tile);     \
  _tile_stored(sums_tile, sums, 64)

// The sums of one unit: its inputs are held in tile `Held`; neighbours share no other tile.
template <int Held>
TRILEMMA_INLINE void start_unit(const uint8_t* lines, float* sums) {
  if constexpr (Held == 0) { TRILEMMA_UNIT(0, 6, 4); }
  if constexpr (Held == 1) { TRILEMMA_UNIT(1, 7, 5); }
  if constexpr (Held == 2) { TRILEMMA_UNIT(2, 6, 4); }
  if constexpr (Held == 3) { TRILEMMA_UNIT(3, 7, 5); }
}
#undef TRILEMMA_UNIT

// What a unit's sums add to the totals of its panel.
template <class C>
TRILEMMA_INLINE void add_unit(const AmxWeights<C>& weights, size_t slot, const float* sums, const float* scale, const float* sum,
                              V16f* total) {
  const V16f factors = weights.scale(slot), minima = C::kSymmetric ? zero() : weights.minimum(slot);
#pragma GCC unroll 16
  for (int t = 0; t < kTokenTile; ++t) {
    const V16f factor = C::kRowScales ? set1(scale[t]) : C::kSharedRows ? factors : mul(factors, set1(scale[t]));
    total[t] = fma(factor, load(sums + t * kPanel), total[t]);
    if (!C::kSymmetric) total[t] = fma(minima, set1(sum[t]), total[t]);
  }
}

// The inputs of a group of units: held in tiles while panels walk by, and what their sums are multiplied with.
template <class C>
struct HeldUnits {
  static constexpr int kHeld = Units<C>::kHeld;
  int count = 0;
  const uint16_t* x[kHeld] = {};
  const float *scale[kHeld] = {}, *sum[kHeld] = {};

  HeldUnits(const Int8Input& in, size_t first_cell, int unit, int units) : count(units - unit < kHeld ? units - unit : kHeld) {
    for (int q = 0; q < count; ++q) {
      const int part = (unit + q) % C::kParts;
      const size_t cell = first_cell + size_t((unit + q) / C::kParts) * kTokenTile;
      x[q] = in.bf16 + cell * kBlock + part * (kBlock / C::kParts);
      scale[q] = in.scale + cell;
      if (!C::kSymmetric) sum[q] = (C::kParts == 2 ? in.half_sum[part] : in.sum) + cell;
    }
  }
  // Share `part` of `parts` of what load_tiles will read.
  TRILEMMA_INLINE void prefetch(int part, int parts) const {
    const int lines = kTokenTile * count, each = (lines + parts - 1) / parts;
    for (int i = part * each; i < (part + 1) * each && i < lines; ++i)
      __builtin_prefetch(x[i / kTokenTile] + i % kTokenTile * kBlock);
  }
  TRILEMMA_INLINE void load_tiles() const {
    _tile_loadd(0, x[0], kBlock * 2);
    if (count > 1) { _tile_loadd(1, x[1], kBlock * 2); }
    if (count > 2) { _tile_loadd(2, x[2], kBlock * 2); }
    if (count > 3) { _tile_loadd(3, x[3], kBlock * 2); }
  }
};

// Step `Q` of a group of units: starts a panel's while the sums of the panel before are added.
template <class C, int Q = 0>
TRILEMMA_INLINE void walk_units(const AmxWeights<C>& weights, const HeldUnits<C>& held, size_t slot, const TileSums& sums,
                                int starting, TileSums& started, V16f* total) {
  if (Q < starting) start_unit<Q>(weights.lines(slot + Units<C>::kHeld + Q), started[Q]);
  if (Q < held.count) add_unit(weights, slot + Q, sums[Q], held.scale[Q], held.sum[Q], total);
  if constexpr (Q + 1 < Units<C>::kHeld)
    walk_units<C, Q + 1>(weights, held, slot, sums, starting, started, total);
}

// One tile of tokens through all panels, group by group of units, added to `totals`.
template <class C>
inline void amx_tokens(const AmxWeights<C>& weights, const Int8Input& in, int token, float* totals, TileSums* sums) {
  const size_t first = (size_t(token / kTokenTile) * size_t(in.blocks) + size_t(weights.block())) * kTokenTile;
  const int panels = weights.panels(), units = weights.units();
  HeldUnits<C> held(in, first, 0, units);
  held.load_tiles();
  start_unit<0>(weights.lines(0), sums[0][0]);
  if (held.count > 1) start_unit<1>(weights.lines(1), sums[0][1]);
  if (held.count > 2) start_unit<2>(weights.lines(2), sums[0][2]);
  if (held.count > 3) start_unit<3>(weights.lines(3), sums[0][3]);
  size_t slot = 0;
  int turn = 0;
  for (int u = 0; u < units; u += Units<C>::kHeld) {
    const bool more = u + Units<C>::kHeld < units;
    const HeldUnits<C> next(in, first, more ? u + Units<C>::kHeld : u, units);
    for (int p = 0; p < panels; ++p, slot += Units<C>::kHeld, turn ^= 1) {
      const bool wraps = p + 1 == panels;
      if (wraps && more) next.load_tiles();
      if (more) next.prefetch(p, panels);
      float* kept = totals + size_t(p) * kTokenTile * kPanel;
      V16f total[kTokenTile];
#pragma GCC unroll 16
      for (int t = 0; t < kTokenTile; ++t) total[t] = u + weights.block() == 0 ? zero() : load(kept + t * kPanel);
      walk_units(weights, held, slot, sums[turn], !wraps ? held.count : more ? next.count : 0, sums[turn ^ 1], total);
#pragma GCC unroll 16
      for (int t = 0; t < kTokenTile; ++t) store(kept + t * kPanel, total[t]);
    }
    held = next;
  }
}

template <class C>
inline void amx_panels(const PackedView& w, const Int8Input& in, int tokens, int begin, int end, const Output& out) {
  constexpr size_t kTotals = kTokenTile * kPanel;
  alignas(64) TileSums sums[2] = {};
  float* totals = reinterpret_cast<float*>(static_cast<uint8_t*>(in.workspace) + kAmxWeights);
  Tiles tiles;
  const auto shape = [&](int rows) {
    TileShapes shapes;
    shapes.set(0, 3, rows, kBlock * 2 / C::kParts);
    shapes.set(4, 5, rows, 64);
    shapes.set(6, 7, Units<C>::kLines, 64);
    tiles.shape(shapes);
  };
  const auto finish = [&](const AmxWeights<C>& weights, int first, int token, int rows, const float* of) {
    for (int p = 0; p < weights.panels(); ++p)
      for (int t = 0; t < rows; ++t) {
        V16f total = load(of + size_t(p) * kTotals + size_t(t) * kPanel);
        if (C::kRowScales) total = mul(total, weights.scale(weights.slot_of(0, p)));
        if (C::kSharedRows) total = mul(total, set1(in.row_scale[token + t]));
        write_panel(total, first + p, w.rows, token + t, out);
      }
  };
  const int spans = (tokens + kAmxTokens - 1) / kAmxTokens;
  for (int span = 0; span < spans; ++span)
    for (int first = begin; first < end; first += kAmxPanels) {
      const int from = span * kAmxTokens, to = tokens - from < kAmxTokens ? tokens : from + kAmxTokens;
      AmxWeights<C> weights(w, first, end - first < kAmxPanels ? end - first : kAmxPanels, in.workspace);
      while (weights.next()) {
        int shaped = 0;
        float* of = totals;
        for (int token = from; token < to; token += kTokenTile, of += kAmxPanels * kTotals) {
          const int rows = to - token < kTokenTile ? to - token : kTokenTile;
          if (rows != shaped) shape(shaped = rows);
          amx_tokens(weights, in, token, of, sums);
          if (weights.last()) finish(weights, first, token, rows, of);
        }
      }
    }
}

// Fewer tokens than pay for turning the weights into bf16: with the vector instructions.
constexpr int kAmxLeast = 2 * kTokenTile;

void matmul_int8_amx(const PackedView& w, const Int8Input& x, int tokens, int begin, int end, const Output& out) {
  const auto run = [&](auto codes) {
    using C = decltype(codes);
    if (x.bf16 && x.workspace && tokens >= kAmxLeast) return amx_panels<C>(w, x, tokens, begin, end, out);
    int8_tokens<C>(w, x, 0, tokens, begin, end, out);
  };
  if (w.bits == 8 && w.groups == 1) return run(RowCodes8{});
  with_codes(w, run);
}

}  // namespace
}  // namespace trilemma
