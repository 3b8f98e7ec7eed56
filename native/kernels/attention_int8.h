// Attention over an int8 cache by exact integer products.
//
// A query and a tile's softmax weights (times the values' scales) become codes of 15 bits, code = 128 * high + low with high in
// [-127, 127] and low in [0, 127], so that both halves multiply as bytes: at the rate of bf16, with the error of neither.
// Sums of 512 dimensions stay below 16256 * 128 * 512 = 1.07e9. All instruction sets compute the same integers.
#pragma once

#include "table.h"
#include "vmath.h"

namespace trilemma {
namespace {

constexpr float kCodeMost = 127.0f * 128.0f;

#if defined(TRILEMMA_SIMD_AVX512)
// Bytes: of every four codes four high halves, then four low ones. vpdpbusd multiplies unsigned with signed bytes: keys get
// 128 added, which the sums' start undoes; weights are unsigned as they are.
struct Int8Product {
  using Factor = int8_t;
  using Line = __m512i;
  struct Sum {
    __m512i high, low;
  };
  struct Row {
    Factor* factors;
    float scale;
    int32_t start_high, start_low;
  };
  using Cell = int8_t;
  static constexpr int kPacked = 1;
  static constexpr bool kOffset = false, kHalves = false;
  static constexpr int kStep = 4, kParts = 1, kFactors = 8, kSums = 2;

  static Line first_of(const int8_t* p, int count) {
    return _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32((1 << 8 * count) - 1));
  }
  static __m512i four(const Factor* p) {
    int32_t bytes;
    __builtin_memcpy(&bytes, p, 4);
    return _mm512_set1_epi32(bytes);
  }
  static V16f value(const Sum& sum, const Row& row) {
    const __m512i all = _mm512_add_epi32(_mm512_slli_epi32(sum.high, 7), sum.low);
    return mul({_mm512_cvtepi32_ps(all)}, set1(row.scale));
  }
  // Unsigned codes of the cache.
  static void add_codes(Sum& sum, const Line& line, const Factor* factor) {
    sum.high = _mm512_dpbusd_epi32(sum.high, line, four(factor));
    sum.low = _mm512_dpbusd_epi32(sum.low, line, four(factor + 4));
  }
  // Rounded to whole codes.
  static void store_codes(V16f codes, Factor* out) {
    const __m256i all = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(codes.v));
    const __m256i low = _mm256_and_si256(all, _mm256_set1_epi16(127));
    const __m256i eights = _mm256_packs_epi16(_mm256_srai_epi16(all, 7), low);
    _mm256_storeu_si256((__m256i*)out, _mm256_shuffle_epi32(eights, 0xd8));
  }
};

struct Int8Keys : Int8Product {
  template <int>
  static Line line(const int8_t* p) {
    return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(char(0x80)));
  }
  static void set_start(Row& row, int codes) {
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < codes; i += 16)
      sum = _mm256_dpbusd_epi32(sum, _mm256_set1_epi8(1), _mm256_loadu_si256((const __m256i*)(row.factors + 2 * i)));
    const __m512i both = _mm512_zextsi256_si512(sum);
    row.start_high = -128 * _mm512_mask_reduce_add_epi32(0x55, both);
    row.start_low = -128 * _mm512_mask_reduce_add_epi32(0xaa, both);
  }
  static Sum start(const Row& row) { return {_mm512_set1_epi32(row.start_high), _mm512_set1_epi32(row.start_low)}; }
  template <int>
  static void add(Sum& sum, const Line& line, const Factor* factor) {
    add_codes(sum, line, factor);
  }
};

struct Int8Values : Int8Product {
  template <int>
  static Line line(const int8_t* p) {
    return _mm512_loadu_si512(p);
  }
  static Sum start(const Row&) { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
  template <int>
  static void add(Sum& sum, const Line& line, const Factor* factor) {
    sum.high = _mm512_dpbusd_epi32(sum.high, four(factor), line);
    sum.low = _mm512_dpbusd_epi32(sum.low, four(factor + 4), line);
  }
};
#elif defined(TRILEMMA_SIMD_NEON)
// Bytes: of every four codes four high halves, then four low ones.
struct Int8Product {
  using Factor = int8_t;
  struct Line {
    int8x16_t q[4];
  };
  struct Sum {
    int32x4_t high[4], low[4];
  };
  struct Row {
    Factor* factors;
    float scale;
  };
  using Cell = int8_t;
  static constexpr int kPacked = 1;
  static constexpr bool kOffset = false, kHalves = false;
  static constexpr int kStep = 4, kParts = 1, kFactors = 8, kSums = 2;

  template <int>
  static Line line(const int8_t* p) {
    return {{vld1q_s8(p), vld1q_s8(p + 16), vld1q_s8(p + 32), vld1q_s8(p + 48)}};
  }
  static Line first_of(const int8_t* p, int count) {
    const int8x16_t mask = vreinterpretq_s8_s32(vdupq_n_s32((1 << 8 * count) - 1));
    Line l = line<0>(p);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) l.q[i] = vandq_s8(l.q[i], mask);
    return l;
  }
  static Sum start(const Row&) {
    Sum sum;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum.high[i] = sum.low[i] = vdupq_n_s32(0);
    return sum;
  }
  static int8x16_t four(const Factor* p) {
    int32_t bytes;
    __builtin_memcpy(&bytes, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(bytes));
  }
  template <int>
  static void add(Sum& sum, const Line& line, const Factor* factor) {
    add_codes(sum, line, factor);
  }
  static void add_codes(Sum& sum, const Line& line, const Factor* factor) {
    const int8x16_t high = four(factor), low = four(factor + 4);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      sum.high[i] = vdotq_s32(sum.high[i], line.q[i], high);
      sum.low[i] = vdotq_s32(sum.low[i], line.q[i], low);
    }
  }
  static V16f value(const Sum& sum, const Row& row) {
    V16f r;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) r.q[i] = vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(sum.high[i], 7), sum.low[i]));
    return mul(r, set1(row.scale));
  }
  static void store_codes(V16f codes, Factor* out) {
    for (int i = 0; i < 4; ++i) {
      const int32x4_t all = vcvtnq_s32_f32(codes.q[i]);
      const int16x4_t high = vmovn_s32(vshrq_n_s32(all, 7)), low = vmovn_s32(vandq_s32(all, vdupq_n_s32(127)));
      vst1_s8(out + 8 * i, vmovn_s16(vcombine_s16(high, low)));
    }
  }
};
struct Int8Keys : Int8Product {
  static void set_start(Row&, int) {}
};
struct Int8Values : Int8Product {};
#elif defined(TRILEMMA_SIMD_AVX2)
// Codes whole, as int16: without a dot product of bytes, pairs of words are the faster way.
struct Int8Product {
  using Factor = int16_t;
  struct Line {  // four positions each
    __m256i q[4];
  };
  using Sum = Line;  // two sums a position
  struct Row {
    Factor* factors;
    float scale;
  };
  using Cell = int8_t;
  static constexpr int kPacked = 1;
  static constexpr bool kOffset = false, kHalves = false;
  static constexpr int kStep = 4, kParts = 1, kFactors = 4, kSums = 2;

  template <int>
  static Line line(const int8_t* p) {
    return first_of(p, 4);
  }
  static Line first_of(const int8_t* p, int count) {
    const __m128i mask = _mm_set1_epi32(count == 4 ? -1 : (1 << 8 * count) - 1);
    Line l;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      l.q[i] = _mm256_cvtepi8_epi16(_mm_and_si128(_mm_loadu_si128((const __m128i*)(p + 16 * i)), mask));
    return l;
  }
  static Sum start(const Row&) {
    const __m256i none = _mm256_setzero_si256();
    return {{none, none, none, none}};
  }
  template <int>
  static void add(Sum& sum, const Line& line, const Factor* factor) {
    add_codes(sum, line, factor);
  }
  static void add_codes(Sum& sum, const Line& line, const Factor* factor) {
    long long four;
    __builtin_memcpy(&four, factor, 8);
    const __m256i codes = _mm256_set1_epi64x(four);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum.q[i] = _mm256_add_epi32(sum.q[i], _mm256_madd_epi16(line.q[i], codes));
  }
  static __m256 eight(__m256i a, __m256i b) {
    return _mm256_cvtepi32_ps(_mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xd8));
  }
  static V16f value(const Sum& sum, const Row& row) {
    return mul({eight(sum.q[0], sum.q[1]), eight(sum.q[2], sum.q[3])}, set1(row.scale));
  }
  static void store_codes(V16f codes, Factor* out) {
    _mm_storeu_si128((__m128i*)out, narrow_s16(codes.lo));
    _mm_storeu_si128((__m128i*)(out + 8), narrow_s16(codes.hi));
  }
};
struct Int8Keys : Int8Product {
  static void set_start(Row&, int) {}
};
struct Int8Values : Int8Product {};
#else
struct Int8Product {
  using Factor = int16_t;
  struct Line {
    int8_t v[16][4];
  };
  struct Sum {
    int32_t v[16];
  };
  struct Row {
    Factor* factors;
    float scale;
  };
  using Cell = int8_t;
  static constexpr int kPacked = 1;
  static constexpr bool kOffset = false, kHalves = false;
  static constexpr int kStep = 4, kParts = 1, kFactors = 4, kSums = 1;

  template <int>
  static Line line(const int8_t* p) {
    return first_of(p, 4);
  }
  static Line first_of(const int8_t* p, int count) {
    Line l = {};
    for (int i = 0; i < 16; ++i) memcpy(l.v[i], p + 4 * i, size_t(count));
    return l;
  }
  static Sum start(const Row&) { return {}; }
  template <int>
  static void add(Sum& sum, const Line& line, const Factor* factor) {
    add_codes(sum, line, factor);
  }
  static void add_codes(Sum& sum, const Line& line, const Factor* factor) {
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 4; ++j) sum.v[i] += int32_t(line.v[i][j]) * factor[j];
  }
  static V16f value(const Sum& sum, const Row& row) {
    V16f r;
    for (int i = 0; i < 16; ++i) r.v[i] = float(sum.v[i]);
    return mul(r, set1(row.scale));
  }
  static void store_codes(V16f codes, Factor* out) {
    const V16f whole = round_even(min(max(codes, set1(-kCodeMost)), set1(kCodeMost)));  // NaN has no integer
    for (int i = 0; i < 16; ++i) out[i] = int16_t(whole.v[i]);
  }
};
struct Int8Keys : Int8Product {
  static void set_start(Row&, int) {}
};
struct Int8Values : Int8Product {};
#endif

#if defined(TRILEMMA_SIMD_AMX)
// As the matrix unit reads them: rows of 64 codes, each with its high halves and then its low ones.
struct Int8Tiled : Int8Product {
  static void set_start(Row&, int) {}
  static V16f value(const int32_t* high, const int32_t* low, const Row& row) {
    return Int8Product::value({_mm512_loadu_si512(high), _mm512_loadu_si512(low)}, row);
  }
  static void store_codes(V16f codes, Factor* out) {
    const __m512i all = _mm512_cvtps_epi32(codes.v);
    _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8(_mm512_srai_epi32(all, 7)));
    _mm_storeu_si128((__m128i*)(out + 64), _mm512_cvtepi32_epi8(_mm512_and_si512(all, _mm512_set1_epi32(127))));
  }
};
#endif

// The scale of codes for values whose largest magnitude has these bits; a NaN comes through.
inline float code_scale(V16u peak) { return reduce_max_bits(peak) / kCodeMost; }
// Values too small for an inverse become zeros; with a scale of NaN codes are anything.
inline float code_inverse(float scale) { return scale < 1e-30f ? 0.0f : 1.0f / scale; }

}  // namespace
}  // namespace trilemma
