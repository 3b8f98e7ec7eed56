// cos and sin of every position and frequency, computed in double precision; equal layers share one table.
#pragma once

#include <vector>

#include "aligned.h"
#include "config.h"

namespace trilemma {

class RopeTables {
 public:
  RopeTables(const DecoderConfig& config, int positions);

  // (half,) values each; half is 0 for a layer without rotary embedding.
  int half(int layer) const { return table(layer) ? table(layer)->half : 0; }
  const float* cos(int layer, int position) const { return table(layer)->cos.as<float>() + offset(layer, position); }
  const float* sin(int layer, int position) const { return table(layer)->sin.as<float>() + offset(layer, position); }
  std::size_t bytes() const;
  // What a table of these positions would take.
  static std::size_t bytes_of(const DecoderConfig& config, int positions);

 private:
  struct Table {
    RopeSpec spec;
    int half;
    AlignedBuffer cos, sin;
  };
  const Table* table(int layer) const {
    return of_layer_[size_t(layer)] < 0 ? nullptr : &tables_[size_t(of_layer_[size_t(layer)])];
  }
  std::size_t offset(int layer, int position) const { return size_t(position) * size_t(table(layer)->half); }
  int find_or_build(const RopeSpec& spec, int positions);

  std::vector<Table> tables_;
  std::vector<int> of_layer_;
};

}  // namespace trilemma
