#include "matrix.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "config.h"

namespace trilemma {
namespace {

constexpr const char* kPartNames[] = {"codes", "scales", "minima", "sub-scales", "sub-minima"};

void check_size(const std::string& name, const char* part, Bytes from, std::size_t expected) {
  if (from.size != expected)
    throw EngineFault("Tensor '" + name + "': " + part + " hold " + std::to_string(from.size) + " bytes, expected " +
                      std::to_string(expected) + ".");
}

template <class T>
const T* copy(Arena& arena, Bytes from) {
  if (from.size == 0) return nullptr;
  std::byte* to = arena.take(from.size);
  std::memcpy(to, from.data, from.size);
  return reinterpret_cast<const T*>(to);
}

void check_shape(const std::string& name, int rows, int cols) {
  if (rows <= 0 || cols <= 0 || cols > (1 << 24))
    throw EngineFault("Tensor '" + name + "': shape (" + std::to_string(rows) + ", " + std::to_string(cols) +
                      ") can not be held; both must be positive.");
}

float half(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  if (exponent == 0) {
    const float value = float(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t high = exponent == 31 ? 0x7f800000u : (exponent + 112) << 23;
  return std::bit_cast<float>(sign | high | (mantissa << 13));
}

void read_plain(const PlainView& view, int row, float* out) {
  const size_t n = size_t(view.cols), at = size_t(row) * n;
  if (view.dtype == kF32) {
    std::memcpy(out, static_cast<const float*>(view.data) + at, n * sizeof(float));
    return;
  }
  const auto* bits = static_cast<const uint16_t*>(view.data) + at;
  for (size_t i = 0; i < n; ++i) out[i] = half(bits[i]);
}

void read_pairs(const PairView& view, int row, float* out) {
  const size_t panel = size_t(view.blocks) * kBlock * kPanel;
  const uint16_t* line = view.pairs + size_t(row / kPanel) * panel + size_t(row % kPanel) * 2;
  for (size_t k = 0; k < size_t(view.cols); ++k)
    out[k] = std::bit_cast<float>(uint32_t(line[k / 2 * (2 * kPanel) + k % 2]) << 16);
}

// Of 2 or 3 bits, in a block at byte `at` of its lines.
int low_code(const uint8_t* block, int bits, int quad, size_t at) {
  const auto byte = [&](int line) { return int(block[size_t(line) * 64 + at]); };
  if (bits == 2) return byte(quad / 4) >> quad % 4 * 2 & 3;
  if (quad < 6) return byte(quad / 2) >> quad % 2 * 3 & 7;
  return byte(quad - 6) >> 6 | (byte(2) >> quad & 1) << 2;
}

int code_at(const PackedView& view, const uint8_t* panel, int r, int k) {
  const size_t at = size_t(r * 4 + k % 4);
  if (view.bits == 8) return int8_t(panel[size_t(k / 4) * 64 + at]);
  const uint8_t* block = panel + size_t(k / kBlock) * size_t(kBlock * kPanel * view.bits / 8);
  const int line = k % kBlock / 4;  // of four columns
  if (view.bits < 4) return low_code(block, view.bits, line, at) - (view.minima ? 0 : 1 << (view.bits - 1));
  const uint8_t low = block[size_t(line / 2) * 64 + at];
  int code = line % 2 ? low >> 4 : low & 15;
  if (view.bits == 5) code |= (block[256 + at] >> line & 1) << 4;
  if (view.bits == 6) code |= (block[256 + size_t(line / 4) * 64 + at] >> (line % 4 * 2) & 3) << 4;
  if (view.codebook) return kCodebook[code];
  return view.minima ? code : code - (1 << (view.bits - 1));
}

// Products of both levels are exact: 11 bits of an f16 times 8 of a byte.
void read_packed(const PackedView& view, int row, float* out) {
  const int panel = row / kPanel, r = row % kPanel;
  const uint8_t* codes = view.codes + size_t(panel) * size_t(view.blocks) * size_t(kBlock * kPanel * view.bits / 8);
  const size_t groups = size_t(panel) * size_t(view.groups) * kPanel + size_t(r);
  const int subs = view.sub_scales ? view.blocks * (kBlock / view.sub_group) : 0;
  const int group = view.sub_group && !subs ? view.sub_group : view.group_blocks * kBlock;
  for (int k = 0; k < view.cols; ++k) {
    const size_t g = groups + size_t(k / group) * kPanel;
    float scale = half(view.scales[g]), minimum = view.minima ? half(view.minima[g]) : 0;
    if (subs) {
      const size_t sub = (size_t(panel) * size_t(subs) + size_t(k / view.sub_group)) * kPanel + size_t(r);
      const int both = uint8_t(view.sub_scales[sub]);
      scale *= view.bits == 2 ? both & 15 : view.sub_scales[sub];
      if (view.minima) minimum *= view.bits == 2 ? both >> 4 : view.sub_minima[sub];
    }
    const float value = float(code_at(view, codes, r, k)) * scale;
    out[k] = view.minima ? value + minimum : value;
  }
}

void check_grid(const std::string& name, const Grid& grid) {
  const auto [bits, symmetric, group, sub_group, codebook] = grid;
  const bool halves = bits == 2 ? !symmetric : (bits == 3 || bits == 6) && symmetric;
  const bool plain = bits == 2 ? !symmetric : (bits >= 3 && bits <= 5) || ((bits == 6 || bits == 8) && symmetric);
  const bool known = codebook          ? bits == 4 && symmetric && sub_group == 0 && group != 16
                     : grid.halves()   ? halves
                     : sub_group == 32 ? (bits == 4 || bits == 5) && !symmetric
                                       : sub_group == 0 && plain;
  if (!known)
    throw EngineFault("Tensor '" + name + "': " + std::to_string(bits) +
                      (symmetric ? "-bit symmetric" : "-bit asymmetric") + " codes" +
                      (codebook ? " of a codebook" : "") +
                      (sub_group ? " with a factor for " + std::to_string(sub_group) + " columns" : std::string()) +
                      (group == 16 ? " in groups of 16" : "") +
                      " are not supported; 3, 4 and 5 bits (both kinds), 2 asymmetric and 6 and 8 symmetric ones are. With "
                      "factors 4 and 5 asymmetric ones (of 32 columns) are, and with factors of 16 columns or in groups of "
                      "16 2 asymmetric and 3 and 6 symmetric ones. Codebooks have 4 bits and no factors.");
  if (group < 0 || (group % kBlock != 0 && group != kBlock / 2))
    throw EngineFault("Tensor '" + name + "': group " + std::to_string(group) +
                      " must be a multiple of 32, 16, or 0 for the whole row.");
}

}  // namespace

// Columns go in steps whose lines stay in L1 while 16 rows fill them.
void pair_rows(const std::byte* rows, int count, int columns, std::byte* to) {
  constexpr size_t kStep = 128;
  const size_t cols = size_t(columns), panel_bytes = round_up(cols, kBlock) * kPanel * 2;
  for (size_t first = 0; first < size_t(count); first += kPanel, to += panel_bytes)
    for (size_t begin = 0; begin < cols; begin += kStep)
      for (size_t r = first; r < std::min(first + kPanel, size_t(count)); ++r) {
        const size_t end = std::min(begin + kStep, cols);
        for (size_t k = begin; k < end; k += 2)
          std::memcpy(to + k / 2 * 64 + (r - first) * 4, rows + (r * cols + k) * 2, k + 1 < end ? 4 : 2);
      }
}

Matrix Matrix::unplaced(const std::string& name, Dtype dtype, int rows, int cols, Activation activation) {
  check_shape(name, rows, cols);
  if (activation == Activation::kInt8)
    throw EngineFault("Tensor '" + name +
                      "': int8 activations need quantized weights; this one is unquantized. "
                      "Use 'f32' or 'bf16' activations, or quantize it.");
  Matrix m;
  m.rows_ = rows;
  m.cols_ = cols;
  m.activation_ = activation;
  if (dtype == kBf16) {
    m.layout_ = Layout::kPairs;
    m.pair_view_ = {nullptr, rows, cols, (cols + kBlock - 1) / kBlock};
  } else {
    m.plain_view_ = {nullptr, dtype, rows, cols};
  }
  m.bytes_ = m.part_bytes()[0];
  return m;
}

Matrix Matrix::plain(Arena& arena, const std::string& name, Dtype dtype, int rows, int cols, Bytes data,
                     Activation activation) {
  Matrix m = unplaced(name, dtype, rows, cols, activation);
  check_size(name, "values", data, size_t(rows) * size_t(cols) * (dtype == kF32 ? 4 : 2));
  if (dtype != kBf16) {
    m.place({copy<std::byte>(arena, data)});
    return m;
  }
  std::byte* to = arena.take(m.bytes_);
  pair_rows(static_cast<const std::byte*>(data.data), rows, cols, to);
  m.place({to});
  return m;
}

unsigned Grid::starts() const {
  if (!symmetric) return shares_row_scale() ? 1u << kStart0 : 0;
  if (codebook) return 1u << kStart0 | 1u << kStart128;  // which of them depends on the instructions
  switch (bits) {
    case 3:
      return halves() ? 1u << kStart4Low | 1u << kStart4High : 1u << kStart4;
    case 4:
      return 1u << kStart8;
    case 5:
      return 1u << kStart16;
    case 6:
      return halves() ? 1u << kStart32Low | 1u << kStart32High : 1u << kStart32;
    default:
      return 1u << kStart128;
  }
}

Matrix Matrix::unplaced(const std::string& name, const Grid& grid, int rows, int cols, Activation activation) {
  check_shape(name, rows, cols);
  check_grid(name, grid);
  Matrix m;
  m.rows_ = rows;
  m.cols_ = cols;
  m.layout_ = Layout::kPanels;
  m.activation_ = activation;
  m.grid_ = grid;
  PackedView& v = m.packed_view_;
  v.rows = rows;
  v.cols = cols;
  v.bits = grid.bits;
  v.blocks = (cols + kBlock - 1) / kBlock;
  const bool half_blocks = grid.group == kBlock / 2;
  v.group_blocks = half_blocks ? 1 : grid.group ? grid.group / kBlock : v.blocks;
  v.groups = half_blocks ? 2 * v.blocks : (v.blocks + v.group_blocks - 1) / v.group_blocks;
  v.sub_group = half_blocks ? grid.group : grid.sub_group;
  v.codebook = grid.codebook;
  for (const size_t part : m.part_bytes()) m.bytes_ += part;
  return m;
}

PartBytes Matrix::part_bytes() const {
  const size_t held = size_t(panels()), line = size_t(kBlock) * kPanel;
  switch (layout_) {
    case Layout::kRows:
      return {size_t(rows_) * size_t(cols_) * (plain_view_.dtype == kF32 ? 4 : 2)};
    case Layout::kPairs:
      return {held * size_t(pair_view_.blocks) * line * 2};
    case Layout::kPanels:
      break;
  }
  const PackedView& v = packed_view_;
  const size_t scales = held * size_t(v.groups) * kPanel * 2, none = 0;
  const size_t factors = grid_.sub_group ? held * size_t(v.blocks * (kBlock / grid_.sub_group)) * kPanel : 0;
  return {held * size_t(v.blocks) * line * size_t(grid_.bits) / 8, scales, grid_.symmetric ? none : scales, factors,
          grid_.symmetric || grid_.bits == 2 ? none : factors};
}

std::array<Bytes, kMatrixParts> Matrix::parts() const {
  const PartBytes sizes = part_bytes();
  const PackedView& v = packed_view_;
  switch (layout_) {
    case Layout::kRows:
      return {Bytes{plain_view_.data, sizes[0]}};
    case Layout::kPairs:
      return {Bytes{pair_view_.pairs, sizes[0]}};
    case Layout::kPanels:
      break;
  }
  return {Bytes{v.codes, sizes[0]}, Bytes{v.scales, sizes[1]}, Bytes{v.minima, sizes[2]}, Bytes{v.sub_scales, sizes[3]},
          Bytes{v.sub_minima, sizes[4]}};
}

void Matrix::place(const PartPlaces& parts) {
  plain_view_.data = parts[0];
  pair_view_.pairs = reinterpret_cast<const uint16_t*>(parts[0]);
  PackedView& v = packed_view_;
  v.codes = reinterpret_cast<const uint8_t*>(parts[0]);
  v.scales = reinterpret_cast<const uint16_t*>(parts[1]);
  v.minima = reinterpret_cast<const uint16_t*>(parts[2]);
  v.sub_scales = reinterpret_cast<const int8_t*>(parts[3]);
  v.sub_minima = reinterpret_cast<const int8_t*>(parts[4]);
}

Matrix Matrix::packed(Arena& arena, const std::string& name, const Grid& grid, int rows, int cols,
                      Activation activation, const PackedParts& parts) {
  Matrix m = unplaced(name, grid, rows, cols, activation);
  const Bytes given[] = {parts.codes, parts.scales, parts.minima, parts.sub_scales, parts.sub_minima};
  const PartBytes expected = m.part_bytes();
  for (size_t i = 0; i < kMatrixParts; ++i) check_size(name, kPartNames[i], given[i], expected[i]);
  PartPlaces places{};
  for (size_t i = 0; i < kMatrixParts; ++i) places[i] = copy<std::byte>(arena, given[i]);
  m.place(places);
  return m;
}

void Matrix::read_row(int row, float* out) const {
  switch (layout_) {
    case Layout::kRows:
      return read_plain(plain_view_, row, out);
    case Layout::kPairs:
      return read_pairs(pair_view_, row, out);
    case Layout::kPanels:
      return read_packed(packed_view_, row, out);
  }
}

}  // namespace trilemma
