#include "repack.h"

#include <cstring>

#include "config.h"

namespace trilemma {
namespace {

constexpr std::uint8_t kLow = 15;

std::uint16_t f16_at(const std::uint8_t* p) {
  std::uint16_t h;
  std::memcpy(&h, p, 2);
  return h;
}

bool is_finite(std::uint16_t h) { return (h & 0x7c00) != 0x7c00; }

// Of 2 or 3 bits: eight times four columns to the lines at `line`.
template <int bits>
void put_few(const std::uint32_t* four, std::uint8_t* line) {
  const std::uint32_t two = 0x03030303u, one = 0x01010101u, high = (four[6] >> 2 & one) | (four[7] >> 2 & one) << 1;
  const std::uint32_t rest[] = {four[6] & two, four[7] & two, high};
  for (int i = 0; i < bits; ++i) {
    const std::uint32_t *f = four + 4 * i, *g = four + 2 * i;
    const std::uint32_t byte = bits == 2 ? f[0] | f[1] << 2 | f[2] << 4 | f[3] << 6 : g[0] | g[1] << 3 | rest[i] << 6;
    std::memcpy(line + i * 64, &byte, 4);
  }
}

// Codes of one row in a block of 32 columns, as they are stored (biased where symmetric), to their place in the panel.
template <int bits>
void put(const std::uint8_t* codes, std::uint8_t* block, int row) {
  std::uint32_t four[8];
  std::memcpy(four, codes, 32);
  std::uint8_t* line = block + row * 4;
  if constexpr (bits == 8) {
    for (int i = 0; i < 8; ++i) std::memcpy(line + i * 64, four + i, 4);
    return;
  }
  if constexpr (bits < 4) return put_few<bits>(four, line);
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t both = (four[2 * i] & 0x0f0f0f0fu) | (four[2 * i + 1] & 0x0f0f0f0fu) << 4;
    std::memcpy(line + i * 64, &both, 4);
  }
  constexpr int more = bits == 8 ? 0 : bits - 4;
  if constexpr (more > 0) {
    constexpr std::uint32_t mask = more == 1 ? 0x01010101u : 0x03030303u;
    constexpr int held = 8 / more;  // groups of four columns in a line
    for (int first = 0; first < 8; first += held) {
      std::uint32_t high = 0;
      for (int i = 0; i < held; ++i) high |= (four[first + i] >> 4 & mask) << (i * more);
      std::memcpy(line + 256 + first / held * 64, &high, 4);
    }
  }
}

void nibbles(const std::uint8_t* packed, std::uint8_t* codes) {
  for (int i = 0; i < 16; ++i) codes[i] = packed[i] & kLow;
  for (int i = 0; i < 16; ++i) codes[16 + i] = packed[i] >> 4;
}

void add_fifth_bits(const std::uint8_t* packed, std::uint8_t* codes) {
  std::uint32_t fifth;
  std::memcpy(&fifth, packed, 4);
  for (int i = 0; i < 32; ++i) codes[i] = std::uint8_t(codes[i] | (fifth >> i & 1) << 4);
}

// One scale (and minimum) for 32 values: where they and the codes lie in a block.
struct Q4_0 {
  static constexpr int kBits = 4, kBias = 8;
  static constexpr bool kMinima = false;
  static constexpr std::size_t kBytes = 18;
  static void codes(const std::uint8_t* p, std::uint8_t* to) { nibbles(p + 2, to); }
};

// The same bytes, but nibbles are numbers of a codebook's values.
struct IQ4_NL : Q4_0 {
  static constexpr int kBias = 0;
};

struct Q4_1 {
  static constexpr int kBits = 4, kBias = 0;
  static constexpr bool kMinima = true;
  static constexpr std::size_t kBytes = 20;
  static void codes(const std::uint8_t* p, std::uint8_t* to) { nibbles(p + 4, to); }
};

struct Q5_0 {
  static constexpr int kBits = 5, kBias = 16;
  static constexpr bool kMinima = false;
  static constexpr std::size_t kBytes = 22;
  static void codes(const std::uint8_t* p, std::uint8_t* to) {
    nibbles(p + 6, to);
    add_fifth_bits(p + 2, to);
  }
};

struct Q5_1 {
  static constexpr int kBits = 5, kBias = 0;
  static constexpr bool kMinima = true;
  static constexpr std::size_t kBytes = 24;
  static void codes(const std::uint8_t* p, std::uint8_t* to) {
    nibbles(p + 8, to);
    add_fifth_bits(p + 4, to);
  }
};

struct Q8_0 {
  static constexpr int kBits = 8, kBias = 0;
  static constexpr bool kMinima = false;
  static constexpr std::size_t kBytes = 34;
  static void codes(const std::uint8_t* p, std::uint8_t* to) { std::memcpy(to, p + 2, 32); }
};

template <class T>
T* writable(const Bytes& part) {
  return static_cast<T*>(const_cast<void*>(part.data));
}

template <class Type>
int repack_simple(const std::uint8_t* rows, std::size_t row_bytes, int count, int blocks, const PackedParts& to) {
  auto* codes = writable<std::uint8_t>(to.codes);
  auto* scales = writable<std::uint16_t>(to.scales);
  auto* minima = writable<std::uint16_t>(to.minima);
  std::uint8_t row_codes[32], zeros[32];
  std::memset(zeros, Type::kBias, 32);
  int bad = kPanel;
  for (int b = 0; b < blocks; ++b, codes += kBlock * kPanel * Type::kBits / 8)
    for (int r = 0; r < kPanel; ++r) {
      const std::size_t at = std::size_t(b) * kPanel + std::size_t(r);
      if (r >= count) {
        put<Type::kBits>(zeros, codes, r);
        scales[at] = 0;
        if (Type::kMinima) minima[at] = 0;
        continue;
      }
      const std::uint8_t* p = rows + std::size_t(r) * row_bytes + std::size_t(b) * Type::kBytes;
      Type::codes(p, row_codes);
      put<Type::kBits>(row_codes, codes, r);
      scales[at] = f16_at(p);
      if (Type::kMinima) minima[at] = f16_at(p + 2);
      if (!is_finite(scales[at]) || (Type::kMinima && !is_finite(minima[at]))) bad = r < bad ? r : bad;
    }
  return bad < kPanel ? bad : -1;
}

// Factors of eight groups, six bits each: of scales, or with `second` of minima.
std::int8_t six_bits(const std::uint8_t* f, int group, bool second) {
  if (group < 4) return std::int8_t(f[group + (second ? 4 : 0)] & 63);
  const int low = second ? f[group + 4] >> 4 : f[group + 4] & kLow;
  return std::int8_t(low | f[group - 4 + (second ? 4 : 0)] >> 6 << 4);
}

// 256 values with scales of two levels, Q4_K and Q5_K: eight groups of 32.
template <int bits>
struct WithMinima {
  static constexpr int kBits = bits, kBias = 0, kFactors = 8;
  static constexpr bool kMinima = true;
  static constexpr std::size_t kBytes = bits == 4 ? 144 : 176, kScale = 0, kMinimum = 2;
  static void codes(const std::uint8_t* p, int group, std::uint8_t* to) {
    const std::uint8_t* packed = p + (bits == 4 ? 16 : 48) + group / 2 * 32;
    const int shift = group % 2 * 4;
    for (int i = 0; i < 32; ++i) to[i] = std::uint8_t(packed[i] >> shift & kLow);
    if (bits == 5)
      for (int i = 0; i < 32; ++i) to[i] = std::uint8_t(to[i] | (p[16 + i] >> group & 1) << 4);
  }
  static std::int8_t factor(const std::uint8_t* p, int i) { return six_bits(p + 4, i, false); }
  static std::int8_t minimum_factor(const std::uint8_t* p, int i) { return six_bits(p + 4, i, true); }
};

// Sixteen groups of 16: symmetric, or with minima.
struct Symmetric16 {
  static constexpr int kFactors = 16;
  static constexpr bool kMinima = false;
  static constexpr std::size_t kMinimum = 0;
  static std::int8_t minimum_factor(const std::uint8_t*, int) { return 0; }
};

struct Q2_K {
  static constexpr int kBits = 2, kBias = 0, kFactors = 16;
  static constexpr bool kMinima = true;
  static constexpr std::size_t kBytes = 84, kScale = 80, kMinimum = 82;
  static void codes(const std::uint8_t* p, int group, std::uint8_t* to) {
    for (int i = 0; i < 32; ++i) to[i] = std::uint8_t(p[16 + group / 4 * 32 + i] >> (group % 4 * 2) & 3);
  }
  static std::int8_t factor(const std::uint8_t* p, int i) { return std::int8_t(p[i]); }  // both of them
  static std::int8_t minimum_factor(const std::uint8_t*, int) { return 0; }
};

struct Q3_K : Symmetric16 {
  static constexpr int kBits = 3, kBias = 4;
  static constexpr std::size_t kBytes = 110, kScale = 108;
  static void codes(const std::uint8_t* p, int group, std::uint8_t* to) {
    for (int i = 0; i < 32; ++i)
      to[i] = std::uint8_t((p[32 + group / 4 * 32 + i] >> (group % 4 * 2) & 3) | (p[i] >> group & 1) << 2);
  }
  static std::int8_t factor(const std::uint8_t* p, int i) {
    const int low = i < 8 ? p[96 + i] & kLow : p[88 + i] >> 4;
    return std::int8_t((low | (p[104 + i % 4] >> (i / 4 * 2) & 3) << 4) - 32);
  }
};

struct Q6_K : Symmetric16 {
  static constexpr int kBits = 6, kBias = 32;
  static constexpr std::size_t kBytes = 210, kScale = 208;
  static void codes(const std::uint8_t* p, int group, std::uint8_t* to) {
    const int half = group / 4, part = group % 4;
    const std::uint8_t *low = p + half * 64 + part % 2 * 32, *high = p + 128 + half * 32;
    for (int i = 0; i < 32; ++i)
      to[i] = std::uint8_t((low[i] >> (part / 2 * 4) & kLow) | (high[i] >> (part * 2) & 3) << 4);
  }
  static std::int8_t factor(const std::uint8_t* p, int i) { return std::int8_t(p[192 + i]); }
};

template <class Type>
int repack_k(const std::uint8_t* rows, std::size_t row_bytes, int count, int blocks, const PackedParts& to) {
  auto* codes = writable<std::uint8_t>(to.codes);
  auto* scales = writable<std::uint16_t>(to.scales);
  auto* minima = writable<std::uint16_t>(to.minima);
  auto* sub_scales = writable<std::int8_t>(to.sub_scales);
  auto* sub_minima = writable<std::int8_t>(to.sub_minima);
  constexpr std::size_t kBlockBytes = kBlock * kPanel * Type::kBits / 8;
  std::uint8_t row_codes[32], zeros[32];
  std::memset(zeros, Type::kBias, 32);
  int bad = kPanel;
  for (int s = 0; s < blocks; ++s, codes += 8 * kBlockBytes)
    for (int r = 0; r < kPanel; ++r) {
      const std::size_t at = std::size_t(s) * kPanel + std::size_t(r);
      const std::uint8_t* p = r < count ? rows + std::size_t(r) * row_bytes + std::size_t(s) * Type::kBytes : nullptr;
      for (int g = 0; g < 8; ++g) {
        if (p) Type::codes(p, g, row_codes);
        put<Type::kBits>(p ? row_codes : zeros, codes + std::size_t(g) * kBlockBytes, r);
      }
      for (int i = 0; i < Type::kFactors; ++i) {
        const std::size_t sub = (std::size_t(s) * Type::kFactors + std::size_t(i)) * kPanel + std::size_t(r);
        sub_scales[sub] = p ? Type::factor(p, i) : std::int8_t(0);
        if (Type::kMinima && Type::kBits != 2) sub_minima[sub] = p ? Type::minimum_factor(p, i) : std::int8_t(0);
      }
      scales[at] = p ? f16_at(p + Type::kScale) : std::uint16_t(0);
      if (Type::kMinima) minima[at] = p ? std::uint16_t(f16_at(p + Type::kMinimum) ^ 0x8000) : std::uint16_t(0);  // it is subtracted
      if (!is_finite(scales[at]) || (Type::kMinima && !is_finite(minima[at]))) bad = r < bad ? r : bad;
    }
  return bad < kPanel ? bad : -1;
}

const BlockType kTypes[] = {
    {"Q4_0", 32, 18, {4, true, 32}, repack_simple<Q4_0>},
    {"Q4_1", 32, 20, {4, false, 32}, repack_simple<Q4_1>},
    {"Q5_0", 32, 22, {5, true, 32}, repack_simple<Q5_0>},
    {"Q5_1", 32, 24, {5, false, 32}, repack_simple<Q5_1>},
    {"Q8_0", 32, 34, {8, true, 32}, repack_simple<Q8_0>},
    {"IQ4_NL", 32, 18, {4, true, 32, 0, true}, repack_simple<IQ4_NL>},
    {"Q2_K", 256, 84, {2, false, 256, 16}, repack_k<Q2_K>},
    {"Q3_K", 256, 110, {3, true, 256, 16}, repack_k<Q3_K>},
    {"Q4_K", 256, 144, {4, false, 256, 32}, repack_k<WithMinima<4>>},
    {"Q5_K", 256, 176, {5, false, 256, 32}, repack_k<WithMinima<5>>},
    {"Q6_K", 256, 210, {6, true, 256, 16}, repack_k<Q6_K>},
};

}  // namespace

const BlockType& block_type(const std::string& name) {
  for (const BlockType& type : kTypes)
    if (name == type.name) return type;
  throw EngineFault("Blocks of the type '" + name + "' are not read here.");
}

}  // namespace trilemma
