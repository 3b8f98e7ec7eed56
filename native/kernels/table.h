// The function table of one instruction set, and the plain records its kernels read.
//
// This header is included by translation units that are compiled for instruction sets the host may lack.
// It therefore holds only plain structs: no inline functions with external linkage, no std templates.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace trilemma {

enum Dtype : int { kF32 = 0, kF16 = 1, kBf16 = 2 };
enum KvType : int { kKvF32 = 0, kKvBf16 = 1, kKvInt8 = 2, kKvInt4 = 3 };
enum Nonlinearity : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

// All matrices are walked in panels of 16 rows and columns in blocks of 32.
enum : int { kPanel = 16, kBlock = 32, kTokenTile = 16, kKvTile = 16, kMaxHeadDim = 512 };
// Positions of a page of the KV cache at most, and of a step of attention.
enum : int { kKvPage = 128 };
// Positions whose attention is summed apart and merged in ascending order, whoever sums them.
enum : int { kKvChunk = 512 };

// rows.v1: row-major, unpadded.
struct PlainView {
  const void* data;
  Dtype dtype;
  int rows, cols;
};

// panel16.v1 to panel16.v3: see docs of engine/matrix.h for the exact byte order.
struct PackedView {
  const uint8_t* codes;
  const uint16_t* scales;  // f16 [panel][group][16]
  const uint16_t* minima;  // the same, or null when symmetric
  int rows, cols;
  int blocks;        // columns padded to 32, / 32
  int group_blocks;  // blocks that share an f16 scale
  int groups;
  int bits;  // 2, 3, 4, 5, 6 or 8
  // Two levels: what every `sub_group` columns (32 or 16) multiply their group's scale and minimum with; null where the
  // f16 values stand alone, which hold for 16 columns where `sub_group` is 16 nevertheless.
  int sub_group;
  const int8_t* sub_scales;  // [panel][padded columns / sub_group][16]; 2 bits: scale | minimum << 4, both below 16
  const int8_t* sub_minima;
  int codebook;  // 1: codes are numbers of values in kCodebook
};

// Values of 4-bit codes that are not evenly spaced: those of GGUF's IQ4_NL.
constexpr int8_t kCodebook[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// pairs16.v1: bf16 in panels of 16 rows; per 2 columns one 64-byte line, lane r holds columns k (low half) and k+1 of
// row r. Columns are padded to 32, rows to 16, with zeros.
struct PairView {
  const uint16_t* pairs;
  int rows, cols;
  int blocks;  // columns padded to 32, / 32
};

// Where accumulators start, so that the offset of weights that are multiplied unsigned is undone: -offset * sum of codes,
// of whole blocks or of their columns 0-15 and 16-31. Where the block's scale is 2^-e, the bits of 1.5 * 2^(23 - e) are added: the
// accumulator is then, read as a float, 2^-e * (1.5 * 2^23 + sum), and no conversion is needed.
enum Int8Start : int {
  kStart0, kStart4, kStart8, kStart16, kStart32, kStart128, kStart4Low, kStart4High, kStart32Low, kStart32High, kStarts
};

// Weights of at most this many bits take int8 inputs whose blocks have powers of two of their row's scale (at least
// 2^-kMaxShift): few bits lose far more than that costs, and the products are faster by it.
enum : int { kSharedScaleBits = 5, kMaxShift = 30 };

// Activations quantized to int8, in tiles of `width` = min(16, tokens) tokens: codes [tile][block][width][32]; the other
// arrays [tile][block][width]. Null is what no matrix of this input asks for.
struct Int8Input {
  int8_t* codes;
  // Null: `scale` is absmax / 127 of the block. Else this is absmax / 127 of the row, [token], and `scale` the least 2^-e
  // (e <= kMaxShift) that leaves the block's absmax within 127 codes.
  float* row_scale;
  float* scale;
  float* base;   // with `row_scale`: -1.5 * 2^23 * scale, which takes away what such an accumulator has too much; else null
  float* sum;    // scale * sum of codes: what a group's minimum is multiplied with
  float* half_sum[2];  // the same of columns 0-15 and 16-31
  int32_t* start[kStarts];
  int width;
  int blocks;
  void* workspace;  // this thread's, for kernels with `workspace_bytes`; without it they are slower
};

// Activations rounded to bf16, in the same tiles: [tile][block][width][32].
struct Bf16Input {
  uint16_t* codes;
  int width;
  int blocks;
  void* workspace = nullptr;  // this thread's, for kernels with `workspace_bytes`; without it they are slower
};

// Float activations, rows padded with zeros to `ld` (a multiple of 32).
struct FloatInput {
  const float* x;
  size_t ld;
  const float* sums;  // [token][ld/16] sums of half blocks; only needed by asymmetric weights
};

// y[token * ld + row] = product (+ bias[row]) (+ the old y when `accumulate`).
struct Output {
  float* y;
  size_t ld;
  const float* bias;
  int accumulate;
};

// One layer's cache of one sequence: page p holds positions [p * page, (p + 1) * page) of every layer, this one's at the
// offsets given. With `step` values a lane (f32: 1, bf16: 2, int8: 4), K is [head][tile of 16 positions][key_dim / step][16][step] in a
// page, so that a vector holds 16 positions and no dot product needs a horizontal sum; V is
// [head][position / step][padded_dim][step]. Keys beyond head_dim are zeros; positions beyond the last are anything.
// int4 has two codes a byte, the first one low: K is [key_dim / 8][16][4] bytes of dimensions j and j + 4, V is
// [position / 4][value_dim / 32][16][4] bytes of dimensions d and d + 16; what is beyond head_dim multiplies zeros.
struct KvView {
  uint8_t* const* pages;
  size_t k, v;              // bytes from a page's start
  size_t k_scale, v_scale;  // [head][position]: int8 f32, int4 bf16 scale (low half) and minimum
  KvType type;
  int head_dim;
  int key_dim;     // head_dim padded to whole steps
  int padded_dim;  // head_dim padded to 16
  int value_dim;   // what V has room for: padded_dim, int4: padded to 32
  int page;  // positions, a multiple of 16; kKvPage where there is more than one page
};

// How many rows of attention walk over the cache together; wide heads go in smaller blocks.
constexpr int kAttentionRows = 32, kAttentionCells = 4096;
constexpr int attention_rows(int padded_dim) {
  const int rows = kAttentionCells / padded_dim / 8 * 8;
  return rows < kAttentionRows ? rows : kAttentionRows;
}

// Rows of attention are (token, query head) pairs of some KV heads, flattened token-first; of several KV heads for one token
// and at most attention_rows of them.
struct AttentionTask {
  const float* q;  // of the first token and the first head of the group, already scaled
  float* out;
  size_t ld_q, ld_out;   // floats between tokens
  int group;             // query heads of these KV heads
  int kv_head, kv_heads;  // the first, and how many
  int row_begin, row_end;
  int first_position;  // of token 0
  int window;          // 0: unlimited
  // Not null: what each of `chunks` chunks from number `chunk` on adds goes there instead of `out`, `stride` floats apart:
  // of each row padded_dim sums, then the largest score and the total weight, padded_dim + 16 floats a row.
  float* partial;
  int chunk, chunks;
  size_t stride;
};


// Products of bf16 inputs by the processor's own instruction. `sums` holds the sums of rounded half blocks that
// asymmetric codes need, [token][block][2], or null.
struct Bf16Kernels {
  void (*round)(const float* x, int token, const Bf16Input& out, float* sums);
  void (*matmul_pairs)(const PairView& w, const Bf16Input& x, int tokens, int begin, int end, const Output& out);
  void (*matmul_packed)(const PackedView& w, const Bf16Input& x, const float* sums, int tokens, int begin, int end,
                        const Output& out);
};

struct Kernels {
  const char* name;
  size_t fetched_bytes;  // of weights that a waiting thread brings nearer, where that was measured to help; else 0
  size_t workspace_bytes;  // that matmul_int8 and matmul_packed use for whole tiles of tokens, aligned to 64; 0: none
  // (x - mean) / rms * weight + bias, without the mean for rms_norm. `bias` may be null; `out` may be `x`.
  void (*rms_norm)(const float* x, const float* weight, const float* bias, int n, float eps, float* out);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, int n, float eps, float* out);
  void (*add_scaled)(float* x, const float* y, float scale, int n);  // x += scale * y, one fma each
  void (*exp_row)(float* x, int n, float shift);                     // x = e^(x - shift)
  // Zeroes row[k, ceil32(k)): every kernel may read whole blocks.
  void (*pad_row)(float* row, int k);
  void (*round_bf16)(const float* x, int padded_k, float* out);
  void (*half_sums)(const float* x, int blocks, float* sums);  // [block][2]
  void (*quantize_int8)(const float* x, int token, const Int8Input& out);
  // Rotates `heads` vectors in place, rotate-half order, then multiplies all of each head by `scale`.
  void (*rope)(float* x, int heads, int head_dim, int rotary_half, const float* cos, const float* sin, float scale);
  void (*glu)(float* gate, const float* up, int n, Nonlinearity kind);  // gate = f(gate) * up; up may be null
  void (*kv_store)(const KvView& kv, const float* k, const float* v, int heads, int position);
  void (*attention)(const KvView& kv, const AttentionTask& task);
  // Merges the partial sums of `chunks` chunks, from task.partial on, into `out`.
  void (*attention_merge)(const KvView& kv, const AttentionTask& task, int chunks);
  // Panels [begin, end) of 16 rows, all tokens.
  void (*matmul_plain)(const PlainView& w, const FloatInput& x, int tokens, int begin, int end, const Output& out);
  void (*matmul_pairs)(const PairView& w, const FloatInput& x, int tokens, int begin, int end, const Output& out);
  void (*matmul_float)(const PackedView& w, const FloatInput& x, int tokens, int begin, int end, const Output& out);
  void (*matmul_int8)(const PackedView& w, const Int8Input& x, int tokens, int begin, int end, const Output& out);
  // Null where the instruction set multiplies no bf16: rows of f32 rounded to bf16 take their place.
  const Bf16Kernels* bf16;
};

extern const Kernels kernels_scalar;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avxvnni;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;
extern const Kernels kernels_amx;
extern const Kernels kernels_neon;

}  // namespace trilemma
