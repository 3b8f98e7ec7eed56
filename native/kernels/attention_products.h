// The two products of attention over one tile of positions: scores = q . k, and out = out * factor + weights . v.
//
// Every sum in f32 is one chain in ascending order, whatever rows and vectors share a register tile, so that a row's bits
// do not depend on its company.
#pragma once

#include "attention_cache.h"

namespace trilemma {
namespace {

// Sums that a register tile may hold, and rows of it at most; with few rows more vectors keep the units busy.
#if defined(TRILEMMA_SIMD_AVX512)
constexpr int kTileRows = 8, kTileSums = 16, kTileVectors = 8;
#elif defined(TRILEMMA_SIMD_AVX2)
constexpr int kTileRows = 2, kTileSums = 4, kTileVectors = 4;
#elif defined(TRILEMMA_SIMD_NEON)
constexpr int kTileRows = 2, kTileSums = 4, kTileVectors = 2;
#else
constexpr int kTileRows = 1, kTileSums = 1, kTileVectors = 1;
#endif

constexpr int kTile = kKvPage;

constexpr int kRows = kAttentionRows, kRowCells = kAttentionCells;  // of a block

// How many rows and positions are multiplied at once, and how the factors of a block's rows lie in memory.
template <class Product>
struct Layout {
  using Factor = typename Product::Factor;
  static constexpr int kStepRows = 8, kPositions = 16;
  static constexpr size_t kRoom = size_t(kRowCells) * Product::kFactors / Product::kStep;  // of queries

  static Factor* row(Factor* all, int r, int width) { return at(all, r * width); }
  // From a row's i-th value on.
  static Factor* at(Factor* row, int i) { return row + i * Product::kFactors / Product::kStep; }
  static void clear(Factor* row, int from, int to) {
    __builtin_memset(at(row, from), 0, size_t(at(row, to) - at(row, from)) * sizeof(Factor));
  }
};

// `count` rows; a matrix unit multiplies `all`, the first of which lies `before` rows earlier.
struct StepRows {
  int count, before, all;
};

template <class Product, int R>
constexpr int vectors_for() {
  int vectors = 1;
  while (vectors * 2 <= kTileVectors && vectors * 2 * R * Product::kSums <= kTileSums) vectors *= 2;
  return vectors;
}

// What a matrix unit is told before it multiplies; vectors need nothing.
template <class Product>
struct Shapes {
  Shapes(int, int) {}
};

// Brings the run of `bytes` nearer that is read next, a few lines at a time; vectors do so line by line (fetch).
template <class Product>
struct NextRun {
  NextRun(const void*, size_t) {}
  void some(int) {}
};

// Cells of one line.
template <class Product>
constexpr size_t kLine = 64 / sizeof(typename Product::Cell);

// Where what lies at `cells` lies in what the next product over the cache will read, `ahead` bytes behind.
inline const void* behind(const void* cells, ptrdiff_t ahead) {
  return reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(cells) + uintptr_t(ahead));
}
// Brings line `i` from there nearer. Keys and values of a head are cut into runs of a few kB, too short for the processor to
// see where they go on; it sees it best where their lines are asked for one after the other.
inline void fetch(const void* next, int i) { __builtin_prefetch(static_cast<const uint8_t*>(next) + i * 64, 0, 2); }

// Adds step `s` of `R` rows and `V` lines that lie `apart` cells apart. Where the two halves of a line are lines, they
// count from the half `first` on.
template <class Product, int Part, int R, int V>
inline void add_lines(const typename Product::Cell* lines, size_t apart, int first, const void* next,
                      const typename Product::Row* rows, int s, typename Product::Sum (*sum)[V]) {
  typename Product::Line line[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    if constexpr (Product::kHalves) {
      const bool high = (first + v) & 1;
      if (!high) fetch(next, v / 2);
      line[v] = half_line(lines + size_t(v / 2) * apart, high);
    } else {
      if constexpr (Part == 0) fetch(next, v);
      line[v] = Product::template line<Part>(lines + size_t(v) * apart);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      Product::template add<Part>(sum[r][v], line[v], rows[r].factors + size_t(s) * Product::kFactors);
  if constexpr (Part + 1 < Product::kParts) add_lines<Product, Part + 1, R, V>(lines, apart, first, next, rows, s, sum);
}

// Keys of one tile and head: `steps` lines for every 16 positions; what is read next lies `ahead` bytes behind.
template <class Product>
struct KeyTile {
  const typename Product::Cell* cells;
  ptrdiff_t ahead;
  int steps;
};

// scores[row][position] for `R` rows and `V` vectors of positions from vector `v` on.
template <class Product, int R, int V>
inline void score_block(const KeyTile<Product>& k, int v, const typename Product::Row* q, float (*scores)[kTile]) {
  const size_t apart = size_t(k.steps) * kLine<Product>;
  const typename Product::Cell* lines = k.cells + size_t(v) * apart;
  typename Product::Sum sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) sum[r][i] = Product::start(q[r]);
  for (int s = 0; s < k.steps; ++s)
    add_lines<Product, 0, R, V>(lines + size_t(s) * kLine<Product>, apart, 0,
                                behind(lines + size_t(s * V) * kLine<Product>, k.ahead), q, s, sum);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) store(scores[r] + (v + i) * 16, Product::value(sum[r][i], q[r]));
}

template <class Product, int R, int V = vectors_for<Product, R>()>
inline void score_rows(const KeyTile<Product>& k, int v, int end, const typename Product::Row* q,
                       float (*scores)[kTile]) {
  for (; v + V <= end; v += V) score_block<Product, R, V>(k, v, q, scores);
  if constexpr (V > 1) score_rows<Product, R, V / 2>(k, v, end, q, scores);
}

// Vectors [begin, end) of some rows.
template <class Product, class Next, int R = kTileRows>
inline void score_tile(const KeyTile<Product>& k, int begin, int end, const typename Product::Row* q,
                       float (*scores)[kTile], const StepRows& rows, Next& next) {
  int r = 0;
  for (; r + R <= rows.count; r += R) score_rows<Product, R>(k, begin, end, q + r, scores + r);
  if constexpr (R > 1)
    if (r < rows.count) score_tile<Product, Next, R - 1>(k, begin, end, q + r, scores + r, {rows.count - r, 0, 0}, next);
}

// Values of one tile and head: for every kStep positions `stride` cells. Steps [begin, end) are whole; of step `end`
// there are `rest` positions.
template <class Product>
struct ValueTile {
  const typename Product::Cell* cells;
  ptrdiff_t ahead;
  size_t stride;
  int padded_dim, begin, end, rest;
};

// Where rows of values are summed to, what their earlier sums are multiplied with, and what every dimension gets beside
// the product (kOffset).
struct Sums {
  float* out;
  float factor, offset;
};

// The product alone where it is in integers; f32 products go on from the earlier sums.
template <class Product>
inline typename Product::Sum start_values(V16f before, const typename Product::Row& weights) {
  if constexpr (__is_same(typename Product::Sum, V16f)) return before;
  return Product::start(weights);
}
template <class Product>
inline V16f end_values(V16f before, const typename Product::Sum& sum, const typename Product::Row& weights) {
  if constexpr (__is_same(typename Product::Sum, V16f)) return sum;
  return add(before, Product::value(sum, weights));
}

// Line number `i` with only its first positions.
template <class Product>
inline typename Product::Line first_positions(const typename Product::Cell* lines, int i, int count) {
  if constexpr (Product::kHalves)
    return half_line_of(lines + size_t(i / 2) * kLine<Product>, i & 1, count);
  else
    return Product::first_of(lines + size_t(i) * kLine<Product>, count);
}

template <class Product, int R, int D>
inline void value_block(const ValueTile<Product>& v, int d, const typename Product::Row* weights, const Sums* sums) {
  const size_t apart = v.stride;
  const int first = Product::kHalves && D == 1 ? d / 16 % 2 : 0;  // several begin with a whole line
  const typename Product::Cell* lines = v.cells + size_t(d / 16 / Product::kPacked) * kLine<Product>;
  const auto before = [&](int r, int i) {
    const V16f earlier = load(sums[r].out + d + i * 16), factor = set1(sums[r].factor);
    if constexpr (Product::kOffset) return fma(earlier, factor, set1(sums[r].offset));
    return mul(earlier, factor);
  };
  typename Product::Sum sum[R][D];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < D; ++i) sum[r][i] = start_values<Product>(before(r, i), weights[r]);
  for (int s = v.begin; s < v.end; ++s)
    add_lines<Product, 0, R, D>(lines + size_t(s) * apart, kLine<Product>, first,
                                behind(lines + size_t(s) * apart, v.ahead), weights, s, sum);
  if constexpr (Product::kStep > 1)
    if (v.rest)
#pragma GCC unroll 8
      for (int i = 0; i < D; ++i) {
        const auto last = first_positions<Product>(lines + size_t(v.end) * apart, first + i, v.rest);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
          Product::template add<0>(sum[r][i], last, weights[r].factors + size_t(v.end) * Product::kFactors);
      }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < D; ++i)
      store(sums[r].out + d + i * 16, end_values<Product>(before(r, i), sum[r][i], weights[r]));
}

template <class Product, int R, int D = vectors_for<Product, R>()>
inline void value_rows(const ValueTile<Product>& v, int d, const typename Product::Row* weights, const Sums* sums) {
  for (; d + D * 16 <= v.padded_dim; d += D * 16) value_block<Product, R, D>(v, d, weights, sums);
  if constexpr (D > 1) value_rows<Product, R, D / 2>(v, d, weights, sums);
}

template <class Product, class Next, int R = kTileRows>
inline void value_tile(const ValueTile<Product>& v, const typename Product::Row* weights, const Sums* sums,
                       const StepRows& rows, Next& next) {
  int r = 0;
  for (; r + R <= rows.count; r += R) value_rows<Product, R>(v, 0, weights + r, sums + r);
  if constexpr (R > 1)
    if (r < rows.count) value_tile<Product, Next, R - 1>(v, weights + r, sums + r, {rows.count - r, 0, 0}, next);
}

}  // namespace
}  // namespace trilemma
