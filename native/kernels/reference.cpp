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
  const int code = codes[std::size_t(row) * std::size_t(cols) + std::size_t(col)];
  double scaled = double(codebook ? kCodebook[code] : code) * double(scales[g]);
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
  const unsigned offset = grid.bits < 8 && grid.minima.empty() && !grid.codebook ? 1u << (grid.bits - 1) : 0;
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
      for (int i = 0; i < 32 && grid.bits == 2; i += 16)
        line(p, [&](int row, int j) {
          unsigned byte = 0;
          for (int c = 0; c < 4; ++c) byte |= code(row, k + i + 4 * c + j) << 2 * c;
          return byte;
        });
      for (int i = 0; i < 3 && grid.bits == 3; ++i)
        line(p, [&](int row, int j) {
          const unsigned sixth = code(row, k + 24 + j), last = code(row, k + 28 + j);
          const unsigned rest = i == 0 ? sixth & 3 : i == 1 ? last & 3 : sixth >> 2 | last >> 2 << 1;
          return code(row, k + 8 * i + j) | code(row, k + 8 * i + 4 + j) << 3 | rest << 6;
        });
      if (grid.bits < 4) continue;
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
  // Groups of 16 are as many as padded columns have.
  const int groups = grid.group == 16 ? blocks * 2 : grid.groups();
  for (int p = 0; p < panels; ++p)
    for (int g = 0; g < groups; ++g)
      for (int r = 0; r < 16; ++r) {
        const bool inside = p * 16 + r < grid.rows && g < grid.groups();
        const std::size_t at = std::size_t((p * 16 + r) * grid.groups() + g);
        out.scales.push_back(inside ? to_half(grid.scales[at]) : 0);
        if (!grid.minima.empty()) out.minima.push_back(inside ? to_half(grid.minima[at]) : 0);
      }
  spread(grid.sub_groups(), [&](bool inside, std::size_t at) {
    const bool both = grid.bits == 2;  // in one byte
    const int minimum = inside && both ? grid.sub_minima[at] : 0;
    out.sub_scales.push_back(std::int8_t(inside ? grid.sub_scales[at] | minimum << 4 : 0));
    if (!grid.minima.empty() && !both) out.sub_minima.push_back(std::int8_t(inside ? grid.sub_minima[at] : 0));
  });
  return out;
}

PackedView Panels::view(const Grid& grid) const {
  const int blocks = (grid.cols + 31) / 32;
  const bool halves = grid.group == 16;
  return {codes.data(),
          scales.data(),
          minima.empty() ? nullptr : minima.data(),
          grid.rows,
          grid.cols,
          blocks,
          halves ? 1 : grid.group ? grid.group / 32 : blocks,
          halves ? 2 * blocks : grid.groups(),
          grid.bits,
          halves ? 16 : grid.sub_group,
          sub_scales.empty() ? nullptr : sub_scales.data(),
          sub_minima.empty() ? nullptr : sub_minima.data(),
          grid.codebook};
}

Sum product(const Grid& grid, int row, const std::vector<double>& x, double (*rounded)(double)) {
  Sum sum{0, 0};
  for (int k = 0; k < grid.cols; ++k) {
    const double weight = grid.value(row, k);
    const double term = (rounded ? rounded(weight) : weight) * x[std::size_t(k)];
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
