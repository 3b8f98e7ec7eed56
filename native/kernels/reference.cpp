#include "reference.h"

#include <algorithm>
#include <cmath>

namespace trilemma::reference {

double Grid::value(int row, int col) const {
  const std::size_t g = std::size_t(row) * std::size_t(groups()) + std::size_t(group ? col / group : 0);
  const double scaled = double(codes[std::size_t(row) * std::size_t(cols) + std::size_t(col)]) * double(scales[g]);
  return minima.empty() ? scaled : scaled + double(minima[g]);
}

std::uint16_t to_half(float exact) {
  if (exact == 0) return 0;
  int exponent;
  const float fraction = std::frexp(std::fabs(exact), &exponent);  // in [0.5, 1)
  const int mantissa = int(fraction * 2048) - 1024;
  return std::uint16_t((exact < 0 ? 0x8000 : 0) | ((exponent + 14) << 10) | mantissa);
}

Panels pack(const Grid& grid) {
  const int panels = (grid.rows + 15) / 16, blocks = (grid.cols + 31) / 32, groups = grid.groups();
  const bool biased = grid.bits == 4 && grid.minima.empty();
  Panels out;
  const auto code = [&](int row, int col) -> unsigned {
    const bool inside = row < grid.rows && col < grid.cols;
    return unsigned((inside ? grid.codes[std::size_t(row) * std::size_t(grid.cols) + std::size_t(col)] : 0) +
                    (biased ? 8 : 0));
  };
  for (int p = 0; p < panels; ++p)
    for (int k = 0; k < blocks * 32; k += grid.bits == 4 ? 8 : 4)
      for (int r = 0; r < 16; ++r)
        for (int j = 0; j < 4; ++j) {
          const unsigned low = code(p * 16 + r, k + j), high = grid.bits == 4 ? code(p * 16 + r, k + 4 + j) : 0;
          out.codes.push_back(std::uint8_t(grid.bits == 4 ? low | (high << 4) : low));
        }
  for (int p = 0; p < panels; ++p)
    for (int g = 0; g < groups; ++g)
      for (int r = 0; r < 16; ++r) {
        const int row = p * 16 + r;
        const std::size_t at = std::size_t(row) * std::size_t(groups) + std::size_t(g);
        out.scales.push_back(row < grid.rows ? to_half(grid.scales[at]) : 0);
        if (!grid.minima.empty()) out.minima.push_back(row < grid.rows ? to_half(grid.minima[at]) : 0);
      }
  return out;
}

PackedView Panels::view(const Grid& grid) const {
  const int blocks = (grid.cols + 31) / 32;
  return {codes.data(), scales.data(), minima.empty() ? nullptr : minima.data(), grid.rows,
          grid.cols,    blocks,        grid.group ? grid.group / 32 : blocks,    grid.groups(),
          grid.bits};
}

Sum product(const Grid& grid, int row, const std::vector<double>& x) {
  Sum sum{0, 0};
  for (int k = 0; k < grid.cols; ++k) {
    const double term = grid.value(row, k) * x[std::size_t(k)];
    sum.value += term;
    sum.size += std::fabs(term);
  }
  // With minima the kernel sums codes and minima apart, which may cancel.
  for (int k = 0; k < grid.cols && !grid.minima.empty(); ++k)
    sum.size += 2 * std::fabs(double(grid.minima[std::size_t(row) * std::size_t(grid.groups()) +
                                                 std::size_t(grid.group ? k / grid.group : 0)]) *
                              x[std::size_t(k)]);
  return sum;
}

double nonlinear(double x, Nonlinearity kind) {
  switch (kind) {
    case kSilu:
      return x / (1 + std::exp(-x));
    case kGelu:
      return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case kGeluTanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case kRelu:
      break;
  }
  return std::max(x, 0.0);
}

std::vector<double> norm(const std::vector<float>& x, const std::vector<float>& weight, const std::vector<float>& bias,
                         double eps, bool centred) {
  const double n = double(x.size());
  double mean = 0, squares = 0;
  for (const float v : x) mean += centred ? double(v) / n : 0;
  for (const float v : x) squares += (double(v) - mean) * (double(v) - mean);
  std::vector<double> out;
  for (std::size_t i = 0; i < x.size(); ++i)
    out.push_back((double(x[i]) - mean) / std::sqrt(squares / n + eps) * double(weight[i]) +
                  (bias.empty() ? 0 : double(bias[i])));
  return out;
}

std::vector<double> attention(const std::vector<double>& q, const std::vector<std::vector<double>>& k,
                              const std::vector<std::vector<double>>& v) {
  std::vector<double> scores;
  for (const auto& key : k) {
    double s = 0;
    for (std::size_t d = 0; d < q.size(); ++d) s += q[d] * key[d];
    scores.push_back(s);
  }
  const double peak = *std::max_element(scores.begin(), scores.end());
  double total = 0;
  std::vector<double> out(q.size(), 0.0);
  for (std::size_t p = 0; p < k.size(); ++p) {
    const double weight = std::exp(scores[p] - peak);
    total += weight;
    for (std::size_t d = 0; d < q.size(); ++d) out[d] += weight * v[p][d];
  }
  for (double& value : out) value /= total;
  return out;
}

}  // namespace trilemma::reference
