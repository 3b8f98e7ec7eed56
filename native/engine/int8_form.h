// An input quantized to int8: what its matrices ask for, and the buffers that hold it.
#pragma once

#include "aligned.h"
#include "matrix.h"

namespace trilemma {

struct Int8Needs {
  bool codes = false, sums = false, half_sums = false;
  unsigned starts = 0;  // arrays of Int8Input::start, a bit each

  void add(const Grid& grid) {
    codes = true;
    (grid.halves() ? half_sums : sums) |= !grid.symmetric;
    starts |= grid.starts();
  }
};

// Cells are (row, block of 32 columns) pairs, rows rounded up to whole tiles.
class Int8Form {
 public:
  // `shared_rows`: blocks have powers of two of their row's scale, else scales of their own.
  explicit Int8Form(bool shared_rows) : shared_rows_(shared_rows) {}

  void reserve(const Int8Needs& needs, std::size_t cells, std::size_t rows);
  std::size_t bytes() const;
  // What `reserve` of the same would take.
  std::size_t bytes_of(const Int8Needs& needs, std::size_t cells, std::size_t rows) const;
  // The form of a part that starts at that cell and row, as the kernels write and read it.
  Int8Input view(const Int8Needs& needs, std::size_t cell, std::size_t row, int width, int blocks) const;

 private:
  bool shared_rows_;
  AlignedBuffer codes_, row_scale_, scale_, base_, sums_, half_sums_[2], starts_[kStarts];
};

}  // namespace trilemma
