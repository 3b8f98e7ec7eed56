// Attention of one KV head over the cache: tiles of 128 positions by the online softmax, in chunks of 512 that are summed
// apart and merged in ascending order, so that chunks may be summed by different threads.
//
// Rows (token, query head) go in blocks that walk the tiles together: all scores and weights of a tile first, then all
// values. A row's arithmetic does not depend on which rows came along: masked positions contribute exactly nothing, and
// a tile without any position of a row leaves that row untouched.
#pragma once

#include "attention_softmax.h"

namespace trilemma {
namespace {

// Rows of a block, and of a step inside it. Wide heads go in smaller blocks.
constexpr int kRows = 32, kStepRows = 8, kRowCells = 4096;

inline int block_rows(int padded_dim) {
  const int rows = kRowCells / padded_dim / kStepRows * kStepRows;
  return rows < kRows ? rows : kRows;
}

// Tokens ascend, and with them where a row's positions begin and end.
struct Rows {
  const float* q[kRows];
  float* out[kRows];
  int begin[kRows], end[kRows];  // positions attended to
  int count;
};

struct State {
  alignas(64) float out[kRowCells];
  RowState rows[kRows];

  void clear(int count, int padded_dim) {
    for (int r = 0; r < count; ++r) {
      rows[r].out = out + r * padded_dim;
      trilemma::clear(rows[r], padded_dim);
    }
  }
};

template <class Cache>
struct Scratch {
  alignas(64) typename Cache::Factor queries[kRowCells];
  alignas(64) typename Cache::Factor weights[kRows][kTile];
  alignas(64) float scores[kStepRows][kTile];
  const typename Cache::Factor* q[kRows];
  float factor[kRows];

  void round_queries(const KvView& kv, const Rows& rows) {
    const V16f log2e = set1(1.44269504088896341f);
    for (int r = 0; r < rows.count; ++r) {
      typename Cache::Factor* to = queries + r * kv.padded_dim;
      q[r] = to;
      for (int d = 0; d < kv.head_dim; d += 16) {
        const int n = kv.head_dim - d < 16 ? kv.head_dim - d : 16;
        Cache::round(mul(load_n(rows.q[r] + d, n), log2e), to + d);
      }
    }
  }
};

// The keys and values of one tile and head.
template <class Cache>
struct Tile {
  const typename Cache::Cell *k, *v;
  TileScales scale;
  int base;

  Tile(const KvView& kv, int head, int first) : base(first / kTile * kTile) {
    const size_t before = size_t(head) * size_t(kv.page);  // cells of earlier heads in a page
    const uint8_t* page = kv.pages[base / kTile];
    k = reinterpret_cast<const typename Cache::Cell*>(page + kv.k) + before * size_t(kv.key_dim);
    v = reinterpret_cast<const typename Cache::Cell*>(page + kv.v) + before * size_t(kv.padded_dim);
    if constexpr (Cache::kScaled)
      scale = {reinterpret_cast<const float*>(page + kv.k_scale) + before,
               reinterpret_cast<const float*>(page + kv.v_scale) + before};
  }
};

// The rows of one step that attend to any position of a tile, and their positions in it.
struct Step {
  int begin, end;  // rows
  Reach all{kTile, 0};

  Step(const Rows& rows, int from, int base, int last) : begin(from), end(from) {
    const int stop = from + kStepRows < rows.count ? from + kStepRows : rows.count;
    const int behind = base + kTile < last ? base + kTile : last;
    while (begin < stop && rows.end[begin] <= base) ++begin;
    for (end = begin; end < stop && rows.begin[end] < behind; ++end) {
      const Reach one = of_row(rows, end, base, behind);
      all.begin = one.begin < all.begin ? one.begin : all.begin;
      all.end = one.end > all.end ? one.end : all.end;
    }
  }
  static Reach of_row(const Rows& rows, int r, int base, int behind) {
    const int from = rows.begin[r] > base ? rows.begin[r] : base, to = rows.end[r] < behind ? rows.end[r] : behind;
    return {from - base, to - base};
  }
};

template <class Cache>
inline void weigh_tile(const KvView& kv, const Rows& rows, const Tile<Cache>& tile, int last, State& state,
                       Scratch<Cache>& scratch) {
  const int behind = tile.base + kTile < last ? tile.base + kTile : last;
  const KeyTile<Cache> keys{tile.k, kv.key_dim / Cache::kStep};
  for (int from = 0; from < rows.count; from += kStepRows) {
    const Step step(rows, from, tile.base, last);
    const int count = step.end - step.begin, begin = step.all.first(), end = step.all.last();
    if (count <= 0) continue;
    score_tile<Cache>(keys, begin, end, scratch.q + step.begin, scratch.scores, count);
    for (int r = step.begin; r < step.end; ++r)
      scratch.factor[r] =
          weigh<Cache>(scratch.scores[r - step.begin], Step::of_row(rows, r, tile.base, behind), begin, end, tile.scale,
                       state.rows[r], scratch.weights[r]);
  }
}

template <class Cache>
inline void add_values(const KvView& kv, const Rows& rows, const Tile<Cache>& tile, int last, State& state,
                       const Scratch<Cache>& scratch) {
  for (int from = 0; from < rows.count; from += kStepRows) {
    const Step step(rows, from, tile.base, last);
    const ValueTile<Cache> values{tile.v, kv.padded_dim, step.all.first() * 16 / Cache::kStep,
                                  step.all.end / Cache::kStep, step.all.end % Cache::kStep};
    for (int r = step.begin; r < step.end; r += kTileRows) {
      Mixing<Cache> mixing;
      const int count = step.end - r < kTileRows ? step.end - r : kTileRows;
      for (int i = 0; i < count; ++i) {
        mixing.weights[i] = scratch.weights[r + i];
        mixing.out[i] = state.rows[r + i].out;
        mixing.factor[i] = scratch.factor[r + i];
      }
      value_tile<Cache>(values, mixing, count);
    }
  }
}

// Positions [first, last) of one chunk, from a clear state.
template <class Cache>
inline void attend_chunk(const KvView& kv, int head, const Rows& rows, int first, int last, State& state,
                         Scratch<Cache>& scratch) {
  state.clear(rows.count, kv.padded_dim);
  for (int base = first / kTile * kTile; base < last; base += kTile) {
    const Tile<Cache> tile(kv, head, base);
    weigh_tile(kv, rows, tile, last, state, scratch);
    add_values(kv, rows, tile, last, state, scratch);
  }
}

// The positions that any row attends to, cut to one chunk.
inline bool span_of(const Rows& rows, int chunk, int& first, int& last) {
  first = rows.begin[0] > chunk * kKvChunk ? rows.begin[0] : chunk * kKvChunk;
  last = rows.end[rows.count - 1] < (chunk + 1) * kKvChunk ? rows.end[rows.count - 1] : (chunk + 1) * kKvChunk;
  return first < last;
}

inline void write_rows(const KvView& kv, const Rows& rows, const State& state) {
  for (int r = 0; r < rows.count; ++r) {
    const V16f total = set1(state.rows[r].total);
    for (int d = 0; d < kv.head_dim; d += 16) {
      const int n = kv.head_dim - d < 16 ? kv.head_dim - d : 16;
      store_n(rows.out[r] + d, div(load(state.rows[r].out + d), total), n);
    }
  }
}

template <class Cache>
inline void attend(const KvView& kv, int head, const Rows& rows, State& state, State& later, Scratch<Cache>& scratch) {
  int first, last, chunk = rows.begin[0] / kKvChunk;
  if (span_of(rows, chunk, first, last)) attend_chunk(kv, head, rows, first, last, state, scratch);
  while (span_of(rows, ++chunk, first, last)) {
    attend_chunk(kv, head, rows, first, last, later, scratch);
    for (int r = 0; r < rows.count; ++r) merge(state.rows[r], later.rows[r], kv.padded_dim);
  }
  write_rows(kv, rows, state);
}

// One chunk's sums of every row, for attention_merge.
template <class Cache>
inline void attend_partly(const KvView& kv, const AttentionTask& task, const Rows& rows, float* partial, State& state,
                          Scratch<Cache>& scratch) {
  int first, last;
  if (span_of(rows, task.chunk, first, last))
    attend_chunk(kv, task.kv_head, rows, first, last, state, scratch);
  else
    state.clear(rows.count, kv.padded_dim);
  for (int r = 0; r < rows.count; ++r, partial += kv.padded_dim + kPanel) {
    for (int d = 0; d < kv.padded_dim; d += 16) store(partial + d, load(state.rows[r].out + d));
    partial[kv.padded_dim] = state.rows[r].maximum;
    partial[kv.padded_dim + 1] = state.rows[r].total;
  }
}

// A block of a task's rows from `at` on.
inline Rows rows_of(const KvView& kv, const AttentionTask& task, int at) {
  Rows rows;
  const int most = block_rows(kv.padded_dim);
  rows.count = task.row_end - at < most ? task.row_end - at : most;
  for (int r = 0; r < rows.count; ++r) {
    const int token = (at + r) / task.group, member = (at + r) % task.group;
    const size_t head = size_t(member) * size_t(kv.head_dim);
    rows.q[r] = task.q + size_t(token) * task.ld_q + head;
    rows.out[r] = task.out + size_t(token) * task.ld_out + head;
    rows.end[r] = task.first_position + token + 1;
    rows.begin[r] = task.window && rows.end[r] > task.window ? rows.end[r] - task.window : 0;
  }
  return rows;
}

template <class Cache>
inline void attend_rows(const KvView& kv, const AttentionTask& task) {
  State state, later;
  Scratch<Cache> scratch;
  for (int at = task.row_begin; at < task.row_end; at += block_rows(kv.padded_dim)) {
    const Rows rows = rows_of(kv, task, at);
    scratch.round_queries(kv, rows);
    const size_t row = size_t(at - task.row_begin) * size_t(kv.padded_dim + kPanel);
    if (task.partial)
      attend_partly(kv, task, rows, task.partial + row, state, scratch);
    else
      attend(kv, task.kv_head, rows, state, later, scratch);
  }
}

void attention(const KvView& kv, const AttentionTask& task) {
  if (kv.type == kKvF32) attend_rows<CacheF32>(kv, task);
  if (kv.type == kKvBf16) attend_rows<CacheBf16>(kv, task);
  if (kv.type == kKvInt8) attend_rows<CacheInt8>(kv, task);
}

void attention_merge(const KvView& kv, const AttentionTask& task, int chunks, size_t stride) {
  State state;
  for (int at = task.row_begin; at < task.row_end; at += block_rows(kv.padded_dim)) {
    const Rows rows = rows_of(kv, task, at);
    const size_t width = size_t(kv.padded_dim + kPanel);
    for (int r = 0; r < rows.count; ++r) {
      float* partial = task.partial + (size_t(at - task.row_begin) + size_t(r)) * width;
      const auto chunk = [&](int c) {
        float* one = partial + size_t(c) * stride;
        return RowState{one, one[kv.padded_dim], one[kv.padded_dim + 1]};
      };
      RowState& row = state.rows[r];
      row = chunk(0);
      row.out = state.out + r * kv.padded_dim;
      for (int d = 0; d < kv.padded_dim; d += 16) store(row.out + d, load(partial + d));
      for (int c = 1; c < chunks; ++c) merge(row, chunk(c), kv.padded_dim);
    }
    write_rows(kv, rows, state);
  }
}

}  // namespace
}  // namespace trilemma
