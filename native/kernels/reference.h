// What every kernel is tested against: plain loops in double precision, over unpacked weights.
// Not part of the engine.
#pragma once

#include <cstdint>
#include <vector>

#include "table.h"

namespace trilemma::reference {

// A quantized matrix, unpacked: w = code * scale[group] (+ minimum[group]); with a sub-group, scale and minimum of a group
// are multiplied with those of the sub-group. With a codebook, w = kCodebook[code] * scale[group].
struct Grid {
  int rows, cols, bits, group;  // group 0: the whole row
  std::vector<int> codes;       // (rows, cols)
  std::vector<float> scales;    // (rows, groups), exact in f16
  std::vector<float> minima;    // the same, or empty
  int sub_group = 0;            // 32, 16, or 0: one level
  std::vector<int> sub_scales;  // (rows, padded columns / sub_group)
  std::vector<int> sub_minima;
  bool codebook = false;

  int groups() const { return group ? (cols + group - 1) / group : 1; }
  int sub_groups() const { return sub_group ? (cols + 31) / 32 * 32 / sub_group : 0; }
  double minimum(int row, int col) const;
  double value(int row, int col) const;
};

// panel16 of a grid.
struct Panels {
  std::vector<std::uint8_t> codes;
  std::vector<std::uint16_t> scales, minima;
  std::vector<std::int8_t> sub_scales, sub_minima;
  PackedView view(const Grid& grid) const;
};
Panels pack(const Grid& grid);

std::uint16_t to_half(float exact);  // of a value that a half holds exactly

// y = W x and, for tolerances, |W| |x|.
struct Sum {
  double value, size;
};
// With `rounded`, of that instead of each weight.
Sum product(const Grid& grid, int row, const std::vector<double>& x, double (*rounded)(double) = nullptr);

double nonlinear(double x, Nonlinearity kind);

// (x - mean) / rms * weight + bias; without `centred` the mean is not taken off. An empty bias is none.
std::vector<double> norm(const std::vector<float>& x, const std::vector<float>& weight, const std::vector<float>& bias,
                         double eps, bool centred);

// Attention of one query over keys and values (positions, dim), all of them visible; and of each output the root of the
// sum of (weight * (value - output))^2: independent relative errors e of the weights move the output by about e times that.
struct Attended {
  std::vector<double> value, spread;
  double largest = 0;  // weight
};
Attended attention(const std::vector<double>& q, const std::vector<std::vector<double>>& k,
                   const std::vector<std::vector<double>>& v);

}  // namespace trilemma::reference
