#include "rope_table.h"

#include <algorithm>
#include <cmath>

namespace trilemma {

RopeTables::RopeTables(const DecoderConfig& config, int positions) {
  for (const LayerConfig& layer : config.layers) {
    const bool rotates = layer.attention && layer.attention->rope;
    of_layer_.push_back(rotates ? find_or_build(*layer.attention->rope, positions) : -1);
  }
}

int RopeTables::find_or_build(const RopeSpec& spec, int positions) {
  for (size_t i = 0; i < tables_.size(); ++i)
    if (tables_[i].spec == spec) return int(i);
  const size_t half = spec.inverse_frequencies.size();
  Table table{spec, int(half), AlignedBuffer(size_t(positions) * half * 4),
              AlignedBuffer(size_t(positions) * half * 4)};
  for (int p = 0; p < positions; ++p)
    for (size_t i = 0; i < half; ++i) {
      const double angle = double(p) * double(spec.inverse_frequencies[i]);
      table.cos.as<float>()[size_t(p) * half + i] = float(std::cos(angle) * double(spec.attention_factor));
      table.sin.as<float>()[size_t(p) * half + i] = float(std::sin(angle) * double(spec.attention_factor));
    }
  tables_.push_back(std::move(table));
  return int(tables_.size()) - 1;
}

std::size_t RopeTables::bytes_of(const DecoderConfig& config, int positions) {
  std::vector<const RopeSpec*> seen;
  std::size_t total = 0;
  for (const LayerConfig& layer : config.layers) {
    if (!layer.attention || !layer.attention->rope) continue;
    const RopeSpec& spec = *layer.attention->rope;
    if (std::any_of(seen.begin(), seen.end(), [&](const RopeSpec* other) { return *other == spec; })) continue;
    seen.push_back(&spec);
    total += 2 * size_t(positions) * spec.inverse_frequencies.size() * sizeof(float);
  }
  return total;
}

std::size_t RopeTables::bytes() const {
  std::size_t total = 0;
  for (const Table& t : tables_) total += t.cos.bytes() + t.sin.bytes();
  return total;
}

}  // namespace trilemma
