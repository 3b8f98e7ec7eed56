#include "reference.h"

#include <algorithm>
#include <cmath>

namespace trilemma::reference {

double Grid::minimum(int row, int col) const {
  if (minima.empty()) return 0;
  const double of_group = double(minima[std::size_t(row * groups() + (group ? col / group : 0))]);
  return sub_group ? of_group * sub_minima[std::size_t(row * sub_groups() + col / sub_group)] : of_group;
}

double Grid::value(int row, int col) const {
  const std::size_t g = std::size_t(row) * std::size_t(groups()) + std::size_t(group ? col / group : 0);
  double scaled = double(codes[std::size_t(row) * std::size_t(cols) + std::size_t(col)]) * double(scales[g]);
  if (sub_group) scaled *= sub_scales[std::size_t(row * sub_groups() + col / sub_group)];
  return scaled + minimum(row, col);
}

std::uint16_t to_half(float exact) {
  if (exact == 0) return 0;
  int exponent;
  const float fraction = std::frexp(std::fabs(exact), &exponent);  // in [0.5, 1)
  const int mantissa = int(fraction * 2048) - 1024;
  return std::uint16_t((exact < 0 ? 0x8000 : 0) | ((exponent + 14) << 10) | mantissa);
}

Panels pack(const Grid& grid) {
  const int panels = (grid.rows + 15) / 16, blocks = (grid.cols + 31) / 32;
  const unsigned offset = grid.bits < 8 && grid.minima.empty() ? 1u << (grid.bits - 1) : 0;
  Panels out;
  const auto code = [&](int row, int col) -> unsigned {
    const bool inside = row < grid.rows && col < grid.cols;
    return unsigned(inside ? grid.codes[std::size_t(row) * std::size_t(grid.cols) + std::size_t(col)] : 0) + offset;
  };
  // One line: 16 rows, four bytes each.
  const auto line = [&](int panel, const auto& byte) {
    for (int r = 0; r < 16; ++r)
      for (int j = 0; j < 4; ++j) out.codes.push_back(std::uint8_t(byte(panel * 16 + r, j)));
  };
  for (int p = 0; p < panels; ++p)
    for (int k = 0; k < blocks * 32; k += 32) {
      for (int i = 0; i < 32 && grid.bits == 8; i += 4) line(p, [&](int row, int j) { return code(row, k + i + j); });
      if (grid.bits == 8) continue;
      for (int i = 0; i < 32; i += 8)
        line(p, [&](int row, int j) { return (code(row, k + i + j) & 15) | (code(row, k + i + 4 + j) & 15) << 4; });
      const int more = grid.bits - 4, columns = more ? 32 / more : 32;  // columns that a line of further bits covers
      for (int i = 0; i < 32 && more; i += columns)
        line(p, [&](int row, int j) {
          unsigned byte = 0;
          for (int c = 0; c < columns; c += 4) byte |= (code(row, k + i + c + j) >> 4) << (c / 4 * more);
          return byte;
        });
    }
  const auto spread = [&](int count, const auto& put) {
    for (int p = 0; p < panels; ++p)
      for (int g = 0; g < count; ++g)
        for (int r = 0; r < 16; ++r) put(p * 16 + r < grid.rows, std::size_t((p * 16 + r) * count + g));
  };
  spread(grid.groups(), [&](bool inside, std::size_t at) {
    out.scales.push_back(inside ? to_half(grid.scales[at]) : 0);
    if (!grid.minima.empty()) out.minima.push_back(inside ? to_half(grid.minima[at]) : 0);
  });
  spread(grid.sub_groups(), [&](bool inside, std::size_t at) {
    out.sub_scales.push_back(std::int8_t(inside ? grid.sub_scales[at] : 0));
    if (!grid.minima.empty()) out.sub_minima.push_back(std::int8_t(inside ? grid.sub_minima[at] : 0));
  });
  return out;
}

PackedView Panels::view(const Grid& grid) const {
  const int blocks = (grid.cols + 31) / 32;
  return {codes.data(), scales.data(), minima.empty() ? nullptr : minima.data(), grid.rows,
          grid.cols,    blocks,        grid.group ? grid.group / 32 : blocks,    grid.groups(),
          grid.bits,    grid.sub_group, sub_scales.data(),                       sub_minima.data()};
}

Sum product(const Grid& grid, int row, const std::vector<double>& x) {
  Sum sum{0, 0};
  for (int k = 0; k < grid.cols; ++k) {
    const double term = grid.value(row, k) * x[std::size_t(k)];
    sum.value += term;
    sum.size += std::fabs(term);
  }
  // With minima the kernel sums codes and minima apart, which may cancel.
  for (int k = 0; k < grid.cols; ++k) sum.size += 2 * std::fabs(grid.minimum(row, k) * x[std::size_t(k)]);
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

Attended attention(const std::vector<double>& q, const std::vector<std::vector<double>>& k,
                   const std::vector<std::vector<double>>& v) {
  std::vector<double> weights;
  for (const auto& key : k) {
    double s = 0;
    for (std::size_t d = 0; d < q.size(); ++d) s += q[d] * key[d];
    weights.push_back(s);
  }
  const double peak = *std::max_element(weights.begin(), weights.end());
  double total = 0;
  for (double& w : weights) total += w = std::exp(w - peak);
  Attended out{std::vector<double>(q.size(), 0.0), std::vector<double>(q.size(), 0.0), 1 / total};
  for (std::size_t d = 0; d < q.size(); ++d) {
    for (std::size_t p = 0; p < k.size(); ++p) out.value[d] += weights[p] / total * v[p][d];
    double squares = 0;
    for (std::size_t p = 0; p < k.size(); ++p) {
      const double term = weights[p] / total * (v[p][d] - out.value[d]);
      squares += term * term;
    }
    out.spread[d] = std::sqrt(squares);
  }
  return out;
}

}  // namespace trilemma::reference
