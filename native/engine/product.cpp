#include "product.h"

#include <algorithm>

#include "thread_pool.h"

namespace trilemma {
namespace {

// Below this many multiplications waking a second thread costs more than it saves.
constexpr double kSerialMacs = 20e3;
// A chunk's weights should stay in L2 while tiles of tokens walk over them.
constexpr std::size_t kChunkBytes = 256 << 10;

void run_panels(const Kernels& kernels, const ProductInput& input, const Product& p, int begin, int end) {
  const Matrix& w = *p.linear->weight;
  const Output out{p.y, p.ld, p.linear->bias, p.accumulate};
  const bool bf16 = w.activation() == Activation::kBf16;
  if (!w.is_packed())
    kernels.matmul_plain(w.plain_view(), input.floats(bf16), input.tokens(), begin, end, out);
  else if (w.activation() == Activation::kInt8)
    kernels.matmul_int8(w.packed_view(), input.int8(), input.tokens(), begin, end, out);
  else
    kernels.matmul_float(w.packed_view(), input.floats(bf16), input.tokens(), begin, end, out);
}

// Panels per work item: enough items to balance, large enough to stream, small enough to stay in cache.
int chunk_panels(const Matrix& w, int threads, int tokens, int all_panels) {
  int panels = std::max(1, all_panels / (threads * 4));
  if (tokens > 1) {
    const std::size_t panel_bytes = w.bytes() / std::size_t(w.panels()) + 1;
    panels = std::min(panels, std::max(1, int(kChunkBytes / panel_bytes)));
  }
  return std::min(panels, w.panels());
}

}  // namespace

void InputForms::add(const Linear& linear) {
  const Matrix& w = *linear.weight;
  const bool b = w.activation() == Activation::kBf16;
  int8 |= w.activation() == Activation::kInt8;
  bf16 |= b;
  if (w.asymmetric() && w.activation() != Activation::kInt8) (b ? bf16_sums : sums) = true;
}

void InputForms::add(const InputForms& other) {
  sums |= other.sums;
  bf16 |= other.bf16;
  bf16_sums |= other.bf16_sums;
  int8 |= other.int8;
}

void ProductInput::reserve(const InputForms& forms, int columns, int tokens) {
  const size_t blocks = round_up(size_t(columns), kBlock) / kBlock, n = size_t(tokens);
  if (forms.bf16) bf16_ = AlignedBuffer(n * blocks * kBlock * 4);
  if (forms.sums) sums_ = AlignedBuffer(n * blocks * 4);
  if (forms.bf16_sums) bf16_sums_ = AlignedBuffer(n * blocks * 4);
  if (!forms.int8) return;
  // Above one tile the last one is as wide as the others.
  const size_t cells = (n > kTokenTile ? round_up(n, kTokenTile) : n) * blocks;
  codes_ = AlignedBuffer(cells * kBlock);
  scale_ = AlignedBuffer(cells * 4);
  bias8_ = AlignedBuffer(cells * 4);
  bias128_ = AlignedBuffer(cells * 4);
  code_sums_ = AlignedBuffer(cells * 4);
}

std::size_t ProductInput::bytes() const {
  std::size_t total = 0;
  for (const AlignedBuffer* b : {&bf16_, &sums_, &bf16_sums_, &codes_, &scale_, &bias8_, &bias128_, &code_sums_})
    total += b->bytes();
  return total;
}

void ProductInput::begin(const InputForms& forms, float* x, int columns, int tokens) {
  forms_ = forms;
  x_ = x;
  columns_ = columns;
  tokens_ = tokens;
  ld_ = int(round_up(size_t(columns), kBlock));
  int8_ = {codes_.as<int8_t>(),
           scale_.as<float>(),
           bias8_.as<int32_t>(),
           bias128_.as<int32_t>(),
           code_sums_.as<float>(),
           std::min(tokens, int(kTokenTile)),
           ld_ / kBlock};
}

void ProductInput::prepare(const Kernels& kernels, int token) const {
  const size_t at = size_t(token) * size_t(ld_), blocks = size_t(ld_ / kBlock);
  float* row = x_ + at;
  kernels.pad_row(row, columns_);
  if (forms_.sums) kernels.block_sums(row, int(blocks), sums_.as<float>() + size_t(token) * blocks);
  if (forms_.bf16) kernels.round_bf16(row, ld_, bf16_.as<float>() + at);
  if (forms_.bf16_sums)
    kernels.block_sums(bf16_.as<float>() + at, int(blocks), bf16_sums_.as<float>() + size_t(token) * blocks);
  if (forms_.int8) kernels.quantize_int8(row, token, int8_);
}

FloatInput ProductInput::floats(bool bf16) const {
  if (bf16) return {bf16_.as<float>(), size_t(ld_), bf16_sums_.as<float>()};
  return {x_, size_t(ld_), sums_.as<float>()};
}

void multiply(const Kernels& kernels, int threads, const ProductInput& input, std::initializer_list<Product> products) {
  struct Part {
    const Product* product;
    int panels, chunk, first, items;
  };
  Part parts[4];
  int count = 0, all_panels = 0, items = 0;
  double macs = 0;
  for (const Product& p : products) all_panels += p.linear->weight->panels();
  for (const Product& p : products) {
    const Matrix& w = *p.linear->weight;
    const int chunk = chunk_panels(w, threads, input.tokens(), all_panels);
    const int n = (w.panels() + chunk - 1) / chunk;
    parts[count++] = {&p, w.panels(), chunk, items, n};
    items += n;
    macs += double(w.rows()) * w.cols() * input.tokens();
  }
  const auto task = [&](int item) {
    int i = 0;
    while (item >= parts[i].first + parts[i].items) ++i;
    const int begin = (item - parts[i].first) * parts[i].chunk;
    run_panels(kernels, input, *parts[i].product, begin, std::min(begin + parts[i].chunk, parts[i].panels));
  };
  ThreadPool::instance().run(macs < kSerialMacs ? 1 : threads, items, task);
}

}  // namespace trilemma
