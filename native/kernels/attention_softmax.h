// The online softmax, in powers of two: queries are multiplied with log2(e) before they are rounded.
#pragma once

#include "attention_products.h"

namespace trilemma {
namespace {

// What is known of a row so far: sums of values weighted by 2^(score - maximum), and the weights' own sum.
struct RowState {
  float* out;  // padded_dim
  float maximum, total;
};

inline void clear(RowState& row, int padded_dim) {
  row.maximum = -__builtin_inff();
  row.total = 0.0f;
  for (int d = 0; d < padded_dim; d += 16) store(row.out + d, zero());
}

inline float power_of_two(float x) {
  alignas(64) float power[16];
  store(power, exp2_negative<6>(set1(x)));
  return power[0];
}

// Adds a later chunk's sums to those of a row.
inline void merge(RowState& row, const RowState& later, int padded_dim) {
  const float now = row.maximum > later.maximum ? row.maximum : later.maximum;
  if (now == -__builtin_inff()) return;  // nothing on either side, or NaN: `total` stays 0 and the row ends as NaN
  const float factor = power_of_two(row.maximum - now), other = power_of_two(later.maximum - now);
  for (int d = 0; d < padded_dim; d += 16)
    store(row.out + d, fma(load(later.out + d), set1(other), mul(load(row.out + d), set1(factor))));
  row.maximum = now;
  row.total = row.total * factor + later.total * other;
}

// Positions [begin, end) of a tile that a row attends to, and the vectors that hold them.
struct Reach {
  int begin, end;

  int first() const { return begin / 16; }
  int last() const { return (end + 15) / 16; }
  V16f keep(V16f x, int v, float fill) const {
    return v == first() || v + 1 == last() ? keep_range(x, begin - v * 16, end - v * 16, fill) : x;
  }
};

// Scales of a tile's keys and values, f32 of 128 positions, int8 only.
struct TileScales {
  const float *k, *v;
};

// Turns one row's scores into weights, zero in those of vectors [begin, end) that it does not reach; returns the factor
// for what was summed before.
template <class Cache>
inline float weigh(float* scores, const Reach& reach, int begin, int end, const TileScales& scale, RowState& row,
                   typename Cache::Factor* weights) {
  const int first = reach.first(), last = reach.last();
  for (int v = begin; v < first; ++v) Cache::round(zero(), weights + v * 16);
  for (int v = last; v < end; ++v) Cache::round(zero(), weights + v * 16);
  const float low = -__builtin_inff();
  V16f peak = set1(low);
  for (int v = first; v < last; ++v) {
    V16f x = load(scores + v * 16);
    if constexpr (Cache::kScaled) x = mul(x, load(scale.k + v * 16));
    x = reach.keep(x, v, low);
    store(scores + v * 16, x);
    peak = max(peak, x);
  }
  const float before = row.maximum, tile_peak = reduce_max(peak);
  const float now = before > tile_peak ? before : tile_peak;
  if (now == low) {  // every score is -inf or NaN: nothing to add; the row ends as 0/0 = NaN if this goes on
    for (int v = first; v < last; ++v) Cache::round(zero(), weights + v * 16);
    return 1.0f;
  }
  V16f sum = zero();
  for (int v = first; v < last; ++v) {
    const V16f weight = exp2_negative<Cache::kDegree>(sub(load(scores + v * 16), set1(now)));
    if constexpr (Cache::kScaled) {
      sum = add(sum, weight);
      // Stale scales behind the end must not turn a weight of zero into NaN.
      Cache::round(reach.keep(mul(weight, load(scale.v + v * 16)), v, 0.0f), weights + v * 16);
    } else {
      sum = add(sum, Cache::round(weight, weights + v * 16));
    }
  }
  const float factor = before == now ? 1.0f : power_of_two(before - now);
  row.maximum = now;
  row.total = row.total * factor + reduce_add(sum);
  return factor;
}

}  // namespace
}  // namespace trilemma
