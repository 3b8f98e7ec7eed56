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
  // The wanted rows alone, in this order.
  Pass only_wanted() const {
    Pass rest;
    auto row = wanted.begin();
    for (const Segment& s : segments)
      for (; row != wanted.end() && *row < s.first + s.count; ++row) {
        const int at = int(rest.tokens.size()), place = s.position + *row - s.first;
        Segment* before = rest.segments.empty() ? nullptr : &rest.segments.back();
        if (before && before->sequence == s.sequence && before->position + before->count == place)
          ++before->count;
        else
          rest.segments.push_back({s.sequence, at, 1, place});
        rest.wanted.push_back(at);
        rest.tokens.push_back(tokens[size_t(*row)]);
      }
    return rest;
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
