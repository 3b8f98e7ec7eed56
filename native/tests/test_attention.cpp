// Attention over every kind of cache on every instruction set: equal to scalar bit for bit (bf16 products apart), however its rows,
// chunks and heads are divided into calls, and to the double-precision reference within what rounding explains.

#include <algorithm>

#include "kernel_tables.h"

using namespace trilemma;
namespace ref = trilemma::reference;

namespace {

struct Cache {
  std::vector<std::vector<uint8_t>> data;
  std::vector<uint8_t*> pages;
  KvView view;

  Cache(KvType type, int heads, int dim, int capacity) {
    const int page = std::min(capacity, int(kKvPage));
    const size_t wide = size_t((dim + 15) / 16 * 16), cells = size_t(heads) * size_t(page);
    const int step = type == kKvF32 ? 1 : type == kKvBf16 ? 2 : type == kKvInt8 ? 4 : 8;
    const int key_dim = (dim + step - 1) / step * step, value_dim = type == kKvInt4 ? (dim + 31) / 32 * 32 : int(wide);
    const size_t k = cells * size_t(key_dim) * 4, v = cells * wide * 4;
    for (int first = 0; first < capacity; first += page)  // NaN where nothing was stored: it must not leak out
      pages.push_back(data.emplace_back(k + v + 2 * cells * 4 + 64, 0xff).data());
    view = {pages.data(), 0, k, k + v, k + v + cells * 4, type, dim, key_dim, int(wide), value_dim, page};
  }
};

// Value d of a head whose sums and differences are kept in 4 bits. These are added in f32, in the order of their definition, so
// that none falls to the other side of an edge between two codes; they are turned back by the textbook's signs.
double rounded_int4(const float* x, int dim, int d) {
  const int mixed = dim & -dim, base = d / mixed * mixed;
  std::vector<float> sums(x, x + dim);
  for (int apart = 1; apart < mixed; apart *= 2)
    for (int i = 0; i < dim; ++i) {
      const float a = sums[size_t(i)];
      if (i & apart) continue;
      const float b = sums[size_t(i + apart)];
      sums[size_t(i)] = a + b;
      sums[size_t(i + apart)] = a - b;
    }
  const auto [low, high] = std::minmax_element(sums.begin(), sums.end());
  const float scale = bf16_value((*high - *low) / 15), minimum = bf16_value(*low);
  double value = 0;
  for (int i = 0; i < mixed; ++i) {
    const float code = std::nearbyint((sums[size_t(base + i)] - minimum) * (1 / scale));
    const double kept = double(std::clamp(code, 0.0f, 15.0f)) * double(scale) + double(minimum);
    value += (__builtin_parity(unsigned(i & (d - base))) ? -kept : kept) / mixed;
  }
  return value;
}

// What a cache keeps of value d of a head.
double rounded(KvType type, const float* x, int dim, int d) {
  if (type == kKvF32) return double(x[d]);
  if (type == kKvBf16) return double(bf16_value(x[d]));
  if (type == kKvInt4) return rounded_int4(x, dim, d);
  float peak = 0;
  for (int i = 0; i < dim; ++i) peak = std::max(peak, std::fabs(x[i]));
  const float scale = peak / 127;
  return double(std::nearbyint(x[d] * (1 / scale))) * double(scale);
}

// Random keys, values and queries of the last `tokens` of some positions.
struct AttentionCase {
  KvType type;
  int dim, group, tokens, first, window;
  static constexpr int kHeads = 2;
  int length = first + tokens;
  size_t kv_dim = size_t(kHeads) * size_t(dim), q_dim = kv_dim * size_t(group);
  std::vector<float> k = random_values(kv_dim * size_t(length)), v = random_values(kv_dim * size_t(length));
  std::vector<float> q = random_values(q_dim * size_t(tokens), 1 / std::sqrt(float(dim)));

  Cache fill(const Kernels& kernels) const {
    Cache cache(type, kHeads, dim, (length + 15) / 16 * 16);
    for (int p = 0; p < length; ++p)
      kernels.kv_store(cache.view, k.data() + size_t(p) * kv_dim, v.data() + size_t(p) * kv_dim, kHeads, p);
    return cache;
  }
  AttentionTask task(std::vector<float>& out, int head, int begin, int end) const {
    const size_t column = size_t(head * group * dim);
    return {q.data() + column, out.data() + column, q_dim, q_dim, group, head, 1, begin, end, first, window, nullptr, 0, 1, 0};
  }
  // In two calls, rows [0, cut) and the rest.
  std::vector<float> run(const Kernels& kernels, int cut) const {
    const Cache cache = fill(kernels);
    std::vector<float> out(q.size());
    for (int h = 0; h < kHeads; ++h) {
      kernels.attention(cache.view, task(out, h, 0, cut));
      kernels.attention(cache.view, task(out, h, cut, tokens * group));
    }
    return out;
  }
  // Of one token: chunks of positions in runs of so many, of so many heads at once, each on its own, then merged.
  std::vector<float> run_chunks(const Kernels& kernels, int run, int heads) const {
    const Cache cache = fill(kernels);
    std::vector<float> out(q.size());
    const int begin = window && length > window ? (length - window) / kKvChunk : 0;
    const int chunks = (length - 1) / kKvChunk + 1 - begin;
    const size_t of_head = size_t(group) * size_t(cache.view.padded_dim + 16);
    std::vector<float> partial(of_head * kHeads * size_t(chunks), std::nanf(""));
    const auto part_of = [&](int head, int count, int c) {
      AttentionTask part = task(out, head, 0, group * count);
      part.group = group * count;
      part.kv_heads = count;
      part.partial = partial.data() + size_t(c * kHeads + head) * of_head;
      part.stride = of_head * kHeads;
      part.chunk = begin + c;
      part.chunks = std::min(run, chunks - c);
      return part;
    };
    for (int h = 0; h < kHeads; h += heads)
      for (int c = 0; c < chunks; c += run) kernels.attention(cache.view, part_of(h, heads, c));
    for (int h = 0; h < kHeads; ++h) kernels.attention_merge(cache.view, part_of(h, 1, 0), chunks);
    return out;
  }
  // Of one token, all heads at once.
  std::vector<float> run_heads(const Kernels& kernels) const {
    const Cache cache = fill(kernels);
    std::vector<float> out(q.size());
    AttentionTask all = task(out, 0, 0, group * kHeads);
    all.group = group * kHeads;
    all.kv_heads = kHeads;
    kernels.attention(cache.view, all);
    return out;
  }

  // What eight deviations of the rounding of queries and weights, evenly spread and independent, make of an output. bf16:
  // relative errors of weights up to 2^-9 (the reference rounds the query too). int8: codes of 1/16256 of the largest, of
  // queries against keys of about length sqrt(dim), and of weights against values of about 2.
  double tolerance(const ref::Attended& wanted, size_t d, const std::vector<double>& query, size_t positions) const {
    const double deviations = 8 / std::sqrt(3.0);
    if (type == kKvF32) return 1e-5;
    if (type == kKvBf16) return 1e-5 + deviations / 512 * wanted.spread[d];
    double peak = 0;
    for (const double x : query) peak = std::max(peak, std::fabs(x));
    const double scores = peak * std::sqrt(double(dim)) * wanted.spread[d];
    // int4: codes are not around zero, and what they have in common comes back in the first dimension of a block.
    const int mixed = dim & -dim;
    const double size = type == kKvInt4 && d % size_t(mixed) == 0 ? 3 * std::sqrt(double(mixed)) : 2;
    return 1e-5 + deviations * 0.5 / 16256 * (1.5 * scores + size * wanted.largest * std::sqrt(double(positions)));
  }

  void check_against_reference(const std::vector<float>& found, int t, int h) const {
    const float log2e = 1.44269504f;
    std::vector<double> query;
    for (int d = 0; d < dim; ++d) {
      const float x = q[size_t(t) * q_dim + size_t(h * dim + d)];
      query.push_back(type == kKvBf16 ? double(bf16_value(x * log2e)) / double(log2e) : double(x));
    }
    const int end = first + t + 1, begin = window && end > window ? end - window : 0;
    std::vector<std::vector<double>> keys, values;
    for (int p = begin; p < end; ++p) {
      const size_t at = size_t(p) * kv_dim + size_t(h / group * dim);
      keys.emplace_back();
      values.emplace_back();
      for (int d = 0; d < dim; ++d) {
        keys.back().push_back(rounded(type, k.data() + at, dim, d));
        values.back().push_back(rounded(type, v.data() + at, dim, d));
      }
    }
    const ref::Attended wanted = ref::attention(query, keys, values);
    for (int d = 0; d < dim; ++d)
      check_close("attention", found[size_t(t) * q_dim + size_t(h * dim + d)], wanted.value[size_t(d)],
                  tolerance(wanted, size_t(d), query, keys.size()));
  }
};

void test_attention(KvType type, int dim, int group, int tokens, int first, int window) {
  const AttentionCase one{type, dim, group, tokens, first, window};
  const int rows = tokens * group;
  const std::vector<float> y = one.run(*tables()[0], rows / 3);
  for (const Kernels* kernels : tables()) {
    const std::vector<float> own = one.run(*kernels, rows / 3);
    // The processor's bf16 products have bits of their own.
    const bool apart = type == kKvBf16 && kernels->bf16;
    CHECK(apart || same_bits(own, y), std::string("attention differs in ") + kernels->name);
    CHECK(same_bits(one.run(*kernels, rows - rows / 7), own), "attention depends on the rows of a call");
    const bool together = tokens == 1 && group * one.kHeads <= attention_rows((dim + 15) / 16 * 16);
    for (int heads = 1; tokens == 1 && heads <= (together ? 2 : 1); ++heads)
      for (int run = 1; run <= 3; ++run)
        CHECK(same_bits(one.run_chunks(*kernels, run, heads), own), "attention in chunks differs from attention at once");
    if (together) CHECK(same_bits(one.run_heads(*kernels), own), "attention of heads together differs from one by one");
    if (kernels == tables()[0] || apart)
      for (int t = 0; t < tokens; ++t)
        for (int h = 0; h < one.kHeads * group; ++h) one.check_against_reference(own, t, h);
  }
}

}  // namespace

int main() {
  for (const KvType type : {kKvF32, kKvBf16, kKvInt8, kKvInt4})
    for (const int window : {0, 5, 130}) {
      test_attention(type, 8, 2, 1, 0, window);
      test_attention(type, 8, 3, 19, 120, window);
      test_attention(type, 40, 1, 140, 0, window);
      test_attention(type, 96, 4, 1, 270, window);
      test_attention(type, 20, 9, 1, 1300, window);
      test_attention(type, 16, 2, 30, 1010, window);
      test_attention(type, 17, 16, 3, 130, window);
      test_attention(type, 256, 5, 2, 99, window);
      test_attention(type, 72, 7, 6, 50, window);
    }
  for (const KvType type : {kKvF32, kKvBf16, kKvInt8, kKvInt4})
    for (const int window : {600, 1024}) {
      test_attention(type, 16, 2, 1, 1700, window);
      test_attention(type, 16, 2, 40, 1000, window);
    }
  return check::finish("test_attention");
}
