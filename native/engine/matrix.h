// One weight matrix as the engine holds it, in one of three layouts.
//
// rows.v1: f32 or f16, row-major, unpadded.
// pairs16.v1: bf16 in panels of 16 rows (the last padded with zeros), columns padded to a multiple of 32.
//   Per 2 columns one 64-byte line; lane r of 32 bits holds row r, column k in its low half and k+1 in the high one.
// panel16.v1: panels of 16 rows (the last padded with zero codes), columns padded to a multiple of 32.
//   4 bits: per 8 columns one 64-byte line; byte r*4+j holds row r, column k+j in the low nibble and k+4+j in the
//           high one; symmetric codes are stored +8.
//   8 bits: per 4 columns one 64-byte line; byte r*4+j is the signed code of row r, column k+j.
//   scales (and minima) are f16, [panel][group][16]; a group is 32, 64 or 128 columns, or the whole row.
#pragma once

#include <string>
#include <variant>

#include "../kernels/table.h"
#include "arena.h"

namespace trilemma {

enum class Activation { kF32, kBf16, kInt8 };

struct Bytes {
  const void* data;
  std::size_t size;
};

class Matrix {
 public:
  Matrix() = default;
  enum class Layout { kRows, kPairs, kPanels };

  // Copies the buffers into `arena`, which must outlive the matrix, after checking their sizes; throws EngineFault
  // naming `name` otherwise. bf16 comes in rows and is held as pairs.
  static Matrix plain(Arena& arena, const std::string& name, Dtype dtype, int rows, int cols, Bytes data,
                      Activation activation);
  // group 0 means the whole row.
  static Matrix packed(Arena& arena, const std::string& name, int bits, bool symmetric, int group, int rows, int cols,
                       Activation activation, Bytes codes, Bytes scales, Bytes minima);

  int rows() const { return rows_; }
  int cols() const { return cols_; }
  int panels() const { return (rows_ + kPanel - 1) / kPanel; }
  Layout layout() const { return layout_; }
  Activation activation() const { return activation_; }
  bool asymmetric() const { return packed_view_.minima != nullptr; }
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
};

}  // namespace trilemma
