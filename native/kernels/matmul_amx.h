// Products in tiles of the matrix unit (AMX): 16 tokens x 16 rows x 32 columns (or 16, where halves of a block have scales) a step.
//
// Both sides are bytes, and the sum of a block is an exact int32. It then takes the same multiply-adds, blocks ascending, as in
// matmul_int8.h: the bits of every other instruction set. docs/decisions/0029-amx.md
#pragma once

#include "amx_tiles.h"
#include "matmul_int8.h"

namespace trilemma {
namespace {

constexpr int kAmxPanels = 16, kAmxBlocks = 32;  // whose totals wait in the workspace; that are walked over at once
static_assert(size_t(kAmxPanels) * kPanel * kAmxTokens * 4 <= kAmxWorkspace);

// A unit of weights is a part of a block that has one scale: lines of four columns of 16 rows, as tiles read them.
template <class C>
struct Units {
  static constexpr bool kInPlace = C::kBits == 8;      // read from where they lie
  static constexpr int kColumns = kBlock / C::kParts;  // bytes of a token's inputs
  static constexpr int kLines = kColumns / 4, kSize = kLines * 64;
  static constexpr int kHeld = 4, kHeldBlocks = kHeld / C::kParts;  // that stay in tiles while tokens walk by
};

// The weights of some units of a panel as tiles hold them while tokens walk by.
template <class C>
struct HeldWeights {
  static constexpr int kHeld = Units<C>::kHeld;
  alignas(64) uint8_t stored[kHeld * Units<C>::kSize];
  const uint8_t* lines = stored;  // of all units, one behind the other
  V16f scale[kHeld], minimum[kHeld];
  int panel, unit, count = 0;  // where from: of the panels and of the chunk's units

  TRILEMMA_INLINE void load_tiles() const {
    _tile_loadd(0, lines, 64);
    if (count > 1) { _tile_loadd(1, lines + Units<C>::kSize, 64); }
    if (count > 2) { _tile_loadd(2, lines + 2 * Units<C>::kSize, 64); }
    if (count > 3) { _tile_loadd(3, lines + 3 * Units<C>::kSize, 64); }
  }
};

// Some panels' weights in the order in which they are held: by chunks of blocks, then panels, then groups of units.
template <class C>
class AmxWeights {
 public:
  static constexpr int kHeldBlocks = Units<C>::kHeldBlocks;

  AmxWeights(const PackedView& w, int first, int panels) : blocks_(w.blocks), panels_(panels) {
    for (int p = 0; p < panels; ++p) scale_at_[p] = BlockScales<C>(w, first + p), codes_[p] = panel_codes(w, first + p);
  }

  // Goes on to the next chunk; false where none is left.
  bool next() {
    block_ += chunk_;
    chunk_ = blocks_ - block_ < kAmxBlocks ? blocks_ - block_ : kAmxBlocks;
    panel_ = taken_ = 0;
    return chunk_ > 0;
  }
  int block() const { return block_; }  // the chunk's first
  int panels() const { return panels_; }
  V16f row_scale(int panel) const { return scale_at_[panel].scale[0]; }  // where rows have one

  // Takes the chunk's next group of units; false where none is left.
  bool take(HeldWeights<C>& to) {
    if (panel_ == panels_) return false;
    const int blocks = chunk_ - taken_ < kHeldBlocks ? chunk_ - taken_ : kHeldBlocks;
    to.panel = panel_, to.unit = taken_ * C::kParts, to.count = blocks * C::kParts;
    const uint8_t*& codes = codes_[panel_];
    auto& scales = scale_at_[panel_];
    if (Units<C>::kInPlace) to.lines = codes;
    for (int b = 0; b < blocks; ++b, codes += block_bytes(C::kBits)) {
      scales.next();
      if (!Units<C>::kInPlace) expand_codes<C, C::kOffset>(codes, to.stored + b * C::kParts * Units<C>::kSize);
      for (int part = 0; part < C::kParts; ++part) {
        to.scale[b * C::kParts + part] = scales.scale[part];
        if (!C::kSymmetric) to.minimum[b * C::kParts + part] = scales.minimum[part];
      }
    }
    if ((taken_ += blocks) == chunk_) ++panel_, taken_ = 0;
    return true;
  }
  // Brings nearer share `part` of `parts` of what will be taken next.
  TRILEMMA_INLINE void fetch(int part, int parts) const {
    if (panel_ == panels_) return;
    constexpr int kLines = int(kHeldBlocks * block_bytes(C::kBits) / 64);
    const int each = (kLines + parts - 1) / parts;
    for (int i = part * each; i < (part + 1) * each && i < kLines; ++i) __builtin_prefetch(codes_[panel_] + i * 64);
  }

 private:
  int blocks_, panels_, block_ = 0, chunk_ = 0;
  int panel_ = 0, taken_ = 0;  // blocks of the chunk of this panel
  BlockScales<C> scale_at_[kAmxPanels];
  const uint8_t* codes_[kAmxPanels];
};

// Two more than are used, so that what is stored for one tile of tokens does not lie 4 KB from what is read for another.
using TileSums = int32_t[6][kTokenTile * kPanel];

// Numbers of tiles are part of the instructions.
#define TRILEMMA_UNIT(held, input_tile, sums_tile) \
  _tile_loadd(input_tile, x, kBlock);              \
  _tile_zero(sums_tile);                           \
  _tile_dpbssd(sums_tile, input_tile, held);       \
  _tile_stored(sums_tile, sums, 64)

// The sums of one unit: its weights are held in tile `Held`; neighbours share no other tile.
template <int Held>
TRILEMMA_INLINE void start_unit(const int8_t* x, int32_t* sums) {
  if constexpr (Held == 0) { TRILEMMA_UNIT(0, 6, 4); }
  if constexpr (Held == 1) { TRILEMMA_UNIT(1, 7, 5); }
  if constexpr (Held == 2) { TRILEMMA_UNIT(2, 6, 4); }
  if constexpr (Held == 3) { TRILEMMA_UNIT(3, 7, 5); }
}
#undef TRILEMMA_UNIT

// The inputs of a group of units: a tile of tokens, and what their sums are multiplied with.
template <class C>
struct UnitInputs {
  static constexpr int kHeld = Units<C>::kHeld;
  const int8_t* x[kHeld];
  const float *scale[kHeld], *sum[kHeld] = {};

  UnitInputs(const Int8Input& in, int tile, int block, const HeldWeights<C>& of) {
    const size_t first = (size_t(tile) * size_t(in.blocks) + size_t(block + of.unit / C::kParts)) * kTokenTile;
#pragma GCC unroll 4
    for (int q = 0; q < kHeld; ++q) {
      const int part = q % C::kParts;  // a group begins with a block
      const size_t cell = first + size_t(q / C::kParts) * kTokenTile;
      x[q] = in.codes + cell * kBlock + part * Units<C>::kColumns;
      scale[q] = in.scale + cell;
      if (!C::kSymmetric) sum[q] = (C::kParts == 2 ? in.half_sum[part] : in.sum) + cell;
    }
  }
};

// What a unit's sums add to the totals of its panel.
template <class C>
TRILEMMA_INLINE void add_unit(V16f scales, V16f minima, const int32_t* sums, const float* scale, const float* sum, V16f* total) {
#pragma GCC unroll 16
  for (int t = 0; t < kTokenTile; ++t) {
    const V16f factor = C::kRowScales ? set1(scale[t]) : mul(scales, set1(scale[t]));
    total[t] = fma(factor, {_mm512_cvtepi32_ps(_mm512_loadu_si512(sums + t * kPanel))}, total[t]);
    if (!C::kSymmetric) total[t] = fma(minima, set1(sum[t]), total[t]);
  }
}

// Step `Q` of a group of units: starts a tile of tokens while the sums of the one before are added.
template <class C, int Q = 0>
TRILEMMA_INLINE void walk_units(const HeldWeights<C>& held, const UnitInputs<C>& in, const TileSums& sums, int starting,
                                const UnitInputs<C>& next, TileSums& started, V16f* total) {
  if (Q < starting) start_unit<Q>(next.x[Q], started[Q]);
  if (Q < held.count)
    add_unit<C>(held.scale[Q], C::kSymmetric ? zero() : held.minimum[Q], sums[Q], in.scale[Q], in.sum[Q], total);
  if constexpr (Q + 1 < Units<C>::kHeld) walk_units<C, Q + 1>(held, in, sums, starting, next, started, total);
}

// All tiles of tokens through the chunk's weights, added to `totals`: [panel][tile].
template <class C>
inline void amx_chunk(AmxWeights<C>& weights, const Int8Input& in, int first_tile, int tiles, float* totals) {
  constexpr size_t kTotals = kTokenTile * kPanel;
  alignas(64) TileSums sums[2];
  HeldWeights<C> held[2];
  weights.take(held[0]);
  finish_stores();
  held[0].load_tiles();
  UnitInputs<C> now(in, first_tile, weights.block(), held[0]);
  start_unit<0>(now.x[0], sums[0][0]);
  if (held[0].count > 1) start_unit<1>(now.x[1], sums[0][1]);
  if (held[0].count > 2) start_unit<2>(now.x[2], sums[0][2]);
  if (held[0].count > 3) start_unit<3>(now.x[3], sums[0][3]);
  int turn = 0;
  for (int group = 0;; group ^= 1) {
    const HeldWeights<C>& of = held[group];
    HeldWeights<C>& other = held[group ^ 1];
    const bool more = weights.take(other);
    finish_stores();
    float* kept = totals + size_t(of.panel) * (kAmxTokens / kTokenTile) * kTotals;
    for (int n = 0; n < tiles; ++n, kept += kTotals, turn ^= 1) {
      const bool wraps = n + 1 == tiles;
      if (wraps && more) other.load_tiles();
      weights.fetch(n, tiles);
      const UnitInputs<C> next = wraps ? more ? UnitInputs<C>(in, first_tile, weights.block(), other) : now
                                       : UnitInputs<C>(in, first_tile + n + 1, weights.block(), of);
      V16f total[kTokenTile];
#pragma GCC unroll 16
      for (int t = 0; t < kTokenTile; ++t) total[t] = of.unit + weights.block() == 0 ? zero() : load(kept + t * kPanel);
      walk_units(of, now, sums[turn], !wraps ? of.count : more ? other.count : 0, next, sums[turn ^ 1], total);
#pragma GCC unroll 16
      for (int t = 0; t < kTokenTile; ++t) store(kept + t * kPanel, total[t]);
      now = next;
    }
    if (!more) return;
  }
}

// Rows behind the last token are multiplied too, whatever they are, and not written.
template <class C>
inline void amx_panels(const PackedView& w, const Int8Input& in, int tokens, int begin, int end, const Output& out) {
  float* totals = static_cast<float*>(in.workspace);
  Tiles unit;
  TileShapes shapes;
  shapes.set(0, 3, Units<C>::kLines, 64);
  shapes.set(4, 5, kTokenTile, 64);
  shapes.set(6, 7, kTokenTile, Units<C>::kColumns);
  unit.shape(shapes);
  for (int from = 0; from < tokens; from += kAmxTokens) {
    const int rows = tokens - from < kAmxTokens ? tokens - from : kAmxTokens;
    for (int first = begin; first < end; first += kAmxPanels) {
      AmxWeights<C> weights(w, first, end - first < kAmxPanels ? end - first : kAmxPanels);
      while (weights.next()) amx_chunk(weights, in, from / kTokenTile, (rows + kTokenTile - 1) / kTokenTile, totals);
      for (int t = 0; t < rows; ++t)
        for (int p = 0; p < weights.panels(); ++p) {
          V16f total = load(totals + (size_t(p) * kAmxTokens + size_t(t)) * kPanel);
          if (C::kRowScales) total = mul(total, weights.row_scale(p));
          if (C::kSharedRows) total = mul(total, set1(in.row_scale[from + t]));
          write_panel(total, first + p, w.rows, from + t, out);
        }
    }
  }
}

// Fewer tokens than pay for expanding the weights: with the vector instructions.
constexpr int kAmxLeast = 2 * kTokenTile;

void matmul_int8_amx(const PackedView& w, const Int8Input& x, int tokens, int begin, int end, const Output& out) {
  const auto run = [&](auto codes) {
    using C = decltype(codes);
    if (x.workspace && tokens >= kAmxLeast) return amx_panels<C>(w, x, tokens, begin, end, out);
    int8_tokens<C>(w, x, 0, tokens, begin, end, out);
  };
  if (w.bits == 8 && w.groups == 1) return run(RowCodes8{});
  with_codes(w, run);
}

}  // namespace
}  // namespace trilemma
