// Products of bf16 inputs in tiles of the matrix unit (AMX), for every number of tokens, or in vector instructions that give
// its bits, so that this path agrees with itself. Sums run over all columns. Weights are bf16, or codes that their scales are
// multiplied into, rounded to bf16. docs/decisions/0029-amx.md
#pragma once

#include "amx_tiles.h"
#include "matmul_bf16.h"
#include "matmul_int8.h"

namespace trilemma {
namespace {

// Products of bf16 pairs: tile T of tokens and panel P add into tile 2T + P; inputs in 4 + T, weights in 6 + P.
constexpr int kTileFloats = kTokenTile * kPanel;
constexpr size_t kBlockLines = size_t(kBlock) * kPanel * 2;  // bytes of a block's weights
using PairSums = float[4][kTileFloats];

template <int T, int P>
TRILEMMA_INLINE void zero_pairs() {
  _tile_zero(0);
  if constexpr (P > 1) { _tile_zero(1); }
  if constexpr (T > 1) { _tile_zero(2); }
  if constexpr (T > 1 && P > 1) { _tile_zero(3); }
}
template <int T, int P>
TRILEMMA_INLINE void load_pairs(const float* sums) {
  _tile_loadd(0, sums, 64);
  if constexpr (P > 1) { _tile_loadd(1, sums + kTileFloats, 64); }
  if constexpr (T > 1) { _tile_loadd(2, sums + 2 * kTileFloats, 64); }
  if constexpr (T > 1 && P > 1) { _tile_loadd(3, sums + 3 * kTileFloats, 64); }
}
template <int T, int P>
TRILEMMA_INLINE void store_pair_sums(float* sums) {
  _tile_stored(0, sums, 64);
  if constexpr (P > 1) { _tile_stored(1, sums + kTileFloats, 64); }
  if constexpr (T > 1) { _tile_stored(2, sums + 2 * kTileFloats, 64); }
  if constexpr (T > 1 && P > 1) { _tile_stored(3, sums + 3 * kTileFloats, 64); }
}
template <int T, int P>
TRILEMMA_INLINE void add_pair_block(const uint8_t* first, const uint8_t* second, const uint16_t* x, const uint16_t* next_x) {
  _tile_loadd(4, x, kBlock * 2);
  _tile_loadd(6, first, 64);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (P > 1) {
    _tile_loadd(7, second, 64);
    _tile_dpbf16ps(1, 4, 7);
  }
  if constexpr (T > 1) {
    _tile_loadd(5, next_x, kBlock * 2);
    _tile_dpbf16ps(2, 5, 6);
  }
  if constexpr (T > 1 && P > 1) { _tile_dpbf16ps(3, 5, 7); }
}

// Sums start at zero where `fresh`, else at `sums`, where they end.
template <int T, int P>
inline void add_pairs(const uint8_t* const* lines, const uint16_t* const* x, size_t stride, int blocks, bool fresh, float* sums) {
  if (fresh)
    zero_pairs<T, P>();
  else
    load_pairs<T, P>(sums);
  for (int b = 0; b < blocks; ++b) {
    const size_t at = size_t(b) * kBlockLines, in = size_t(b) * stride;
    add_pair_block<T, P>(lines[0] + at, lines[P - 1] + at, x[0] + in, x[T - 1] + in);
  }
  store_pair_sums<T, P>(sums);
}

// One or two tiles of tokens of a product, against one or two panels at a time.
class PairTokens {
 public:
  PairTokens(const Bf16Input& in, int token, int end) : token_(token), stride_(size_t(in.width) * kBlock) {
    const int left = end - token;
    first_ = left < kTokenTile ? left : kTokenTile;
    second_ = left - first_ < kTokenTile ? left - first_ : kTokenTile;
    x_[0] = Bf16Tile(in, token).x;
    if (second_) x_[1] = Bf16Tile(in, token + kTokenTile).x;
  }
  void shape(Tiles& tiles) const {
    TileShapes shapes;
    for (int t = 0; t < 2; ++t) {
      const int rows = t == 0 ? first_ : second_ == 0 ? 1 : second_;
      shapes.set(2 * t, 2 * t + 1, rows, 64);
      shapes.set(4 + t, 4 + t, rows, 64);
    }
    shapes.set(6, 7, kBlock / 2, 64);
    tiles.shape(shapes);
  }
  bool two() const { return second_ > 0; }
  const uint16_t* input(int tile, int block) const { return x_[tile] + size_t(block) * stride_; }
  bool as_high_as(const PairTokens& other) const { return first_ == other.first_ && second_ == other.second_; }
  // Adds `blocks` blocks from `block` on, whose weights are at `lines` of each panel.
  void add(int panels, const uint8_t* const* lines, int block, int blocks, bool fresh, PairSums& sums) const {
    const uint16_t* x[2] = {input(0, block), second_ ? input(1, block) : nullptr};
    const auto run = second_ ? (panels > 1 ? add_pairs<2, 2> : add_pairs<2, 1>) : (panels > 1 ? add_pairs<1, 2> : add_pairs<1, 1>);
    run(lines, x, stride_, blocks, fresh, sums[0]);
  }
  void write(int panels, int panel, int rows, const PairSums& sums, const Output& out) const {
    for (int p = 0; p < panels; ++p)
      for (int t = 0; t < first_ + second_; ++t)
        write_panel(load(sums[2 * (t / kTokenTile) + p] + t % kTokenTile * kPanel), panel + p, rows, token_ + t, out);
  }

 private:
  int token_, first_, second_;
  size_t stride_;
  const uint16_t* x_[2] = {};
};

// Weights that are bf16.
void matmul_pairs_amx(const PairView& w, const Bf16Input& in, int tokens, int begin, int end, const Output& out) {
  alignas(64) PairSums sums;
  Tiles tiles;
  for (int token = 0; token < tokens; token += 2 * kTokenTile) {
    const PairTokens pair(in, token, tokens);
    pair.shape(tiles);
    for (int p = begin; p < end; p += 2) {
      const int panels = end - p < 2 ? 1 : 2;
      const uint8_t* lines[2] = {pair_panel(w, p), panels > 1 ? pair_panel(w, p + 1) : nullptr};
      pair.add(panels, lines, 0, w.blocks, true, sums);
      pair.write(panels, p, w.rows, sums, out);
    }
  }
}

// Columns 4*I .. 4*I + 3 of a block, 16 rows each, before scales; 8-bit codes times kByteScale.
template <class C, int I>
TRILEMMA_INLINE void code_columns(const uint8_t* codes, const CodeTable<C>& values, V16f* column) {
  if constexpr (C::kBits == 8) {
    const __m512i line = load_line(codes + I * 64).v;
    column[0].v = byte_column<0>(line), column[1].v = byte_column<1>(line);
    column[2].v = byte_column<2>(line), column[3].v = byte_column<3>(line);
  } else {
    // Bits above the fourth of an index change nothing: the table repeats.
    constexpr bool kNibbles = C::kBits == 4;
    const __m512i line = kNibbles ? load_line(codes + I / 2 * 64).v : code_line<C::kBits, I>(codes).v;
    constexpr int kRight = kNibbles && I % 2 ? 4 : 0;
    const V16u even = values[kRight ? _mm512_srli_epi16(line, kRight) : line], odd = values[_mm512_srli_epi16(line, kRight + 8)];
    column[0] = low_bf16(even), column[1] = low_bf16(odd), column[2] = high_bf16(even), column[3] = high_bf16(odd);
  }
}

// bf16 in the upper halves, rounded to nearest; what is below is to be dropped.
TRILEMMA_INLINE __m512i round_upper(V16f x) {
  return _mm512_add_epi32(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x8000));
}
// Two columns as pairs of bf16.
TRILEMMA_INLINE V16u round_pairs(V16f low, V16f high) {
  return select_bits(0xffff0000u, {round_upper(high)}, {_mm512_srli_epi32(round_upper(low), 16)});
}

// The same with scales and minima.
template <class C, int I>
TRILEMMA_INLINE void scaled_columns(const uint8_t* codes, const CodeTable<C>& values, const V16f* scale, const V16f* minimum,
                                    V16f* column) {
  constexpr int kPart = C::kParts == 2 && I >= 4;
  code_columns<C, I>(codes, values, column);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j)
    column[j] = C::kSymmetric ? mul(column[j], scale[kPart]) : fma(column[j], scale[kPart], minimum[kPart]);
}

// A block from its columns 4*I on as lines of bf16 pairs.
template <class C, int I = 0>
TRILEMMA_INLINE void store_scaled(const uint8_t* codes, const CodeTable<C>& values, const V16f* scale, const V16f* minimum,
                                  uint8_t* to) {
  V16f column[4];
  scaled_columns<C, I>(codes, values, scale, minimum, column);
  store_line(to, round_pairs(column[0], column[1]));
  store_line(to + 64, round_pairs(column[2], column[3]));
  if constexpr (I < 7) store_scaled<C, I + 1>(codes, values, scale, minimum, to + 128);
}

// What its columns 4*I .. add to T tokens as tdpbf16ps adds them: even columns and odd ones in a chain each.
template <class C, int T, int I = 0>
TRILEMMA_INLINE void add_scaled_columns(const uint8_t* codes, const CodeTable<C>& values, const V16f* scale, const V16f* minimum,
                                        const float (*x)[kBlock], V16f (*chain)[T]) {
  V16f column[4];
  scaled_columns<C, I>(codes, values, scale, minimum, column);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const V16f weight = high_bf16({round_upper(column[j])});
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) chain[j % 2][t] = fma(weight, set1(x[t][4 * I + j]), chain[j % 2][t]);
  }
  if constexpr (I < 7) add_scaled_columns<C, T, I + 1>(codes, values, scale, minimum, x, chain);
}

// The blocks of a panel, one after the other, as bf16 with their scales.
template <class C>
class ScaledPanel {
 public:
  ScaledPanel() = default;
  ScaledPanel(const PackedView& w, int panel) : scales_(w, panel), codes_(panel_codes(w, panel)) {}

  TRILEMMA_INLINE void next(const CodeTable<C>& values, uint8_t* lines) {
    take();
    store_scaled<C>(codes_ - block_bytes(C::kBits), values, scale_, scales_.minimum, lines);
  }
  // Instead of that, adds the products of T tokens with the next block.
  template <int T>
  TRILEMMA_INLINE void add_next(const CodeTable<C>& values, const float (*x)[kBlock], V16f* total) {
    take();
    V16f chain[2][T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) chain[0][t] = chain[1][t] = zero();
    add_scaled_columns<C, T>(codes_ - block_bytes(C::kBits), values, scale_, scales_.minimum, x, chain);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) total[t] = add(total[t], add(chain[0][t], chain[1][t]));
  }

 private:
  TRILEMMA_INLINE void take() {
    scales_.next();
    for (size_t line = 0; line < block_bytes(C::kBits); line += 64) __builtin_prefetch(codes_ + kAhead + line);
#pragma GCC unroll 2
    for (int part = 0; part < C::kParts; ++part)
      scale_[part] = C::kBits == 8 ? mul(scales_.scale[part], set1(1 / kByteScale)) : scales_.scale[part];
    codes_ += block_bytes(C::kBits);
  }

  V16f scale_[C::kParts] = {};
  BlockScales<C> scales_;
  const uint8_t* codes_ = nullptr;
};

constexpr int kScaledPanels = 8, kScaledBlocks = 8;
constexpr size_t kScaledBytes = kScaledPanels * kScaledBlocks * kBlockLines;
static_assert(kScaledBytes + sizeof(PairSums) * (kScaledPanels / 2) * (kAmxTokens / (2 * kTokenTile)) <= kAmxWorkspace);

// Tokens [from, to) and some panels from `first` on: some blocks of all of them are scaled, then all tokens walk over these.
template <class C>
inline void scaled_panels(const PackedView& w, const Bf16Input& in, int from, int to, int first, int panels, const Output& out) {
  auto* lines = static_cast<uint8_t*>(in.workspace);
  auto* sums = reinterpret_cast<PairSums*>(lines + kScaledBytes);
  const CodeTable<C> values;
  ScaledPanel<C> scaled[kScaledPanels];
  for (int p = 0; p < panels; ++p) scaled[p] = ScaledPanel<C>(w, first + p);
  const auto lines_of = [&](int p) { return lines + size_t(p) * kScaledBlocks * kBlockLines; };
  Tiles tiles;
  PairTokens shaped(in, from, to);
  shaped.shape(tiles);
  for (int block = 0; block < w.blocks; block += kScaledBlocks) {
    const int count = w.blocks - block < kScaledBlocks ? w.blocks - block : kScaledBlocks;
    for (int p = 0; p < panels; ++p)
      for (int b = 0; b < count; ++b) scaled[p].next(values, lines_of(p) + size_t(b) * kBlockLines);
    finish_stores();
    PairSums* at = sums;
    for (int token = from; token < to; token += 2 * kTokenTile) {
      const PairTokens pair(in, token, to);
      if (!pair.as_high_as(shaped)) (shaped = pair).shape(tiles);
      for (int p = 0; p < panels; p += 2, ++at) {
        const int both = panels - p < 2 ? 1 : 2;
        const uint8_t* of[2] = {lines_of(p), both > 1 ? lines_of(p + 1) : nullptr};
        pair.add(both, of, block, count, block == 0, *at);
        if (block + count == w.blocks) pair.write(both, first + p, w.rows, *at, out);
      }
    }
  }
}

// Up to two tiles of tokens: each block is multiplied as soon as it is scaled.
template <class C, int T, int P>
inline void scaled_tiles(const PackedView& w, const PairTokens& pair, int panel, const CodeTable<C>& values, const Output& out) {
  constexpr int kRing = 4;  // blocks, so that the next can be written while one is read
  alignas(64) uint8_t lines[kRing][P][kBlockLines];
  alignas(64) PairSums sums;
  ScaledPanel<C> scaled[P];
  for (int p = 0; p < P; ++p) scaled[p] = ScaledPanel<C>(w, panel + p);
  zero_pairs<T, P>();
  for (int b = 0; b < w.blocks; ++b) {
    auto& block = lines[b % kRing];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) scaled[p].next(values, block[p]);
    finish_stores();
    add_pair_block<T, P>(block[0], block[P - 1], pair.input(0, b), pair.input(T - 1, b));
  }
  store_pair_sums<T, P>(sums[0]);
  pair.write(P, panel, w.rows, sums, out);
}

// The unit takes denormals for zeros, of inputs and of results.
class NoDenormals {
 public:
  NoDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON); }
  NoDenormals(const NoDenormals&) = delete;
  NoDenormals& operator=(const NoDenormals&) = delete;
  ~NoDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};

// Sums of T tokens and P panels with vector instructions, which give the bits of tiles: a block's even and odd columns are summed apart,
// added, and added to the total. For few tokens tiles do not pay: vector instructions run at half their rate for some 300
// cycles after one, and scaling the weights is what such a product waits for.
// Not inlined, so that no arithmetic moves into or out of the scope of its caller's NoDenormals.
template <class C, int T, int P>
__attribute__((noinline)) void scaled_vectors(const PackedView& w, const Bf16Input& in, int panel, const CodeTable<C>& values,
                                              float (*sums)[T][kPanel]) {
  const Bf16Tile tile(in, 0);
  ScaledPanel<C> scaled[P];
  V16f total[P][T];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    scaled[p] = ScaledPanel<C>(w, panel + p);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) total[p][t] = zero();
  }
  const uint16_t* codes = tile.x;
  for (int b = 0; b < w.blocks; ++b, codes += tile.stride) {
    alignas(64) float x[T][kBlock];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
      store(x[t], load_bf16(codes + t * kBlock)), store(x[t] + 16, load_bf16(codes + t * kBlock + 16));
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) scaled[p].template add_next<T>(values, x, total[p]);
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) store(sums[p][t], total[p][t]);
}

template <class C, int T, int P>
inline void scaled_vector_panels(const PackedView& w, const Bf16Input& in, int panel, const CodeTable<C>& values, const Output& out) {
  alignas(64) float sums[P][T][kPanel];
  {
    const NoDenormals scope;
    scaled_vectors<C, T, P>(w, in, panel, values, sums);
  }
  for (int p = 0; p < P; ++p)
    for (int t = 0; t < T; ++t) write_panel(load(sums[p][t]), panel + p, w.rows, t, out);
}

constexpr int kVectorTokens = 6;
template <class C, int T = kVectorTokens>
inline void scaled_few(const PackedView& w, const Bf16Input& in, int tokens, int begin, int end, const CodeTable<C>& values,
                       const Output& out) {
  if constexpr (T > 1)
    if (tokens < T) return scaled_few<C, T - 1>(w, in, tokens, begin, end, values, out);
  constexpr int kPanels = T <= 2 ? 4 / T : 1;
  int p = begin;
  for (; p + kPanels <= end; p += kPanels) scaled_vector_panels<C, T, kPanels>(w, in, p, values, out);
  for (; p < end; ++p) scaled_vector_panels<C, T, 1>(w, in, p, values, out);
}

// Codes with bf16 inputs: scales go into the weights, so that the tiles add over all columns.
void matmul_packed_amx(const PackedView& w, const Bf16Input& in, const float*, int tokens, int begin, int end, const Output& out) {
  with_codes(w, [&](auto codes) {
    using C = decltype(codes);
    if (in.workspace && tokens > 2 * kTokenTile) {
      for (int from = 0; from < tokens; from += kAmxTokens)
        for (int p = begin; p < end; p += kScaledPanels)
          scaled_panels<C>(w, in, from, from + kAmxTokens < tokens ? from + kAmxTokens : tokens, p,
                           end - p < kScaledPanels ? end - p : kScaledPanels, out);
      return;
    }
    const CodeTable<C> values;
    if (tokens <= kVectorTokens) return scaled_few<C>(w, in, tokens, begin, end, values, out);
    Tiles tiles;
    for (int token = 0; token < tokens; token += 2 * kTokenTile) {
      const PairTokens pair(in, token, tokens);
      pair.shape(tiles);
      const auto run = pair.two() ? scaled_tiles<C, 2, 2> : scaled_tiles<C, 1, 2>;
      const auto last = pair.two() ? scaled_tiles<C, 2, 1> : scaled_tiles<C, 1, 1>;
      int p = begin;
      for (; p + 2 <= end; p += 2) run(w, pair, p, values, out);
      if (p < end) last(w, pair, p, values, out);
    }
  });
}

}  // namespace
}  // namespace trilemma
