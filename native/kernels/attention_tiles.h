// The products of attention in tiles of the matrix unit (AMX): up to 16 rows x 16 positions (or dimensions) x 64 bytes a step.
// A cache's lines are rows of the unit's second operand as they are. One row takes as long as 16.
//
// Numbers of tiles: sums 0 to 3, factors 4, lines 5; factors and lines where heads end inside a step 6 and 7.
#pragma once

#include "amx_tiles.h"
#include "attention_products.h"

namespace trilemma {
namespace {

template <class Product>
concept Tiled = __is_same(Product, Bf16Product) || __is_same(Product, Int8Tiled);

constexpr int kTileLines = 16;

// What the unit multiplies: bf16 pairs, or bytes, of which a row of factors is two of the unit's: high halves, low halves.
template <class Product>
constexpr bool kBytes = sizeof(typename Product::Factor) == 1;
template <class Product>
constexpr int kUnitRows = kBytes<Product> ? 2 : 1;
template <class Product>
constexpr int kTileCells = kTileLines * Product::kStep;  // dimensions or positions of a step

template <>
struct Layout<Bf16Product> {
  using Factor = uint16_t;
  static constexpr int kStepRows = 16, kPositions = kTileCells<Bf16Product>;
  static constexpr size_t kRoom = kRowCells;

  static Factor* row(Factor* all, int r, int width) { return all + r * width; }
  static Factor* at(Factor* row, int i) { return row + i; }
  static void clear(Factor* row, int from, int to) { __builtin_memset(row + from, 0, size_t(to - from) * 2); }
};

// Sixty-four codes of all rows, then the next.
template <>
struct Layout<Int8Tiled> {
  using Factor = int8_t;
  static constexpr int kStepRows = 8, kPositions = kTileCells<Int8Tiled>;
  static constexpr size_t kRoom = size_t(kMaxHeadDim) / 64 * kRows * 128;

  static Factor* row(Factor* all, int r, int) { return all + r * 128; }
  static Factor* at(Factor* row, int i) { return row + i / 64 * kRows * 128 + i % 64; }
  static void clear(Factor* row, int from, int to) {
    for (int i = from; i < to; i += 16) {
      __builtin_memset(at(row, i), 0, 16);
      __builtin_memset(at(row, i) + 64, 0, 16);
    }
  }
};

// For products of up to `rows` rows with keys of `lines` lines, as long as it lives.
template <Tiled Product>
struct Shapes<Product> {
  Tiles tiles;

  Shapes(int rows, int lines) {
    const int rest = lines % kTileLines, units = rows * kUnitRows<Product>;
    TileShapes shapes;
    shapes.set(0, 4, units, 64);
    shapes.set(5, 5, kTileLines, 64);
    shapes.set(6, 6, units, rest ? rest * 4 : 64);
    shapes.set(7, 7, rest ? rest : kTileLines, 64);
    tiles.shape(shapes);
  }
};

// The unit takes lines faster than they can be asked for one by one (a core waits for 16 at a time). What reads ahead by
// itself is the processor, each 4 KB for their own, once some lines of them were asked for: so all of a run's 4 KB are begun side
// by side while the run before is worked on.
struct BegunRun {
  static constexpr size_t kPage = 4096, kLines = 20 * 64;
  const uint8_t* run;
  size_t bytes, page = 0, line = 0;

  BegunRun(const void* begin, size_t size) : run(static_cast<const uint8_t*>(begin)), bytes(size) {}
  TRILEMMA_INLINE void some(int lines) {
    for (; lines > 0 && line < kLines; --lines) {
      __builtin_prefetch(run + page + line, 0, 2);
      page += kPage;
      if (page + line >= bytes) page = 0, line += 64;
    }
  }
};
template <Tiled Product>
struct NextRun<Product> : BegunRun {
  using BegunRun::BegunRun;
};
// Lines to begin with every tile of keys, of values; between them the softmax begins some.
constexpr int kBegunByKeys = 3, kBegunByValues = 5;

// Rows of factors that the unit reads.
template <class Product>
struct UnitFactors {
  typename Product::Factor* first;
  size_t apart;  // bytes

  UnitFactors(const typename Product::Row* rows, const StepRows& step) : first(rows[-step.before].factors), apart(64) {
    if (!kBytes<Product> && step.all > 1) apart = size_t(rows[1 - step.before].factors - first) * sizeof(*first);
  }
  const void* at(int i) const { return Layout<Product>::at(first, i); }
};

// Adds lines and factors that are in tiles; numbers of tiles are part of the instructions.
template <class Product, int Sum, bool Rest>
TRILEMMA_INLINE void add_tile(const typename Product::Cell* lines, size_t apart) {
#define TRILEMMA_ADD(sum, factors, tile)         \
  _tile_loadd(tile, lines, apart);               \
  if constexpr (kBytes<Product>) {               \
    _tile_dpbssd(sum, factors, tile);            \
  } else {                                       \
    _tile_dpbf16ps(sum, factors, tile);          \
  }
#define TRILEMMA_ADD_TO(sum)                     \
  if constexpr (Sum == sum && Rest) {            \
    TRILEMMA_ADD(sum, 6, 7)                      \
  } else if constexpr (Sum == sum) {             \
    TRILEMMA_ADD(sum, 4, 5)                      \
  }
  TRILEMMA_ADD_TO(0) TRILEMMA_ADD_TO(1) TRILEMMA_ADD_TO(2) TRILEMMA_ADD_TO(3)
#undef TRILEMMA_ADD_TO
#undef TRILEMMA_ADD
}

template <int Count>
TRILEMMA_INLINE void zero_sums() {
  _tile_zero(0);
  if constexpr (Count > 1) { _tile_zero(1); }
  if constexpr (Count > 2) { _tile_zero(2); }
  if constexpr (Count > 3) { _tile_zero(3); }
}
// `next`: floats from one tile's first sum to the next one's.
template <int Count>
TRILEMMA_INLINE void store_sums(float* sums, int next, size_t apart) {
  _tile_stored(0, sums, apart);
  if constexpr (Count > 1) { _tile_stored(1, sums + next, apart); }
  if constexpr (Count > 2) { _tile_stored(2, sums + 2 * next, apart); }
  if constexpr (Count > 3) { _tile_stored(3, sums + 3 * next, apart); }
}

// Step of dimensions, from line `s` of every vector on, of `Count` vectors.
template <class Product, int Count, bool Rest, int I = 0>
TRILEMMA_INLINE void add_keys(const typename Product::Cell* lines, size_t apart, BegunRun& next) {
  add_tile<Product, I, Rest>(lines + I * apart, 64);
  next.some(kBegunByKeys);
  if constexpr (I + 1 < Count) add_keys<Product, Count, Rest, I + 1>(lines, apart, next);
}

// Scores of `Count` vectors from number `v` on, in sums of the unit.
template <class Product, int Count>
inline void score_vectors(const KeyTile<Product>& k, int v, const UnitFactors<Product>& q, float* scores,
                         BegunRun& next) {
  const size_t apart = size_t(k.steps) * kLine<Product>;
  const typename Product::Cell* lines = k.cells + size_t(v) * apart;
  zero_sums<Count>();
  int s = 0;
  for (; s + kTileLines <= k.steps; s += kTileLines) {
    _tile_loadd(4, q.at(s * Product::kStep), q.apart);
    add_keys<Product, Count, false>(lines + size_t(s) * kLine<Product>, apart, next);
  }
  if (s < k.steps) {
    _tile_loadd(6, q.at(s * Product::kStep), q.apart);
    add_keys<Product, Count, true>(lines + size_t(s) * kLine<Product>, apart, next);
  }
  store_sums<Count>(scores + v * 16, 16, kTile * 4);
}

template <class Product, int Count = 4>
inline void score_units(const KeyTile<Product>& k, int v, int end, const UnitFactors<Product>& q, float* scores,
                         BegunRun& next) {
  for (; v + Count <= end; v += Count) score_vectors<Product, Count>(k, v, q, scores, next);
  if constexpr (Count > 1) score_units<Product, Count / 2>(k, v, end, q, scores, next);
}

template <Tiled Product>
inline void score_tile(const KeyTile<Product>& k, int begin, int end, const typename Product::Row* q,
                       float (*scores)[kTile], const StepRows& rows, NextRun<Product>& next) {
  float(*first)[kTile] = scores - rows.before;
  finish_stores();
  score_units(k, begin, end, UnitFactors<Product>(q, rows), first[0], next);
  if constexpr (kBytes<Product>)
    // A row's halves lie in the rows of twice its number: never before it.
    for (int r = 0; r < rows.before + rows.count; ++r)
      for (int at = begin * 16; at < end * 16; at += 16) {
        const auto half = [&](int row) { return reinterpret_cast<const int32_t*>(first[row] + at); };
        store(first[r] + at, Product::value(half(2 * r), half(2 * r + 1), q[r - rows.before]));
      }
}

// Values of up to 64 dimensions, and the lines in which a tile's last positions are followed by zeros.
template <class Product, int Count>
class ValueColumns {
 public:
  using Cell = typename Product::Cell;

  ValueColumns(const ValueTile<Product>& v, int d) : v_(v), lines_(v.cells + size_t(d / 16) * kLine<Product>) {}

  // Sums of all rows, 16 dimensions after the other.
  void add(const UnitFactors<Product>& weights, BegunRun& next, float (*sums)[256]) {
    zero_sums<Count>();
    int s = v_.begin;
    for (; s + kTileLines <= v_.end; s += kTileLines) add_step(weights, s, lines_ + size_t(s) * v_.stride, v_.stride, next);
    if (s < v_.end || v_.rest) {
      copy_last(s);
      finish_stores();
      add_step(weights, s, last_, Count * kLine<Product>, next);
    }
    store_sums<Count>(sums[0], 256, 64);
  }

 private:
  const ValueTile<Product>& v_;
  const Cell* lines_;
  alignas(64) Cell last_[kTileLines * Count * kLine<Product>];

  void add_step(const UnitFactors<Product>& weights, int s, const Cell* lines, size_t apart, BegunRun& next) {
    _tile_loadd(4, weights.at(s * Product::kStep), weights.apart);
    add_columns(lines, apart * sizeof(Cell), next);
  }
  template <int I = 0>
  static void add_columns(const Cell* lines, size_t apart, BegunRun& next) {
    add_tile<Product, I, false>(lines + I * kLine<Product>, apart);
    next.some(kBegunByValues);
    if constexpr (I + 1 < Count) add_columns<I + 1>(lines, apart, next);
  }
  void copy_last(int s) {
    __builtin_memset(last_, 0, sizeof last_);
    Cell* to = last_;
    for (; s < v_.end; ++s, to += Count * kLine<Product>)
      __builtin_memcpy(to, lines_ + size_t(s) * v_.stride, Count * 64);
    for (int i = 0; v_.rest && i < Count; ++i)
      store_part(to + i * kLine<Product>, Product::first_of(lines_ + size_t(s) * v_.stride + i * kLine<Product>, v_.rest));
  }
  static void store_part(Cell* to, const V16u& line) { _mm512_storeu_si512(to, line.v); }
  static void store_part(Cell* to, const __m512i& line) { _mm512_storeu_si512(to, line); }
};

template <class Product, int Count>
inline void value_columns(const ValueTile<Product>& v, int d, const typename Product::Row* weights, const Sums* sums,
                          const StepRows& rows, BegunRun& next) {
  alignas(64) float all[4][256];
  ValueColumns<Product, Count>(v, d).add(UnitFactors<Product>(weights, rows), next, all);
  for (int r = 0; r < rows.count; ++r)
    for (int i = 0; i < Count; ++i) {
      const float* sum = all[i] + (rows.before + r) * kUnitRows<Product> * 16;
      float* out = sums[r].out + d + i * 16;
      const V16f before = mul(load(out), set1(sums[r].factor));
      if constexpr (kBytes<Product>) {
        const int32_t* halves = reinterpret_cast<const int32_t*>(sum);
        store(out, add(before, Product::value(halves, halves + 16, weights[r])));
      } else {
        store(out, add(before, load(sum)));
      }
    }
}

template <class Product, int Count = 4>
inline void value_step(const ValueTile<Product>& v, int d, const typename Product::Row* weights, const Sums* sums,
                       const StepRows& rows, BegunRun& next) {
  for (; d + Count * 16 <= v.padded_dim; d += Count * 16) value_columns<Product, Count>(v, d, weights, sums, rows, next);
  if constexpr (Count > 1) value_step<Product, Count / 2>(v, d, weights, sums, rows, next);
}

template <Tiled Product>
inline void value_tile(const ValueTile<Product>& v, const typename Product::Row* weights, const Sums* sums, const StepRows& rows,
                       NextRun<Product>& next) {
  finish_stores();
  value_step(v, 0, weights, sums, rows, next);
}

}  // namespace
}  // namespace trilemma
