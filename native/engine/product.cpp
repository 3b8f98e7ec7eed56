#include "product.h"

#include <algorithm>

#include "thread_pool.h"

namespace trilemma {
namespace {

// Below both, sharing a job costs more than it saves.
constexpr double kSerialMacs = 180e3;
constexpr std::size_t kSerialBytes = 120 << 10;
// Multiplications of an item of the first round, at least.
constexpr double kItemMacs = 1e6;
constexpr int kMostRounds = 3;
constexpr long long kLeftOver = 4;  // a round leaves one part in so many to the next
// Weights that should stay in L2 while tiles of tokens walk over them.
constexpr std::size_t kCachedBytes = 256 << 10;
// Above so many tokens products do not wait for weights.
constexpr int kForeseenTokens = 8;

// Whether an input of so many rows is multiplied in tiles, which need room to work in.
bool in_tiles(const Kernels& kernels, int rows) { return kernels.workspace_bytes && rows >= kTokenTile; }

// The input with that room, this thread's.
template <class Input>
Input with_workspace(const Kernels& kernels, Input input, int rows) {
  if (!in_tiles(kernels, rows)) return input;
  thread_local AlignedBuffer room;
  if (room.bytes() < kernels.workspace_bytes) room = AlignedBuffer(kernels.workspace_bytes);
  input.workspace = room.data();
  return input;
}

void run_panels(const Kernels& kernels, const ProductInput& input, const Product& p, int begin, int end) {
  const Matrix& w = *p.linear->weight;
  const Output out{p.y, p.ld, p.linear->bias, p.accumulate};
  const bool rounded = w.activation() == Activation::kBf16;
  const Bf16Kernels* bf16 = rounded ? kernels.bf16 : nullptr;
  const int rows = input.rows(p.part);
  switch (w.layout()) {
    case Matrix::Layout::kRows:
      return kernels.matmul_plain(w.plain_view(), input.floats(p.part, rounded), rows, begin, end, out);
    case Matrix::Layout::kPairs:
      if (bf16) return bf16->matmul_pairs(w.pair_view(), input.bf16(p.part), rows, begin, end, out);
      return kernels.matmul_pairs(w.pair_view(), input.floats(p.part, rounded), rows, begin, end, out);
    case Matrix::Layout::kPanels:
      if (w.activation() == Activation::kInt8)
        return kernels.matmul_int8(w.packed_view(), with_workspace(kernels, input.int8(p.part, w.grid().shares_row_scale()), rows),
                                   rows, begin, end, out);
      if (bf16)
        return bf16->matmul_packed(w.packed_view(), with_workspace(kernels, input.bf16(p.part), rows), input.bf16_sums(p.part),
                                   rows, begin, end, out);
      return kernels.matmul_float(w.packed_view(), input.floats(p.part, rounded), rows, begin, end, out);
  }
}

// Of many tokens, as many panels as stay in L2 while tiles of tokens walk over them; kernels with a workspace see to that.
int panels_at_once(const Kernels& kernels, const Matrix& w, int tokens) {
  if (tokens == 1 || in_tiles(kernels, tokens)) return w.panels();
  const std::size_t panel_bytes = w.bytes() / std::size_t(w.panels()) + 1;
  return std::clamp(int(kCachedBytes / panel_bytes), 1, w.panels());
}

// Where item `i` of threads * (rounds + 1) begins among `work` units. Rounds share out three quarters of what is left,
// the last one all of it: few items, as threads hold each other up when they take one, and small ones at the end, so that
// whoever is slower or came late keeps nobody waiting long. The first items are the same in each step, so that the
// weights that a thread reads can stay in its own caches.
long long begin_of(int i, long long work, int threads, int rounds) {
  const int round = i / threads;
  if (round > rounds) return work;
  long long left = work;
  for (int r = 0; r < round; ++r) left /= kLeftOver;
  const long long shared = round < rounds ? left - left / kLeftOver : left;
  return work - left + shared * (i % threads) / threads;
}

// [begin, end) of all panels x tokens, product after product; boundaries inside a panel move to its start.
void run_range(const Kernels& kernels, const ProductInput& input, std::span<const Product> products, long long begin,
               long long end) {
  for (const Product& p : products) {
    const Matrix& w = *p.linear->weight;
    const int tokens = input.rows(p.part), most = panels_at_once(kernels, w, tokens);
    const auto panel = [&](long long at) { return int(std::clamp<long long>(at / tokens, 0, w.panels())); };
    for (int first = panel(begin), last = panel(end); first < last; first += most)
      run_panels(kernels, input, p, first, std::min(first + most, last));
    begin -= static_cast<long long>(w.panels()) * tokens;
    end -= static_cast<long long>(w.panels()) * tokens;
  }
}

// Where each thread begins to read, if it takes the item of its number.
NextReads first_reads(const Kernels& kernels, std::span<const Product> products, const ProductInput& input, long long work,
                      int threads, int rounds) {
  NextReads reads;
  for (int thread = 0; thread < std::min(threads, int(reads.size())); ++thread) {
    long long begin = begin_of(thread, work, threads, rounds), end = begin_of(thread + 1, work, threads, rounds);
    for (const Product& p : products) {
      const Matrix& w = *p.linear->weight;
      const int tokens = input.rows(p.part), first = int(begin / tokens);
      if (first < w.panels()) {
        const int panels = int(std::min<long long>(end / tokens, w.panels())) - first;
        reads[size_t(thread)] = first_read(w, first, panels, kernels.fetched_bytes);
        break;
      }
      begin -= static_cast<long long>(w.panels()) * tokens;
      end -= static_cast<long long>(w.panels()) * tokens;
    }
  }
  return reads;
}

// Rows of the forms in tiles: above one tile the last one is as wide as the others.
size_t tiled_rows(int rows) { return rows > kTokenTile ? round_up(size_t(rows), kTokenTile) : size_t(rows); }

}  // namespace

void InputForms::add(Activation activation, Matrix::Layout layout, const Grid& grid) {
  const bool b = activation == Activation::kBf16;
  const bool asymmetric = layout == Matrix::Layout::kPanels && !grid.symmetric;
  (layout == Matrix::Layout::kRows ? bf16_rows : bf16) |= b;
  if (activation != Activation::kInt8) {
    if (asymmetric) (b ? bf16_sums : sums) = true;
    return;
  }
  int8[grid.shares_row_scale()].add(grid);
}

void InputForms::add(const Linear& linear) {
  if (const Matrix* w = linear.weight) add(w->activation(), w->layout(), w->grid());
  if (linear.low_rank) add(linear.low_rank->a);
}

void InputForms::add(const LayerWeights& layer) {
  layer.each_linear([&](const Linear& l) {
    add(l);
    if (l.low_rank) add(l.low_rank->b);
  });
}

ProductInput::Sizes ProductInput::sizes_of(const Kernels& kernels, const InputForms& forms, int columns, int rows,
                                            bool split) {
  const size_t blocks = round_up(size_t(columns), kBlock) / kBlock, n = size_t(rows);
  // Parts of 17 rows and more are rounded up to whole tiles: at worst nearly twice the rows.
  const size_t cells = (split ? 2 * n : tiled_rows(rows)) * blocks;
  Sizes sizes;
  if (forms.rounds_rows(kernels)) sizes.bf16_rows = n * blocks * kBlock * 4;
  if (forms.rounds_tiles(kernels)) sizes.bf16_tiles = cells * kBlock * 2;
  if (forms.sums) sizes.sums = n * blocks * 8;
  if (forms.bf16_sums) sizes.bf16_sums = n * blocks * 8;
  sizes.cells = cells;
  return sizes;
}

void ProductInput::reserve(const Kernels& kernels, const InputForms& forms, int columns, int rows, bool split) {
  const Sizes sizes = sizes_of(kernels, forms, columns, rows, split);
  bf16_rows_ = AlignedBuffer(sizes.bf16_rows);
  bf16_tiles_ = AlignedBuffer(sizes.bf16_tiles);
  sums_ = AlignedBuffer(sizes.sums);
  bf16_sums_ = AlignedBuffer(sizes.bf16_sums);
  for (int i = 0; i < 2; ++i) int8_[i].reserve(forms.int8[i], sizes.cells, size_t(rows));
}

std::size_t ProductInput::bytes_of(const Kernels& kernels, const InputForms& forms, int columns, int rows, bool split) {
  const Sizes sizes = sizes_of(kernels, forms, columns, rows, split);
  std::size_t total = sizes.total();
  for (const bool shared : {false, true}) 
    total += Int8Form(shared).bytes_of(forms.int8[shared], sizes.cells, size_t(rows));
  return total;
}

std::size_t ProductInput::bytes() const {
  std::size_t total = 0;
  for (const AlignedBuffer* b : {&bf16_rows_, &bf16_tiles_, &sums_, &bf16_sums_}) total += b->bytes();
  for (const Int8Form& form : int8_) total += form.bytes();
  return total;
}

void ProductInput::begin(const InputForms& forms, float* x, int columns, std::span<const int> rows_of_parts) {
  forms_ = forms;
  x_ = x;
  columns_ = columns;
  ld_ = int(round_up(size_t(columns), kBlock));
  parts_.clear();
  const size_t blocks = size_t(ld_ / kBlock);
  size_t cell = 0;
  int first = 0;
  for (const int rows : rows_of_parts) {
    const int width = std::min(rows, int(kTokenTile));
    Bf16Input bf16{};
    if (bf16_tiles_.data()) bf16 = {bf16_tiles_.as<uint16_t>() + cell * kBlock, width, int(blocks)};
    const auto int8 = [&](int i) { return int8_[i].view(forms.int8[i], cell, size_t(first), width, int(blocks)); };
    parts_.push_back({first, rows, {int8(0), int8(1)}, bf16});
    first += rows;
    cell += tiled_rows(rows) * blocks;
  }
}

void ProductInput::prepare(const Kernels& kernels, int row) const {
  const size_t at = size_t(row) * size_t(ld_), blocks = size_t(ld_ / kBlock);
  float* x = x_ + at;
  kernels.pad_row(x, columns_);
  if (forms_.sums) kernels.half_sums(x, int(blocks), sums_.as<float>() + size_t(row) * blocks * 2);
  const auto later = [](int r, const Part& p) { return r < p.first; };
  const Part& part = *(std::upper_bound(parts_.begin(), parts_.end(), row, later) - 1);
  float* sums = forms_.bf16_sums ? bf16_sums_.as<float>() + size_t(row) * blocks * 2 : nullptr;
  if (forms_.rounds_rows(kernels)) {
    float* rounded = bf16_rows_.as<float>() + at;
    kernels.round_bf16(x, ld_, rounded);
    if (sums) kernels.half_sums(rounded, int(blocks), sums);
  }
  if (forms_.rounds_tiles(kernels)) kernels.bf16->round(x, row - part.first, part.bf16, sums);
  for (const Int8Input& int8 : part.int8)
    if (int8.codes) kernels.quantize_int8(x, row - part.first, int8);
}

const float* ProductInput::bf16_sums(int part) const {
  if (!bf16_sums_.data()) return nullptr;
  return bf16_sums_.as<float>() + size_t(parts_[size_t(part)].first) * size_t(ld_ / kBlock * 2);
}

FloatInput ProductInput::floats(int part, bool rounded) const {
  const size_t first = size_t(parts_[size_t(part)].first), at = first * size_t(ld_);
  const size_t half = first * size_t(ld_ / kBlock * 2);
  if (rounded) return {bf16_rows_.as<float>() + at, size_t(ld_), bf16_sums(part)};
  return {x_ + at, size_t(ld_), sums_.data() ? sums_.as<float>() + half : nullptr};
}

void multiply(const Kernels& kernels, int threads, const ProductInput& input, std::span<const Product> products,
              Foresight* foresight) {
  long long work = 0;  // panels x tokens
  double macs = 0;
  std::size_t bytes = 0;
  for (const Product& p : products) {
    const Matrix& w = *p.linear->weight;
    work += static_cast<long long>(w.panels()) * input.rows(p.part);
    macs += double(w.rows()) * w.cols() * input.rows(p.part);
    bytes += w.bytes();
  }
  if (macs < kSerialMacs && bytes < kSerialBytes) threads = 1;
  int rounds = 0;
  while (threads > 1 && rounds < kMostRounds && macs / threads / (2 << rounds) > kItemMacs) ++rounds;
  const NextReads* next = nullptr;
  if (foresight && kernels.fetched_bytes && input.rows(products[0].part) <= kForeseenTokens)
    next = foresight->after(products[0].linear,
                            [&] { return first_reads(kernels, products, input, work, threads, rounds); });
  const auto task = [&](int item) {
    run_range(kernels, input, products, begin_of(item, work, threads, rounds),
              begin_of(item + 1, work, threads, rounds));
  };
  ThreadPool::instance().run(threads, threads * (rounds + 1), task, next);
}

}  // namespace trilemma
