// The online softmax, in powers of two: queries are multiplied with log2(e) before they are rounded.
#pragma once

#include "attention_products.h"
#include "hadamard.h"

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

// Scales of a tile's keys and values, of 128 positions each: f32, or with minima two bf16.
struct TileScales {
  const float *k, *v;
};

template <class Product>
inline V16f scales_at(const float* p) {
  if constexpr (Product::kOffset)
    return low_bf16(load_line(reinterpret_cast<const uint8_t*>(p)));
  else
    return load(p);
}
inline V16f minima_at(const float* p) { return high_bf16(load_line(reinterpret_cast<const uint8_t*>(p))); }

// Rows of one step that share the positions [begin, end) of a tile, whole steps of them; `weights` and `sums` are what
// comes out.
template <class Cache>
struct Softmax {
  using Values = typename Cache::Values;
  using Weights = Layout<Values>;

  float (*scores)[kTile];
  const Reach* reach;
  int count, begin, end;
  TileScales scale;
  const typename Cache::Keys::Row* queries;
  RowState* rows;
  typename Values::Row* weights;
  Sums* sums;
  NextRun<Values>& next;
  alignas(64) float before[16] = {}, now[16] = {};

  // One row after another in each loop, so that none waits for its own largest score.
  void run() {
    for (int r = 0; r < count; ++r) find_peak(r);
    alignas(64) float factor[16];
    store(factor, exp2_negative<6>(sub(load(before), load(now))));
    for (int r = 0; r < count; ++r) {
      float total = 0.0f, offset = 0.0f;
      if (now[r] == -__builtin_inff()) {  // every score is -inf or NaN: the row ends as 0/0 = NaN if this goes on
        factor[r] = 1.0f;
        Weights::clear(weights[r].factors, begin, end);
        typename Values::Row none = {};
        none.factors = weights[r].factors;
        weights[r] = none;
      } else {
        Weights::clear(weights[r].factors, begin, reach[r].first() * 16);
        Weights::clear(weights[r].factors, reach[r].last() * 16, end);
        if constexpr (Cache::kInteger)
          total = weigh_scaled(r, offset);
        else
          total = weigh(r);
      }
      rows[r].maximum = now[r];
      rows[r].total = rows[r].total * factor[r] + total;
      sums[r] = {rows[r].out, factor[r], offset};
    }
  }

 private:
  typename Values::Factor* at(int r, int v) { return Weights::at(weights[r].factors, v * 16); }

  void find_peak(int r) {
    const float low = -__builtin_inff();
    V16f peak = set1(low);
    for (int v = reach[r].first(); v < reach[r].last(); ++v) {
      next.some(1);
      V16f x = load(scores[r] + v * 16);
      if constexpr (Cache::Keys::kOffset)
        x = fma(x, scales_at<Values>(scale.k + v * 16), mul(set1(queries[r].sum), minima_at(scale.k + v * 16)));
      else if constexpr (Cache::kInteger)
        x = mul(x, scales_at<Values>(scale.k + v * 16));
      x = reach[r].keep(x, v, low);
      store(scores[r] + v * 16, x);
      peak = max(peak, x);
    }
    const float largest = reduce_max(peak);
    before[r] = rows[r].maximum;
    now[r] = before[r] > largest ? before[r] : largest;
  }

  V16f power(int r, int v) const {
    return exp2_negative<Cache::kDegree>(sub(load(scores[r] + v * 16), set1(now[r])));
  }

  // Weights of one row, rounded; returns their sum.
  float weigh(int r) {
    V16f sum = zero();
    const int last = reach[r].last();
    int v = reach[r].first();
    for (; v + 2 <= last; v += 2) sum = round_two<Values>(sum, power(r, v), power(r, v + 1), at(r, v));
    if (v < last) sum = add(sum, Values::round(power(r, v), at(r, v)));
    return reduce_add(sum);
  }

  // The same in integers: weights times the values' scales, and the sum of those times the minima.
  float weigh_scaled(int r, float& offset) {
    V16f sum = zero(), offsets = zero();
    V16u peak = abs_bits(zero());
    for (int v = reach[r].first(); v < reach[r].last(); ++v) {
      const V16f weight = power(r, v);
      sum = add(sum, weight);
      // Stale scales behind the end must not turn a weight of zero into NaN.
      const V16f scaled = reach[r].keep(mul(weight, scales_at<Values>(scale.v + v * 16)), v, 0.0f);
      if constexpr (Values::kOffset)
        offsets = add(offsets, reach[r].keep(mul(weight, minima_at(scale.v + v * 16)), v, 0.0f));
      store(scores[r] + v * 16, scaled);
      peak = max_u(peak, abs_bits(scaled));
    }
    if constexpr (Values::kOffset) offset = reduce_add(offsets);
    weights[r].scale = code_scale(peak);
    const V16f inverse = set1(code_inverse(weights[r].scale));
    for (int v = reach[r].first(); v < reach[r].last(); ++v)
      Values::store_codes(mul(load(scores[r] + v * 16), inverse), at(r, v));
    return reduce_add(sum);
  }
};

// A row's query times log2(e), rounded to its factors.
template <class Cache>
inline void round_query(const float* q, int head_dim, typename Cache::Keys::Row& row) {
  using Keys = typename Cache::Keys;
  const auto at = [&](int d) { return Layout<Keys>::at(row.factors, d); };
  const V16f log2e = set1(1.44269504088896341f);
  const auto scaled = [&](int d) { return mul(load_n(q + d, head_dim - d < 16 ? head_dim - d : 16), log2e); };
  if constexpr (Cache::kInteger) {
    alignas(64) float query[kMaxHeadDim];
    for (int d = 0; d < head_dim; d += 16) store(query + d, scaled(d));
    if constexpr (Keys::kOffset) mix_back(query, head_dim);
    V16u peak = abs_bits(zero());
    for (int d = 0; d < head_dim; d += 16) peak = max_u(peak, abs_bits(load(query + d)));
    row.scale = code_scale(peak);
    const V16f inverse = set1(code_inverse(row.scale));
    V16f sum = zero();  // exact: below 2^24
    for (int d = 0; d < head_dim; d += 16) {
      const V16f codes = mul(load(query + d), inverse);
      Keys::store_codes(codes, at(d));
      if constexpr (Keys::kOffset) sum = add(sum, round_even(codes));
    }
    if constexpr (Keys::kOffset) row.sum = reduce_add(sum) * row.scale;
    Keys::set_start(row, head_dim);
  } else {
    for (int d = 0; d < head_dim; d += 16) Keys::round(scaled(d), at(d));
  }
}

}  // namespace
}  // namespace trilemma
