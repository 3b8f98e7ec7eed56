#include "crc32.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace trilemma {
namespace {

constexpr std::uint32_t kPolynomial = 0xedb88320;  // reflected
constexpr int kSlices = 8;
using Tables = std::array<std::array<std::uint32_t, 256>, kSlices>;

constexpr Tables make_tables() {
  Tables t{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t c = i;
    for (int bit = 0; bit < 8; ++bit) c = c & 1 ? c >> 1 ^ kPolynomial : c >> 1;
    t[0][i] = c;
  }
  for (int s = 1; s < kSlices; ++s)
    for (size_t i = 0; i < 256; ++i) t[size_t(s)][i] = t[size_t(s) - 1][i] >> 8 ^ t[0][t[size_t(s) - 1][i] & 255];
  return t;
}

constexpr Tables kTables = make_tables();

// `state` is the register, without the inversions at both ends.
std::uint32_t by_tables(std::uint32_t state, const unsigned char* p, std::size_t n) {
  for (; n >= 8; n -= 8, p += 8) {
    std::uint32_t low, high;
    std::memcpy(&low, p, 4);
    std::memcpy(&high, p + 4, 4);
    low ^= state;
    state = kTables[7][low & 255] ^ kTables[6][low >> 8 & 255] ^ kTables[5][low >> 16 & 255] ^ kTables[4][low >> 24] ^
            kTables[3][high & 255] ^ kTables[2][high >> 8 & 255] ^ kTables[1][high >> 16 & 255] ^ kTables[0][high >> 24];
  }
  for (; n; --n, ++p) state = state >> 8 ^ kTables[0][(state ^ *p) & 255];
  return state;
}

#if defined(__x86_64__)
#define FOLDING __attribute__((target("pclmul,sse4.1")))

FOLDING inline __m128i at(const unsigned char* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

FOLDING inline __m128i fold(__m128i x, __m128i constants, __m128i next) {
  const __m128i low = _mm_clmulepi64_si128(x, constants, 0x00), high = _mm_clmulepi64_si128(x, constants, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

// Gopal et al., Fast CRC Computation for Generic Polynomials Using PCLMULQDQ (Intel, 2009), with the constants of this
// polynomial. n is a multiple of 16, at least 64.
FOLDING std::uint32_t by_folding(std::uint32_t state, const unsigned char* p, std::size_t n) {
  const __m128i by_64 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4), by_16 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
  const __m128i last = _mm_set_epi64x(0, 0x0163cd6124), barrett = _mm_set_epi64x(0x01f7011641, 0x01db710641);
  const __m128i even = _mm_setr_epi32(~0, 0, ~0, 0);
  __m128i a = _mm_xor_si128(at(p), _mm_cvtsi32_si128(int(state))), b = at(p + 16), c = at(p + 32), d = at(p + 48);
  for (p += 64, n -= 64; n >= 64; p += 64, n -= 64) {
    a = fold(a, by_64, at(p));
    b = fold(b, by_64, at(p + 16));
    c = fold(c, by_64, at(p + 32));
    d = fold(d, by_64, at(p + 48));
  }
  a = fold(fold(fold(a, by_16, b), by_16, c), by_16, d);
  for (; n >= 16; p += 16, n -= 16) a = fold(a, by_16, at(p));
  a = _mm_xor_si128(_mm_srli_si128(a, 8), _mm_clmulepi64_si128(a, by_16, 0x10));
  a = _mm_xor_si128(_mm_clmulepi64_si128(_mm_and_si128(a, even), last, 0x00), _mm_srli_si128(a, 4));
  __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(a, even), barrett, 0x10);
  quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, even), barrett, 0x00);
  return std::uint32_t(_mm_extract_epi32(_mm_xor_si128(a, quotient), 1));
}
#endif

// a * b modulo the polynomial, both reflected: the highest bit is x^0.
std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
  std::uint32_t product = 0;
  for (std::uint32_t bit = 0x80000000u; bit; bit >>= 1) {
    if (a & bit) product ^= b;
    b = b & 1 ? b >> 1 ^ kPolynomial : b >> 1;
  }
  return product;
}

}  // namespace

std::uint32_t crc32(const void* data, std::size_t bytes) {
  const auto* p = static_cast<const unsigned char*>(data);
  std::uint32_t state = ~0u;
#if defined(__x86_64__)
  static const bool folds = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  if (folds && bytes >= 64) {
    const std::size_t whole = bytes / 16 * 16;
    state = by_folding(state, p, whole);
    p += whole;
    bytes -= whole;
  }
#endif
  return ~by_tables(state, p, bytes);
}

std::uint32_t crc32_join(std::uint32_t a, std::uint32_t b, std::uint64_t bytes_of_b) {
  std::uint32_t power = 0x00800000u, shift = 0x80000000u;  // x^8, and x^0
  for (; bytes_of_b; bytes_of_b >>= 1, power = multiply(power, power))
    if (bytes_of_b & 1) shift = multiply(shift, power);
  return multiply(shift, a) ^ b;
}

}  // namespace trilemma
