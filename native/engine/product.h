// Matrix products of a chunk of tokens: the input in every form that its matrices ask for, prepared once,
// and the spread of 16-row panels over threads.
#pragma once

#include <initializer_list>
#include <span>
#include <vector>

#include "aligned.h"
#include "foresight.h"
#include "int8_form.h"
#include "model.h"

namespace trilemma {

// Which forms of an input are needed besides f32.
struct InputForms {
  bool sums = false, bf16 = false, bf16_sums = false;
  bool bf16_rows = false;  // rounded, for weights that only the float kernels multiply
  Int8Needs int8[2];       // with scales of blocks, and (by Grid::shares_row_scale) with powers of two of the rows'

  // Of a matrix in that layout; `grid` counts where it lies in panels.
  void add(Activation activation, Matrix::Layout layout, const Grid& grid);
  // What multiplies the linear's own input: its weight, and the first of a low-rank pair.
  void add(const Linear& linear);
  // All products of a layer, the second ones of pairs included.
  void add(const LayerWeights& layer);
  // Kernels with products of bf16 take that form in tiles, others as rows of rounded f32.
  bool rounds_rows(const Kernels& kernels) const { return bf16_rows || (bf16 && !kernels.bf16); }
  bool rounds_tiles(const Kernels& kernels) const { return bf16 && kernels.bf16; }
};

// Owns the derived forms of one input at a time; the f32 rows belong to the caller. An input is one part, or several
// (consecutive rows that different matrices multiply: one part an expert).
class ProductInput {
 public:
  // For up to `rows` rows, in several parts where `split`.
  void reserve(const Kernels& kernels, const InputForms& forms, int columns, int rows, bool split);
  std::size_t bytes() const;
  // What `reserve` of the same would take.
  static std::size_t bytes_of(const Kernels& kernels, const InputForms& forms, int columns, int rows, bool split);

  // Rows of `x` are `ld` floats apart, ld = columns rounded up to 32.
  void begin(const InputForms& forms, float* x, int columns, int rows) { begin(forms, x, columns, {&rows, 1}); }
  void begin(const InputForms& forms, float* x, int columns, std::span<const int> rows_of_parts);
  // Pads and derives one row; safe to call for different rows at once.
  void prepare(const Kernels& kernels, int row) const;

  FloatInput floats(int part, bool rounded) const;
  const Bf16Input& bf16(int part) const { return parts_[size_t(part)].bf16; }
  const float* bf16_sums(int part) const;
  // `shared`: the form for grids that share_row_scale.
  const Int8Input& int8(int part, bool shared) const { return parts_[size_t(part)].int8[shared]; }
  int rows(int part) const { return parts_[size_t(part)].rows; }

 private:
  struct Sizes {
    std::size_t bf16_rows = 0, bf16_tiles = 0, sums = 0, bf16_sums = 0;
    std::size_t cells = 0;  // of the int8 forms
    std::size_t total() const { return bf16_rows + bf16_tiles + sums + bf16_sums; }
  };
  static Sizes sizes_of(const Kernels& kernels, const InputForms& forms, int columns, int rows, bool split);

  struct Part {
    int first, rows;
    Int8Input int8[2];
    Bf16Input bf16;
  };
  InputForms forms_;
  float* x_ = nullptr;
  int columns_ = 0, ld_ = 0;
  std::vector<Part> parts_;
  AlignedBuffer bf16_rows_, bf16_tiles_, sums_, bf16_sums_;
  Int8Form int8_[2] = {Int8Form(false), Int8Form(true)};
};

struct Product {
  const Linear* linear;
  float* y;
  std::size_t ld;
  bool accumulate = false;
  int part = 0;  // of the input; `y` is the first row of this part's output
};

// Runs the products (all of the same input) as one parallel job, without what low-rank pairs add. With foresight, threads
// that wait fetch weights of the job that follows.
void multiply(const Kernels& kernels, int threads, const ProductInput& input, std::span<const Product> products,
              Foresight* foresight = nullptr);

}  // namespace trilemma
