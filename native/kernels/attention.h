// Attention of one KV head over the cache: tiles of 128 positions by the online softmax, in chunks of 512 that are summed
// apart and merged in ascending order, so that chunks may be summed by different threads.
//
// Rows (token, query head) go in blocks that walk the tiles together: all scores and weights of a tile first, then all
// values. A row's arithmetic does not depend on which rows came along: masked positions contribute exactly nothing, and
// a tile without any position of a row leaves that row untouched.
#pragma once

#include "attention_softmax.h"
#if defined(TRILEMMA_SIMD_AMX)
#include "attention_tiles.h"
#endif

namespace trilemma {
namespace {

// Tokens ascend, and with them where a row's positions begin and end. Those of several heads are of one token.
struct Rows {
  const float* q[kRows];
  float* out[kRows];
  int begin[kRows], end[kRows];  // positions attended to
  int count, heads;

  int of_head() const { return count / heads; }
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
  alignas(64) typename Keys::Factor queries[Layout<Keys>::kRoom];
  alignas(64) typename Values::Factor factors[kRows * kTile * Values::kFactors / Values::kStep];
  alignas(64) float scores[16][kTile];  // what a matrix unit writes at once
  typename Keys::Row q[kRows];
  typename Values::Row weights[kRows];
  Sums sums[kRows];

  void round_queries(const KvView& kv, const Rows& rows) {
    for (int r = 0; r < rows.count; ++r) {
      q[r].factors = Layout<Keys>::row(queries, r, kv.padded_dim);
      weights[r].factors = Layout<Values>::row(factors, r, kTile);
      round_query<Cache>(rows.q[r], kv.head_dim, q[r]);
    }
  }
};

// The keys and values of one tile and head.
template <class Cache>
struct Tile {
  const typename Cache::Keys::Cell* k;
  const typename Cache::Values::Cell* v;
  TileScales scale;
  int base;
  ptrdiff_t to_values, to_next = 0;  // bytes, from keys to values to the next keys

  Tile(const KvView& kv, int head, int first) : base(first / kTile * kTile) {
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
  }

  // What is read behind it, whose scales are fetched at once.
  void then(const Tile& next) {
    to_next = ptrdiff_t(uintptr_t(next.k) - uintptr_t(v));
    if constexpr (Cache::kInteger)
      for (int at = 0; at < kTile; at += 16) {
        fetch(next.scale.k + at, 0);
        fetch(next.scale.v + at, 0);
      }
  }
};

// The rows of one step that attend to any position of a tile, and their positions in it.
template <class Layout>
struct Step {
  int begin, end;  // rows
  StepRows rows;
  Reach reach[Layout::kStepRows], all{kTile, 0};

  static int most(const Rows& rows) { return rows.of_head() < Layout::kStepRows ? rows.of_head() : Layout::kStepRows; }

  // Rows from number `from` on, of a head whose rows end at `of_head`.
  Step(const Rows& block, int from, int of_head, int base, int last) : begin(from), end(from) {
    const int stop = from + most(block) < of_head ? from + most(block) : of_head;
    const int behind = base + kTile < last ? base + kTile : last;
    while (begin < stop && block.end[begin] <= base) ++begin;
    for (end = begin; end < stop && block.begin[end] < behind; ++end) {
      const int first = block.begin[end] > base ? block.begin[end] : base;
      const int after = block.end[end] < behind ? block.end[end] : behind;
      reach[end - begin] = {first - base, after - base};
      all.begin = first - base < all.begin ? first - base : all.begin;
      all.end = after - base > all.end ? after - base : all.end;
    }
    const int first = from + most(block) <= of_head ? from : of_head - most(block);
    rows = {end - begin, begin - first, most(block)};
  }
  // The positions rounded to those that weights are multiplied with at once.
  int whole_begin() const { return all.begin / Layout::kPositions * Layout::kPositions; }
  int whole_end() const { return (all.end + Layout::kPositions - 1) / Layout::kPositions * Layout::kPositions; }
};
template <class Cache>
using StepOf = Step<Layout<typename Cache::Values>>;

template <class Cache>
inline void weigh_tile(const KvView& kv, const Rows& rows, int row, const Tile<Cache>& tile, int last, State& state,
                       Scratch<Cache>& scratch) {
  const KeyTile<typename Cache::Keys> keys{tile.k, tile.to_values, kv.key_dim / Cache::Keys::kStep};
  NextRun<typename Cache::Values> next(tile.v, size_t(kTile * kv.value_dim) * sizeof(*tile.v) / Cache::Values::kPacked);
  const int stop = row + rows.of_head();
  for (int from = row; from < stop; from += Layout<typename Cache::Values>::kStepRows) {
    const StepOf<Cache> step(rows, from, stop, tile.base, last);
    const int r = step.begin;
    if (step.rows.count == 0) continue;
    float(*scores)[kTile] = scratch.scores + step.rows.before;
    score_tile(keys, step.all.first(), step.all.last(), scratch.q + r, scores, step.rows, next);
    Softmax<Cache> softmax{scores, step.reach, step.rows.count, step.whole_begin(), step.whole_end(), tile.scale,
                           scratch.q + r, state.rows + r, scratch.weights + r, scratch.sums + r, next};
    softmax.run();
  }
}

template <class Cache>
inline void add_values(const KvView& kv, const Rows& rows, int row, const Tile<Cache>& tile, int last,
                       const Scratch<Cache>& scratch) {
  using Values = typename Cache::Values;
  constexpr int step_cells = Values::kStep / Values::kPacked;
  const size_t stride = size_t(kv.value_dim * step_cells);
  NextRun<Values> next(behind(tile.v, tile.to_next), size_t(kTile * kv.key_dim) * sizeof(*tile.k) / Cache::Keys::kPacked);
  const int stop = row + rows.of_head();
  for (int from = row; from < stop; from += Layout<Values>::kStepRows) {
    const StepOf<Cache> step(rows, from, stop, tile.base, last);
    const ValueTile<Values> values{tile.v, tile.to_next, stride, kv.padded_dim, step.whole_begin() / Values::kStep,
                                   step.all.end / Values::kStep, step.all.end % Values::kStep};
    if (step.rows.count > 0) value_tile(values, scratch.weights + step.begin, scratch.sums + step.begin, step.rows, next);
  }
}

// Positions [first, last) of one chunk, from a clear state; `behind`: where the chunks after it end. Heads go side by side, as
// they lie in a page.
template <class Cache>
inline void attend_chunk(const KvView& kv, int head, const Rows& rows, int first, int last, int behind, State& state,
                         Scratch<Cache>& scratch) {
  state.clear(rows.count, kv.padded_dim);
  for (int base = first / kTile * kTile; base < last; base += kTile)
    for (int h = 0; h < rows.heads; ++h) {
      Tile<Cache> tile(kv, head + h, base);
      if (h + 1 < rows.heads)
        tile.then({kv, head + h + 1, base});
      else if (base + kTile < behind)
        tile.then({kv, head, base + kTile});
      weigh_tile(kv, rows, h * rows.of_head(), tile, last, state, scratch);
      add_values(kv, rows, h * rows.of_head(), tile, last, scratch);
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
  const int most = attention_rows(kv.padded_dim);
  rows.heads = task.kv_heads;
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
  for (int at = task.row_begin; at < task.row_end; at += attention_rows(kv.padded_dim)) {
    const Rows rows = rows_of(kv, task, at);
    scratch.round_queries(kv, rows);
    const Shapes<typename Cache::Keys> shapes(StepOf<Cache>::most(rows), kv.key_dim / Cache::Keys::kStep);
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
  for (int at = task.row_begin; at < task.row_end; at += attention_rows(kv.padded_dim)) {
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
