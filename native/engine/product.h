// Matrix products of a chunk of tokens: the input in every form that its matrices ask for, prepared once,
// and the spread of 16-row panels over threads.
#pragma once

#include <initializer_list>

#include "aligned.h"
#include "model.h"

namespace trilemma {

// Which forms of an input are needed besides f32.
struct InputForms {
  bool sums = false, bf16 = false, bf16_sums = false, int8 = false;

  void add(const Linear& linear);
  void add(const InputForms& other);
};

// Owns the derived forms of one input at a time; the f32 rows belong to the caller.
class ProductInput {
 public:
  void reserve(const InputForms& forms, int columns, int tokens);
  std::size_t bytes() const;

  // Rows of `x` are `ld` floats apart, ld = columns rounded up to 32.
  void begin(const InputForms& forms, float* x, int columns, int tokens);
  // Pads and derives one row; safe to call for different tokens at once.
  void prepare(const Kernels& kernels, int token) const;

  FloatInput floats(bool bf16) const;
  const Int8Input& int8() const { return int8_; }
  int tokens() const { return tokens_; }

 private:
  InputForms forms_;
  float* x_ = nullptr;
  int columns_ = 0, tokens_ = 0, ld_ = 0;
  Int8Input int8_{};
  AlignedBuffer bf16_, sums_, bf16_sums_;
  AlignedBuffer codes_, scale_, bias8_, bias128_, code_sums_;
};

struct Product {
  const Linear* linear;
  float* y;
  std::size_t ld;
  bool accumulate = false;
};

// Runs the products (all of the same input) as one parallel job.
void multiply(const Kernels& kernels, int threads, const ProductInput& input, std::initializer_list<Product> products);

}  // namespace trilemma
