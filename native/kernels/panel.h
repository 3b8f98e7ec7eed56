// What the kernels over panel16 share: kinds of codes, addresses inside a panel, group scales, and the way out.
#pragma once

#include "simd.h"
#include "table.h"

namespace trilemma {
namespace {

constexpr size_t block_bytes(int bits) { return size_t(kBlock) * size_t(kPanel) * size_t(bits) / 8; }

// A kind of codes: bits, whether it has minima, the columns that share a factor of their group's scale (0: none; 16: a
// factor or an f16 scale of their own), and whether codes are numbers of the codebook's values.
template <int Bits, bool Symmetric, int SubGroup = 0, bool Codebook = false>
struct Codes {
  static constexpr int kBits = Bits, kSubGroup = SubGroup;
  static constexpr bool kSymmetric = Symmetric, kCodebook = Codebook;
  static constexpr int kOffset = Symmetric && Bits < 8 && !Codebook ? 1 << (Bits - 1) : 0;  // of stored codes
  static constexpr int kParts = SubGroup == 16 ? 2 : 1;                        // of a block that have a scale each
  static constexpr bool kRowScales = false;
  static constexpr bool kSigned = Bits == 8 || Codebook;                       // multiplied as signed bytes
  static constexpr bool kExpands = Bits != 8 && (Bits != 4 || Codebook);       // lines become bytes in several steps
  static constexpr bool kSharedRows = Bits <= kSharedScaleBits;  // of int8 inputs
};

// Whether codes are multiplied with an offset that must be undone (signed bytes where they are `Biased8`), and whether
// accumulators start from an array of the input, for that or to be read as floats.
template <class C, bool Biased8>
constexpr bool kHasOffset = C::kSymmetric && (!C::kSigned || Biased8);
template <class C, bool Biased8>
constexpr bool kHasStart = C::kSharedRows || kHasOffset<C, Biased8>;

// Calls `run` with the kind of a matrix's codes.
template <class Run>
inline void with_codes(const PackedView& w, const Run& run) {
  if (w.bits == 8) return run(Codes<8, true>{});
  if (w.bits == 6) return w.sub_group ? run(Codes<6, true, 16>{}) : run(Codes<6, true>{});
  if (w.bits == 5) {
    if (w.sub_group) return run(Codes<5, false, 32>{});
    return w.minima ? run(Codes<5, false>{}) : run(Codes<5, true>{});
  }
  if (w.bits == 3) {
    if (w.sub_group) return run(Codes<3, true, 16>{});
    return w.minima ? run(Codes<3, false>{}) : run(Codes<3, true>{});
  }
  if (w.bits == 2) return w.sub_group ? run(Codes<2, false, 16>{}) : run(Codes<2, false>{});
  if (w.codebook) return run(Codes<4, true, 0, true>{});
  if (w.sub_group) return run(Codes<4, false, 32>{});
  return w.minima ? run(Codes<4, false>{}) : run(Codes<4, true>{});
}

inline const uint8_t* panel_codes(const PackedView& w, int panel) {
  return w.codes + size_t(panel) * size_t(w.blocks) * block_bytes(w.bits);
}

// How far on lie the scales, and the factors of a second level, of so many blocks and panels later.
template <class C>
struct ScalesAhead {
  size_t cells, factors;
  ScalesAhead(const PackedView& w, int blocks, int panels)
      : cells(size_t(blocks / w.group_blocks + panels * w.groups) * kPanel),
        factors(size_t(blocks + panels * w.blocks) * C::kParts * kPanel) {}
};

// Scales and minima of a panel's rows, block by block in ascending order. Products of both levels are exact.
template <class C>
struct BlockScales {
  V16f scale[C::kParts] = {}, minimum[C::kParts] = {};

  BlockScales() = default;
  BlockScales(const PackedView& w, int panel) : group_blocks_(w.group_blocks) {
    const size_t first = size_t(panel) * size_t(w.groups) * kPanel;
    scales_ = w.scales + first;
    if (!C::kSymmetric) minima_ = w.minima + first;
    if (C::kSubGroup == 0 || !w.sub_scales) return;
    const size_t subs = size_t(panel) * size_t(w.blocks) * C::kParts * kPanel;
    sub_scales_ = w.sub_scales + subs;
    if (!C::kSymmetric && C::kBits != 2) sub_minima_ = w.sub_minima + subs;
  }

  // Brings nearer what `next` will read.
  void fetch(const ScalesAhead<C>& ahead) const {
    __builtin_prefetch(scales_ + ahead.cells);
    if (!C::kSymmetric) __builtin_prefetch(minima_ + ahead.cells);
    if (C::kSubGroup == 0 || !sub_scales_) return;
    __builtin_prefetch(sub_scales_ + ahead.factors);
    if (!C::kSymmetric && C::kBits != 2) __builtin_prefetch(sub_minima_ + ahead.factors);
  }

  void next() {
    if (C::kSubGroup == 16 && !sub_scales_) return next_halves();
    if (left_ == 0) {
      if (C::kSubGroup == 0) scale[0] = load_f16(scales_);
      if (C::kSubGroup == 0 && !C::kSymmetric) minimum[0] = load_f16(minima_);
      scales_ += kPanel;
      if (!C::kSymmetric) minima_ += kPanel;
      left_ = group_blocks_;
    }
    --left_;
    if (C::kSubGroup == 0) return;
    if (C::kBits == 2) return next_nibbles();
#pragma GCC unroll 2
    for (int part = 0; part < C::kParts; ++part, sub_scales_ += kPanel)
      scale[part] = mul(load_f16(scales_ - kPanel), load_s8(sub_scales_));
    if (C::kSymmetric) return;
#pragma GCC unroll 2
    for (int part = 0; part < C::kParts; ++part, sub_minima_ += kPanel)
      minimum[part] = mul(load_f16(minima_ - kPanel), load_s8(sub_minima_));
  }

 private:
  void next_nibbles() {
#pragma GCC unroll 2
    for (int part = 0; part < C::kParts; ++part, sub_scales_ += kPanel) {
      load_nibbles(sub_scales_, scale[part], minimum[part]);
      scale[part] = mul(load_f16(scales_ - kPanel), scale[part]);
      minimum[part] = mul(load_f16(minima_ - kPanel), minimum[part]);
    }
  }
  void next_halves() {
#pragma GCC unroll 2
    for (int part = 0; part < C::kParts; ++part, scales_ += kPanel) {
      scale[part] = load_f16(scales_);
      if (C::kSymmetric) continue;
      minimum[part] = load_f16(minima_);
      minima_ += kPanel;
    }
  }

  const uint16_t *scales_ = nullptr, *minima_ = nullptr;
  const int8_t *sub_scales_ = nullptr, *sub_minima_ = nullptr;
  int group_blocks_ = 0, left_ = 0;  // blocks of the group that are still to come
};

// Codes of columns 4*I .. 4*I+3 of a block of 2 or 3 bits, as they are stored: byte r*4 + j is row r, column 4*I + j.
template <int Bits, int I>
TRILEMMA_INLINE V16u low_code_line(const uint8_t* packed) {
  if constexpr (Bits == 2) {
    return take_bits<I % 4 * 2>(load_line(packed + I / 4 * 64), 0x03030303u);
  } else if constexpr (I < 6) {
    return take_bits<I % 2 * 3>(load_line(packed + I / 2 * 64), 0x07070707u);
  } else {
    // The last two have two bits in the first two lines and the third one in the third line.
    const V16u line = load_line(packed + (I - 6) * 64), top = load_line(packed + 128);
#if defined(TRILEMMA_SIMD_AVX512)
    return select_bits(0x03030303u, shift_lanes<6>(line), take_bits<I - 2>(top, 0x04040404u));
#else
    return join_bits<I - 2>(take_bits<6>(line, 0x03030303u), top, 0x04040404u);
#endif
  }
}

// The same of any width below 8 bits.
template <int Bits, int I>
TRILEMMA_INLINE V16u code_line(const uint8_t* packed) {
  if constexpr (Bits < 4) {
    return low_code_line<Bits, I>(packed);
  } else if constexpr (Bits == 4) {
    return take_bits<I % 2 * 4>(load_line(packed + I / 2 * 64), 0x0f0f0f0fu);
  } else {
    const V16u line = load_line(packed + I / 2 * 64);
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

template <int Offset>
struct CodebookBytes {
  uint8_t values[16];
  constexpr CodebookBytes() : values() {
    for (int i = 0; i < 16; ++i) values[i] = uint8_t(kCodebook[i] - Offset);
  }
};

// The line of codes, or of the codebook's values, less Offset.
template <class C, int Offset, int I>
TRILEMMA_INLINE V16u byte_line(const uint8_t* packed) {
  const V16u codes = code_line<C::kBits, I>(packed);
  if constexpr (C::kCodebook) {
    static constexpr CodebookBytes<Offset> book;
    return look_up_bytes(codes, book.values);
  } else if constexpr (Offset == 0) {
    return codes;
  } else {
    return sub_bytes(codes, Offset);
  }
}

// A block as eight lines of bytes, less Offset.
template <class C, int Offset, int I = 0>
TRILEMMA_INLINE void expand_codes(const uint8_t* packed, uint8_t* lines) {
  store_line(lines + 64 * I, byte_line<C, Offset, I>(packed));
  if constexpr (I < 7) expand_codes<C, Offset, I + 1>(packed, lines);
}

// What a minimum of a part of a block is multiplied with, of a row's sums of half blocks.
template <class C>
TRILEMMA_INLINE float sum_of(const float* sums, int block, int part) {
  return C::kParts == 2 ? sums[2 * block + part] : sums[2 * block] + sums[2 * block + 1];
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
