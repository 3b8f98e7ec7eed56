// One weight matrix as the engine holds it, in one of three layouts, one of which has three versions.
//
// rows.v1: f32 or f16, row-major, unpadded.
// pairs16.v1: bf16 in panels of 16 rows (the last padded with zeros), columns padded to a multiple of 32.
//   Per 2 columns one 64-byte line; lane r of 32 bits holds row r, column k in its low half and k+1 in the high one.
// panel16.v1: panels of 16 rows (the last padded with zero codes), columns padded to a multiple of 32.
//   4 bits: per 8 columns one 64-byte line; byte r*4+j holds row r, column k+j in the low nibble and k+4+j in the
//           high one; symmetric codes are stored +8.
//   8 bits: per 4 columns one 64-byte line; byte r*4+j is the signed code of row r, column k+j.
//   scales (and minima) are f16, [panel][group][16]; a group is 32, 64 or 128 columns, or the whole row.
// panel16.v2: the same, with codes of 5 and 6 bits and scales of two levels.
//   5 and 6 bits: a block of 32 columns is the four lines of its low four bits, as 4-bit codes have them, then
//           5 bits: one line, byte r*4+j has the fifth bit of row r, columns j, 4+j, .. 28+j, from its lowest bit up;
//           6 bits: two lines of 16 columns each, byte r*4+j has two bits of columns j, 4+j, 8+j, 12+j.
//           Symmetric codes are stored +16 and +32.
//   two levels: [panel][padded columns / sub-group][16] signed bytes beside scales (and minima): their products with
//           the f16 of the group hold for 32 columns (4 and 5 bits, with minima) or 16 (6 bits, symmetric).
// panel16.v3: the same, with codes of 2 and 3 bits, codes that number the values of a codebook, and groups of 16. Of the
//   32 columns of a block, quad i are columns 4i .. 4i+3, and byte r*4+j has row r, column j of its quads:
//   2 bits: two lines; quads 0-3 and 4-7, from the lowest bits up.
//   3 bits: three lines; quads 0 and 1, 2 and 3, 4 and 5 in bits 0-2 and 3-5. Bits 6-7 are the two low bits of quad 6 in
//           the first line and of quad 7 in the second, and their third bits in the third. Symmetric codes are stored +4.
//   codebook: numbers of kCodebook's values, as 4-bit codes that are stored as they are.
//   groups of 16 (2 bits with minima, 3 and 6 bits symmetric): f16 scales (and minima) are [panel][padded columns / 16][16];
//           two-level scales of these are factors of 16 columns. With 2 bits a byte holds that of the scale in its low
//           four bits and that of the minimum in its high ones.
#pragma once

#include <array>
#include <string>
#include <variant>

#include "../kernels/table.h"
#include "arena.h"

namespace trilemma {

enum class Activation { kF32, kBf16, kInt8 };

struct Bytes {
  const void* data = nullptr;
  std::size_t size = 0;
};

// The grid of packed codes. group: columns that share an f16 scale, 0 for the whole row; sub_group: columns that share a
// factor of it, 0 where there is one level.
struct Grid {
  int bits;
  bool symmetric;
  int group;
  int sub_group = 0;
  bool codebook = false;

  bool shares_row_scale() const { return bits <= kSharedScaleBits; }
  // Whether the halves of a block have scales of their own.
  bool halves() const { return group == kBlock / 2 || sub_group == kBlock / 2; }
  // Arrays of Int8Input::start that products with such codes need, a bit each.
  unsigned starts() const;
};

// Minima, and what belongs to a second level of scales, may be absent.
struct PackedParts {
  Bytes codes, scales, minima{}, sub_scales{}, sub_minima{};
};

// The buffers of a matrix in one order: those of PackedParts, or of a plain matrix its values alone.
constexpr int kMatrixParts = 5;
using PartBytes = std::array<std::size_t, kMatrixParts>;
using PartPlaces = std::array<const std::byte*, kMatrixParts>;

class Matrix {
 public:
  Matrix() = default;
  enum class Layout { kRows, kPairs, kPanels };

  // Copies the buffers into `arena`, which must outlive the matrix, after checking their sizes; throws EngineFault
  // naming `name` otherwise. bf16 comes in rows and is held as pairs.
  static Matrix plain(Arena& arena, const std::string& name, Dtype dtype, int rows, int cols, Bytes data,
                      Activation activation);
  static Matrix packed(Arena& arena, const std::string& name, const Grid& grid, int rows, int cols,
                       Activation activation, const PackedParts& parts);

  // Shape and layout without buffers, which must be placed before anything else is asked of the matrix; throws
  // EngineFault for what can not be held.
  static Matrix unplaced(const std::string& name, Dtype dtype, int rows, int cols, Activation activation);
  static Matrix unplaced(const std::string& name, const Grid& grid, int rows, int cols, Activation activation);
  // Sizes of the buffers, 0 for those that there are not.
  PartBytes part_bytes() const;
  // The buffers themselves, in the same order.
  std::array<Bytes, kMatrixParts> parts() const;
  // Buffers of these sizes, which the caller keeps alive and fills.
  void place(const PartPlaces& parts);

  int rows() const { return rows_; }
  int cols() const { return cols_; }
  int panels() const { return (rows_ + kPanel - 1) / kPanel; }
  Layout layout() const { return layout_; }
  Activation activation() const { return activation_; }
  const Grid& grid() const { return grid_; }  // of panels
  const PlainView& plain_view() const { return plain_view_; }
  const PairView& pair_view() const { return pair_view_; }
  const PackedView& packed_view() const { return packed_view_; }
  std::size_t bytes() const { return bytes_; }

  // One row as f32 (embedding gather): code * scale (+ minimum), each rounded, as the numpy reference does.
  void read_row(int row, float* out) const;

 private:
  int rows_ = 0, cols_ = 0;
  Layout layout_ = Layout::kRows;
  Activation activation_ = Activation::kF32;
  std::size_t bytes_ = 0;
  PlainView plain_view_{};
  PairView pair_view_{};
  PackedView packed_view_{};
  Grid grid_{8, true, 0};
};

// `count` rows of bf16 (at any address) as pairs16.v1, into whole panels of zeros.
void pair_rows(const std::byte* rows, int count, int cols, std::byte* to);

}  // namespace trilemma
