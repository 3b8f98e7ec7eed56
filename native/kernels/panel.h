// What the kernels over panel16 share: kinds of codes, addresses inside a panel, group scales, and the way out.
#pragma once

#include "simd.h"
#include "table.h"

namespace trilemma {
namespace {

inline size_t block_bytes(int bits) { return size_t(kBlock) * size_t(kPanel) * size_t(bits) / 8; }

// A kind of codes: bits, whether it has minima, and the columns that share a factor of their group's scale (0: none).
template <int Bits, bool Symmetric, int SubGroup = 0>
struct Codes {
  static constexpr int kBits = Bits, kSubGroup = SubGroup;
  static constexpr bool kSymmetric = Symmetric;
  static constexpr int kOffset = Symmetric && Bits < 8 ? 1 << (Bits - 1) : 0;  // of stored codes
  static constexpr int kParts = SubGroup == 16 ? 2 : 1;                        // of a block that have a scale each
  static constexpr bool kRowScales = false;
  static constexpr bool kSharedRows = Bits <= kSharedScaleBits;  // of int8 inputs
};

// Calls `run` with the kind of a matrix's codes.
template <class Run>
inline void with_codes(const PackedView& w, const Run& run) {
  if (w.bits == 8) return run(Codes<8, true>{});
  if (w.bits == 6) return run(Codes<6, true, 16>{});
  if (w.bits == 5) {
    if (w.sub_group) return run(Codes<5, false, 32>{});
    return w.minima ? run(Codes<5, false>{}) : run(Codes<5, true>{});
  }
  if (w.sub_group) return run(Codes<4, false, 32>{});
  return w.minima ? run(Codes<4, false>{}) : run(Codes<4, true>{});
}

inline const uint8_t* panel_codes(const PackedView& w, int panel) {
  return w.codes + size_t(panel) * size_t(w.blocks) * block_bytes(w.bits);
}

// Scales and minima of a panel's rows, block by block in ascending order. Products of both levels are exact.
template <class C>
struct BlockScales {
  V16f scale[C::kParts] = {}, minimum = zero();

  BlockScales(const PackedView& w, int panel) : group_blocks_(w.group_blocks) {
    const size_t first = size_t(panel) * size_t(w.groups) * kPanel;
    scales_ = w.scales + first;
    if (!C::kSymmetric) minima_ = w.minima + first;
    if (C::kSubGroup == 0) return;
    const size_t subs = size_t(panel) * size_t(w.blocks) * C::kParts * kPanel;
    sub_scales_ = w.sub_scales + subs;
    if (!C::kSymmetric) sub_minima_ = w.sub_minima + subs;
  }

  void next() {
    if (left_ == 0) {
      if (C::kSubGroup == 0) scale[0] = load_f16(scales_);
      if (C::kSubGroup == 0 && !C::kSymmetric) minimum = load_f16(minima_);
      scales_ += kPanel;
      if (!C::kSymmetric) minima_ += kPanel;
      left_ = group_blocks_;
    }
    --left_;
    if (C::kSubGroup == 0) return;
#pragma GCC unroll 2
    for (int part = 0; part < C::kParts; ++part, sub_scales_ += kPanel)
      scale[part] = mul(load_f16(scales_ - kPanel), load_s8(sub_scales_));
    if (C::kSymmetric) return;
    minimum = mul(load_f16(minima_ - kPanel), load_s8(sub_minima_));
    sub_minima_ += kPanel;
  }

 private:
  const uint16_t *scales_ = nullptr, *minima_ = nullptr;
  const int8_t *sub_scales_ = nullptr, *sub_minima_ = nullptr;
  int group_blocks_, left_ = 0;  // blocks of the group that are still to come
};

// Codes of columns 4*I .. 4*I+3 of a block of 4, 5 or 6 bits, as they are stored: byte r*4 + j is row r, column 4*I + j.
template <int Bits, int I>
TRILEMMA_INLINE V16u code_line(const uint8_t* packed) {
  const V16u line = load_line(packed + I / 2 * 64);
  if constexpr (Bits == 4) {
    return take_bits<I % 2 * 4>(line, 0x0f0f0f0fu);
  } else {
    // Bits above the nibble, and the lines whose top bits lie in one line.
    constexpr int kTop = Bits - 4, kLines = 8 / kTop, kAt = I % kLines;
    const V16u top = load_line(packed + 256 + I / kLines * 64);
#if defined(TRILEMMA_SIMD_AVX512)
    // Masked once, top bits serve two lines: they lie four bits apart, and what is below them is not selected.
    constexpr int kHalf = kLines / 2;
    const V16u two = take_bits<kAt % kHalf * kTop>(top, Bits == 5 ? 0x11111111u : 0x33333333u);
    return select_bits(0x0f0f0f0fu, shift_lanes<I % 2 * 4>(line), shift_lanes<(kAt < kHalf ? -4 : 0)>(two));
#else
    const V16u low = take_bits<I % 2 * 4>(line, 0x0f0f0f0fu);
    return join_bits<kAt * kTop - 4>(low, top, Bits == 5 ? 0x10101010u : 0x30303030u);
#endif
  }
}

// A block of 5 or 6 bits as eight lines of bytes, less Offset.
template <int Bits, int Offset, int I = 0>
TRILEMMA_INLINE void expand_codes(const uint8_t* packed, uint8_t* lines) {
  store_line(lines + 64 * I, sub_bytes(code_line<Bits, I>(packed), Offset));
  if constexpr (I < 7) expand_codes<Bits, Offset, I + 1>(packed, lines);
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
