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

// Rows of a block; wide heads go in smaller ones.
constexpr int kRows = 32, kRowCells = 4096;

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

// Queries, scores and weights of a block of rows.
template <class Cache>
struct Scratch {
  using Keys = typename Cache::Keys;
  using Values = typename Cache::Values;
  alignas(64) typename Keys::Factor queries[kRowCells * Keys::kFactors / Keys::kStep];
  alignas(64) typename Values::Factor factors[kRows][kTile * Values::kFactors / Values::kStep];
  alignas(64) float scores[kStepRows][kTile];
  typename Keys::Row q[kRows];
  typename Values::Row weights[kRows];
  Sums sums[kRows];

  void round_queries(const KvView& kv, const Rows& rows) {
    for (int r = 0; r < rows.count; ++r)
      round_query<Cache>(rows.q[r], kv.head_dim, queries + r * kv.padded_dim * Keys::kFactors / Keys::kStep, q[r]);
  }
};

// The keys and values of one tile and head.
template <class Cache>
struct Tile {
  const typename Cache::Keys::Cell* k;
  const typename Cache::Values::Cell* v;
  TileScales scale;
  int base;
  ptrdiff_t to_values, to_next;  // bytes, from keys to values to the next keys

  // `behind`: where the reading ends.
  Tile(const KvView& kv, int head, int first, int behind) : base(first / kTile * kTile) {
    const size_t before = size_t(head) * size_t(kv.page);  // cells of earlier heads in a page
    const uint8_t* page = kv.pages[base / kTile];
    k = reinterpret_cast<const typename Cache::Keys::Cell*>(page + kv.k) +
        before * size_t(kv.key_dim / Cache::Keys::kPacked);
    v = reinterpret_cast<const typename Cache::Values::Cell*>(page + kv.v) +
        before * size_t(kv.value_dim / Cache::Values::kPacked);
    if constexpr (Cache::kInteger)
      scale = {reinterpret_cast<const float*>(page + kv.k_scale) + before,
               reinterpret_cast<const float*>(page + kv.v_scale) + before};
    to_values = ptrdiff_t(uintptr_t(v) - uintptr_t(k));
    to_next = base + kTile < behind ? ptrdiff_t(uintptr_t(kv.pages[base / kTile + 1]) - uintptr_t(page)) - to_values : 0;
    if constexpr (Cache::kInteger)
      if (to_next) fetch_scales();
  }

 private:
  // Of the next tile.
  void fetch_scales() const {
    const ptrdiff_t page = to_values + to_next;
    for (int line = 0; line < kTile; line += 16) {
      fetch(behind(scale.k + line, page), 0);
      fetch(behind(scale.v + line, page), 0);
    }
  }
};

// The rows of one step that attend to any position of a tile, and their positions in it.
struct Step {
  int begin, end;  // rows
  Reach reach[kStepRows], all{kTile, 0};

  Step(const Rows& rows, int from, int base, int last) : begin(from), end(from) {
    const int stop = from + kStepRows < rows.count ? from + kStepRows : rows.count;
    const int behind = base + kTile < last ? base + kTile : last;
    while (begin < stop && rows.end[begin] <= base) ++begin;
    for (end = begin; end < stop && rows.begin[end] < behind; ++end) {
      const int first = rows.begin[end] > base ? rows.begin[end] : base;
      const int after = rows.end[end] < behind ? rows.end[end] : behind;
      reach[end - begin] = {first - base, after - base};
      all.begin = first - base < all.begin ? first - base : all.begin;
      all.end = after - base > all.end ? after - base : all.end;
    }
  }
  int count() const { return end - begin; }
};

template <class Cache>
inline void weigh_tile(const KvView& kv, const Rows& rows, const Tile<Cache>& tile, int last, State& state,
                       Scratch<Cache>& scratch) {
  const KeyTile<typename Cache::Keys> keys{tile.k, tile.to_values, kv.key_dim / Cache::Keys::kStep};
  for (int from = 0; from < rows.count; from += kStepRows) {
    const Step step(rows, from, tile.base, last);
    const int r = step.begin, begin = step.all.first(), end = step.all.last();
    if (step.count() == 0) continue;
    score_tile<typename Cache::Keys>(keys, begin, end, scratch.q + r, scratch.scores, step.count());
    Softmax<Cache> softmax{scratch.scores, step.reach, step.count(), begin, end, tile.scale, scratch.q + r,
                           state.rows + r, scratch.factors + r, scratch.weights + r, scratch.sums + r};
    softmax.run();
  }
}

template <class Cache>
inline void add_values(const KvView& kv, const Rows& rows, const Tile<Cache>& tile, int last,
                       const Scratch<Cache>& scratch) {
  using Values = typename Cache::Values;
  constexpr int step_cells = Values::kStep / Values::kPacked;
  const size_t stride = size_t(kv.value_dim * step_cells);
  for (int from = 0; from < rows.count; from += kStepRows) {
    const Step step(rows, from, tile.base, last);
    const ValueTile<Values> values{tile.v, tile.to_next, stride, kv.padded_dim, step.all.first() * 16 / Values::kStep,
                                   step.all.end / Values::kStep, step.all.end % Values::kStep};
    if (step.count() > 0)
      value_tile<Values>(values, scratch.weights + step.begin, scratch.sums + step.begin, step.count());
  }
}

// Positions [first, last) of one chunk, from a clear state; `behind`: where the chunks after it end.
template <class Cache>
inline void attend_chunk(const KvView& kv, int head, const Rows& rows, int first, int last, int behind, State& state,
                         Scratch<Cache>& scratch) {
  state.clear(rows.count, kv.padded_dim);
  for (int base = first / kTile * kTile; base < last; base += kTile) {
    const Tile<Cache> tile(kv, head, base, behind);
    weigh_tile(kv, rows, tile, last, state, scratch);
    add_values(kv, rows, tile, last, scratch);
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
    alignas(64) float out[kMaxHeadDim];
    for (int d = 0; d < kv.head_dim; d += 16) store(out + d, div(load(state.rows[r].out + d), total));
    if (kv.type == kKvInt4) mix_back(out, kv.head_dim);
    for (int d = 0; d < kv.head_dim; d += 16)
      store_n(rows.out[r] + d, load(out + d), kv.head_dim - d < 16 ? kv.head_dim - d : 16);
  }
}

template <class Cache>
inline void attend(const KvView& kv, int head, const Rows& rows, State& state, State& later, Scratch<Cache>& scratch) {
  const int behind = rows.end[rows.count - 1];
  int first, last, chunk = rows.begin[0] / kKvChunk;
  if (span_of(rows, chunk, first, last)) attend_chunk(kv, head, rows, first, last, behind, state, scratch);
  while (span_of(rows, ++chunk, first, last)) {
    attend_chunk(kv, head, rows, first, last, behind, later, scratch);
    for (int r = 0; r < rows.count; ++r) merge(state.rows[r], later.rows[r], kv.padded_dim);
  }
  write_rows(kv, rows, state);
}

// Sums of every row in each of the task's chunks, for attention_merge.
template <class Cache>
inline void attend_partly(const KvView& kv, const AttentionTask& task, const Rows& rows, float* partial, State& state,
                          Scratch<Cache>& scratch) {
  const int end = (task.chunk + task.chunks) * kKvChunk;
  const int behind = rows.end[rows.count - 1] < end ? rows.end[rows.count - 1] : end;
  for (int c = 0; c < task.chunks; ++c, partial += task.stride) {
    int first, last;
    if (span_of(rows, task.chunk + c, first, last))
      attend_chunk(kv, task.kv_head, rows, first, last, behind, state, scratch);
    else
      state.clear(rows.count, kv.padded_dim);
    float* row = partial;
    for (int r = 0; r < rows.count; ++r, row += kv.padded_dim + kPanel) {
      for (int d = 0; d < kv.padded_dim; d += 16) store(row + d, load(state.rows[r].out + d));
      row[kv.padded_dim] = state.rows[r].maximum;
      row[kv.padded_dim + 1] = state.rows[r].total;
    }
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
  if (kv.type == kKvInt4) attend_rows<CacheInt4>(kv, task);
}

void attention_merge(const KvView& kv, const AttentionTask& task, int chunks) {
  State state;
  for (int at = task.row_begin; at < task.row_end; at += block_rows(kv.padded_dim)) {
    const Rows rows = rows_of(kv, task, at);
    const size_t width = size_t(kv.padded_dim + kPanel);
    for (int r = 0; r < rows.count; ++r) {
      float* partial = task.partial + (size_t(at - task.row_begin) + size_t(r)) * width;
      const auto chunk = [&](int c) {
        float* one = partial + size_t(c) * task.stride;
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
