// GGUF's blocks of quantized values as panels (see matrix.h), 16 rows at a time, bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "matrix.h"

namespace trilemma {

// One type of blocks: its size, the grid that holds it, and how 16 rows become a panel.
struct BlockType {
  const char* name;
  int values;         // of a row in a block
  std::size_t bytes;  // of a block
  Grid grid;
  // rows: `count` (1..16) of `row_bytes` each, one after another; the panel's others become zeros. Returns the first
  // row with a scale or minimum that is not finite, or -1.
  int (*repack)(const std::uint8_t* rows, std::size_t row_bytes, int count, int blocks, const PackedParts& to);

  std::size_t row_bytes(int cols) const { return std::size_t(cols / values) * bytes; }
};

// Throws EngineFault for a name that is none of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL and Q2_K to Q6_K.
const BlockType& block_type(const std::string& name);

}  // namespace trilemma
