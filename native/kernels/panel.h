// What the kernels over panel16.v1 share: addresses inside a panel, group scales, and the way out.
#pragma once

#include "simd.h"
#include "table.h"

namespace trilemma {
namespace {

inline size_t block_bytes(int bits) { return size_t(kBlock) * size_t(kPanel) * size_t(bits) / 8; }

struct PanelView {
  const uint8_t* codes;
  const uint16_t* scales;
  const uint16_t* minima;
};

inline PanelView panel_of(const PackedView& w, int panel) {
  const size_t groups = size_t(panel) * size_t(w.groups) * kPanel;
  return {w.codes + size_t(panel) * size_t(w.blocks) * block_bytes(w.bits), w.scales + groups,
          w.minima ? w.minima + groups : nullptr};
}

// Lanes are rows of the panel. The last panel may be short: its padding rows are not written.
inline void write_panel(V16f sum, int panel, int rows, int token, const Output& out) {
  const int row = panel * kPanel;
  const int n = rows - row < kPanel ? rows - row : kPanel;
  float* y = out.y + size_t(token) * out.ld + row;
  if (n == kPanel) {
    if (out.bias) sum = add(sum, load(out.bias + row));
    store(y, out.accumulate ? add(load(y), sum) : sum);
  } else {
    if (out.bias) sum = add(sum, load_n(out.bias + row, n));
    store_n(y, out.accumulate ? add(load_n(y, n), sum) : sum, n);
  }
}

}  // namespace
}  // namespace trilemma
