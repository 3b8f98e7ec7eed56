// What runs through the layers together; inside forward.cpp and attention.cpp only.
#pragma once

#include "context.h"

namespace trilemma {

// Tokens that go through all layers together, in rows of the residual stream.
struct Context::Pass {
  std::vector<std::int32_t> tokens;
  std::vector<Segment> segments;
  std::vector<int> wanted;  // rows whose logits are asked for, ascending

  int position(int row) const {
    for (const Segment& s : segments)
      if (row < s.first + s.count) return s.position + row - s.first;
    return 0;
  }
  void add(const Slice& slice, int from, int count, int position, bool all, bool last) {
    segments.push_back({slice.sequence, int(tokens.size()), count, position});
    for (int i = 0; i < count; ++i) {
      if (all || (last && i == count - 1)) wanted.push_back(int(tokens.size()));
      tokens.push_back(slice.tokens[size_t(from + i)]);
    }
  }
};

}  // namespace trilemma
