// Every kernel of every instruction set that this host has: equal to scalar bit for bit, and to the double-precision
// reference within a named tolerance, at odd sizes.
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <span>
#include <string_view>
#include <vector>

#include "check.h"
#include "engine/aligned.h"
#include "engine/dispatch.h"
#include "kernels/reference.h"

using namespace trilemma;
namespace ref = trilemma::reference;

#if defined(__x86_64__)
namespace trilemma {
extern const Kernels kernels_avxvnni_evex;
}
#endif

namespace {

const int kTokens[] = {1, 2, 3, 5, 6, 8, 16, 17, 31, 45};
// More than are held at once where weights are turned into another form first.
const int kManyTokens[] = {273};
constexpr double kSumTolerance = 1e-6;  // of the sum of absolute terms
constexpr double kFunctionTolerance = 1e-6;

std::vector<const Kernels*> tables() {
  std::vector<const Kernels*> all;
  for (const std::string& isa : supported_isas()) {
    all.push_back(&pick_kernels(isa));
#if defined(__x86_64__)
    if (isa == "avx512") all.insert(all.end() - 1, &kernels_avxvnni_evex);
#endif
  }
  return all;
}

std::vector<float> random_values(size_t n, float scale = 1) {
  std::vector<float> v(n);
  for (float& x : v) x = check::normal() * scale;
  return v;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Runs `compute` with every table and checks that the bits agree; returns the scalar result.
std::vector<float> everywhere(const char* what, const std::function<std::vector<float>(const Kernels&)>& compute) {
  const std::vector<float> first = compute(*tables()[0]);
  for (const Kernels* k : tables()) CHECK(same_bits(compute(*k), first), std::string(what) + " differs in " + k->name);
  return first;
}

void check_close(const char* what, double found, double wanted, double tolerance) {
  CHECK(std::fabs(found - wanted) <= tolerance,
        std::string(what) + ": " + std::to_string(found) + ", expected " + std::to_string(wanted));
}

size_t padded(int k) { return size_t((k + 31) / 32 * 32); }

float bf16_value(float x) {
  const uint32_t b = std::bit_cast<uint32_t>(x);
  return std::bit_cast<float>((b + 0x7fff + ((b >> 16) & 1)) & 0xffff0000u);
}

// Ties away from zero, as the matrix unit's weights are rounded.
double bf16_weight(double w) {
  return double(std::bit_cast<float>((std::bit_cast<uint32_t>(float(w)) + 0x8000) & 0xffff0000u));
}

std::vector<float> padded_rows(int tokens, int cols) {
  std::vector<float> x(size_t(tokens) * padded(cols), 0.0f);
  for (int t = 0; t < tokens; ++t)
    for (int k = 0; k < cols; ++k) x[size_t(t) * padded(cols) + size_t(k)] = check::normal();
  return x;
}

struct Quantized {
  std::vector<int8_t> codes;
  std::vector<float> row_scale, scale, sum, half_sum[2];
  std::vector<int32_t> starts[kStarts];
  AlignedBuffer workspace;
  Int8Input input{};

  // `shared`: blocks have powers of two of their row's scale.
  Quantized(const Kernels& kernels, const std::vector<float>& x, int tokens, int cols, bool shared) {
    const int width = tokens < 16 ? tokens : 16, blocks = int(padded(cols) / 32);
    const size_t cells = size_t((tokens + width - 1) / width * width) * size_t(blocks);
    codes.resize(cells * 32);
    row_scale.assign(size_t(tokens), 1.0f);
    scale.resize(cells);
    sum.resize(cells);
    for (std::vector<float>& half : half_sum) half.resize(cells);
    input = {codes.data(), shared ? row_scale.data() : nullptr, scale.data(), sum.data(),
             {half_sum[0].data(), half_sum[1].data()}, {}, width, blocks, nullptr};
    if (kernels.workspace_bytes && width == 16) {
      workspace = AlignedBuffer(kernels.workspace_bytes);
      input.workspace = workspace.data();
    }
    for (int i = 0; i < kStarts; ++i) {
      starts[i].resize(cells);
      input.start[i] = starts[i].data();
    }
    for (int t = 0; t < tokens; ++t) kernels.quantize_int8(x.data() + size_t(t) * padded(cols), t, input);
  }
  // What the product sees of token t.
  std::vector<double> values(int t, int cols) const {
    std::vector<double> out;
    for (int k = 0; k < cols; ++k) {
      const size_t at = (size_t(t / 16) * size_t(input.blocks) + size_t(k / 32)) * size_t(input.width) + size_t(t % 16);
      out.push_back(double(codes[at * 32 + size_t(k % 32)]) * double(scale[at]) * double(row_scale[size_t(t)]));
    }
    return out;
  }
};

// Inputs rounded to bf16 in tiles, with the sums of half blocks.
struct Rounded {
  std::vector<uint16_t> codes;
  std::vector<float> sums;
  AlignedBuffer workspace;
  Bf16Input input{};

  Rounded(const Bf16Kernels& kernels, const std::vector<float>& x, int tokens, int cols)
      : workspace(tables().back()->workspace_bytes) {
    const int width = tokens < 16 ? tokens : 16, blocks = int(padded(cols) / 32);
    codes.resize(size_t((tokens + width - 1) / width * width) * padded(cols));
    sums.resize(size_t(tokens) * size_t(2 * blocks));
    input = {codes.data(), width, blocks, workspace.data()};
    for (int t = 0; t < tokens; ++t)
      kernels.round(x.data() + size_t(t) * padded(cols), t, input, sums.data() + size_t(t) * size_t(2 * blocks));
  }
};

// Runs a bf16 product where the host has one, for all tokens and for each alone: the bits must agree. Empty otherwise.
std::vector<float> bf16_product(const char* what, const std::vector<float>& x, int tokens, int rows, int cols,
                                const std::function<void(const Bf16Kernels&, const Rounded&, int, const Output&)>& run) {
  const Bf16Kernels* kernels = tables().back()->bf16;
  if (!kernels) return {};
  std::vector<float> together(size_t(tokens) * size_t(rows)), alone(together.size());
  run(*kernels, {*kernels, x, tokens, cols}, tokens, {together.data(), size_t(rows), nullptr, 0});
  for (int t = 0; t < tokens; ++t) {
    const auto from = x.begin() + std::ptrdiff_t(size_t(t) * padded(cols));
    const std::vector<float> row(from, from + std::ptrdiff_t(padded(cols)));
    run(*kernels, {*kernels, row, 1, cols}, 1, {alone.data() + size_t(t) * size_t(rows), size_t(rows), nullptr, 0});
  }
  CHECK(same_bits(together, alone), std::string(what) + " depends on the batch");
  return together;
}

ref::Grid random_grid(int rows, int cols, int bits, int group, bool symmetric, int sub_group, bool codebook) {
  ref::Grid g{rows, cols, bits, group, {}, {}, {}, sub_group, {}, {}, codebook};
  const int low = symmetric && !codebook ? -(1 << (bits - 1)) : 0;
  for (int i = 0; i < rows * cols; ++i) g.codes.push_back(check::between(low, low + (1 << bits) - 1));
  for (int i = 0; i < rows * g.groups(); ++i) {
    g.scales.push_back(float(check::between(-64, 64)) / 1024);
    if (!symmetric) g.minima.push_back(float(check::between(-64, 0)) / 64);
  }
  for (int i = 0; i < rows * g.sub_groups(); ++i) {
    const auto factor = [&] { return bits == 2 ? check::between(0, 15) : check::between(-128, 127); };
    g.sub_scales.push_back(factor());
    if (!symmetric) g.sub_minima.push_back(factor());
  }
  return g;
}

void test_packed(int rows, int cols, int bits, int group, bool symmetric, int sub_group = 0, bool codebook = false,
                 std::span<const int> counts = kTokens) {
  const ref::Grid grid = random_grid(rows, cols, bits, group, symmetric, sub_group, codebook);
  const ref::Panels panels = ref::pack(grid);
  const PackedView view = panels.view(grid);
  const int panel_count = (rows + 15) / 16;
  for (const int tokens : counts) {
    const std::vector<float> x = padded_rows(tokens, cols), bias = random_values(size_t(rows));
    const std::vector<float> before = random_values(size_t(tokens) * size_t(rows));
    const auto integer = [&](const Kernels& k) {
      const Quantized q(k, x, tokens, cols, bits <= kSharedScaleBits);
      std::vector<float> y = before;
      const int half = panel_count / 2;  // two calls, as two threads would
      k.matmul_int8(view, q.input, tokens, half, panel_count, {y.data(), size_t(rows), bias.data(), 1});
      k.matmul_int8(view, q.input, tokens, 0, half, {y.data(), size_t(rows), bias.data(), 1});
      return y;
    };
    const auto floating = [&](const Kernels& k) {
      std::vector<float> y(before.size()), sums(x.size() / 16);
      k.half_sums(x.data(), int(sums.size() / 2), sums.data());
      k.matmul_float(view, {x.data(), padded(cols), sums.data()}, tokens, 0, panel_count,
                     {y.data(), size_t(rows), nullptr, 0});
      return y;
    };
    const std::vector<float> a = everywhere("matmul_int8", integer), b = everywhere("matmul_float", floating);
    const std::vector<float> c = bf16_product(
        "matmul_packed of bf16", x, tokens, rows, cols,
        [&](const Bf16Kernels& k, const Rounded& in, int count, const Output& out) {
          k.matmul_packed(view, in.input, in.sums.data(), count, 0, panel_count, out);
        });
    const Quantized q(*tables()[0], x, tokens, cols, bits <= kSharedScaleBits);
    for (int t = 0; t < tokens; ++t) {
      const std::vector<double> seen = q.values(t, cols);
      const std::vector<double> exact(x.begin() + std::ptrdiff_t(size_t(t) * padded(cols)),
                                      x.begin() + std::ptrdiff_t(size_t(t + 1) * padded(cols)));
      std::vector<double> rounded;
      for (const double value : exact) rounded.push_back(double(bf16_value(float(value))));
      for (int r = 0; r < rows; ++r) {
        const size_t at = size_t(t) * size_t(rows) + size_t(r);
        const bool tiles = tables().back()->workspace_bytes > 0;
        const ref::Sum g = ref::product(grid, r, rounded, tiles ? bf16_weight : nullptr);
        if (!c.empty()) check_close("matmul_packed of bf16", c[at], g.value, kSumTolerance * (g.size + 1));
        const ref::Sum i = ref::product(grid, r, seen), f = ref::product(grid, r, exact);
        const double rest = double(before[at]) + double(bias[size_t(r)]);
        check_close("matmul_int8", a[at], i.value + rest, kSumTolerance * (i.size + std::fabs(rest) + 1));
        check_close("matmul_float", b[at], f.value, kSumTolerance * (f.size + 1));
      }
    }
  }
}

// Products whose terms, sums or biases are denormal numbers: one token and many agree, whatever multiplies them.
void test_denormals(float size) {
  const int rows = 20, cols = 96, tokens = 45;
  const ref::Grid grid = random_grid(rows, cols, 4, 32, true, 0, false);
  const ref::Panels panels = ref::pack(grid);
  const PackedView view = panels.view(grid);
  std::vector<float> x = padded_rows(tokens, cols), bias(size_t(rows), 0x1p-140f);
  for (float& value : x) value *= size;
  bf16_product("matmul_packed of bf16, denormals", x, tokens, rows, cols,
               [&](const Bf16Kernels& k, const Rounded& in, int count, const Output& out) {
                 const Output biased{out.y, out.ld, bias.data(), 0};
                 k.matmul_packed(view, in.input, in.sums.data(), count, 0, (rows + 15) / 16, biased);
               });
}

void test_plain(int rows, int cols, Dtype dtype) {
  std::vector<float> values(size_t(rows) * size_t(cols));
  std::vector<uint16_t> halves(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = float(check::between(-127, 127)) / 64;  // exact in both types
    halves[i] = dtype == kF16 ? ref::to_half(values[i]) : uint16_t(std::bit_cast<uint32_t>(values[i]) >> 16);
  }
  const PlainView view{dtype == kF32 ? static_cast<const void*>(values.data()) : halves.data(), dtype, rows, cols};
  for (const int tokens : kTokens) {
    const std::vector<float> x = padded_rows(tokens, cols);
    const std::vector<float> y = everywhere("matmul_plain", [&](const Kernels& k) {
      std::vector<float> out(size_t(tokens) * size_t(rows));
      k.matmul_plain(view, {x.data(), padded(cols), nullptr}, tokens, 0, (rows + 15) / 16,
                     {out.data(), size_t(rows), nullptr, 0});
      return out;
    });
    for (int t = 0; t < tokens; ++t)
      for (int r = 0; r < rows; ++r) {
        double sum = 0, size = 0;
        for (int k = 0; k < cols; ++k) {
          const double term =
              double(values[size_t(r) * size_t(cols) + size_t(k)]) * double(x[size_t(t) * padded(cols) + size_t(k)]);
          sum += term;
          size += std::fabs(term);
        }
        check_close("matmul_plain", y[size_t(t) * size_t(rows) + size_t(r)], sum, kSumTolerance * (size + 1));
      }
  }
}

void test_pairs(int rows, int cols) {
  const int panels = (rows + 15) / 16, blocks = int(padded(cols) / 32);
  std::vector<uint16_t> pairs(size_t(panels) * size_t(blocks) * 512);
  std::vector<float> values(size_t(rows) * size_t(cols));
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < cols; ++k) {
      const float value = values[size_t(r * cols + k)] = bf16_value(check::normal());
      const size_t line = (size_t(r / 16) * size_t(blocks) * 16 + size_t(k / 2)) * 32;
      pairs[line + size_t(r % 16 * 2 + k % 2)] = uint16_t(std::bit_cast<uint32_t>(value) >> 16);
    }
  const PairView view{pairs.data(), rows, cols, blocks};
  for (const int tokens : kTokens) {
    const std::vector<float> x = padded_rows(tokens, cols);
    const std::vector<float> f32 = everywhere("matmul_pairs", [&](const Kernels& k) {
      std::vector<float> out(size_t(tokens) * size_t(rows));
      k.matmul_pairs(view, {x.data(), padded(cols), nullptr}, tokens, 0, panels, {out.data(), size_t(rows), nullptr, 0});
      return out;
    });
    const std::vector<float> bf16 =
        bf16_product("matmul_pairs of bf16", x, tokens, rows, cols,
                     [&](const Bf16Kernels& k, const Rounded& in, int count, const Output& out) {
                       const int half = panels / 2;  // two calls, as two threads would
                       k.matmul_pairs(view, in.input, count, half, panels, out);
                       k.matmul_pairs(view, in.input, count, 0, half, out);
                     });
    for (int t = 0; t < tokens; ++t)
      for (int r = 0; r < rows; ++r) {
        double sum = 0, rounded = 0, size = 0;
        for (int k = 0; k < cols; ++k) {
          const double w = double(values[size_t(r * cols + k)]);
          const float in = x[size_t(t) * padded(cols) + size_t(k)];
          sum += w * double(in);
          rounded += w * double(bf16_value(in));
          size += std::fabs(w * double(in));
        }
        const size_t at = size_t(t) * size_t(rows) + size_t(r);
        check_close("matmul_pairs", f32[at], sum, kSumTolerance * (size + 1));
        if (!bf16.empty()) check_close("matmul_pairs of bf16", bf16[at], rounded, kSumTolerance * (size + 1));
      }
  }
}

void test_norm(const std::vector<float>& x, const std::vector<float>& w, const std::vector<float>& bias, bool centred) {
  const int n = int(x.size());
  const float* b = bias.empty() ? nullptr : bias.data();
  const std::vector<float> apart = everywhere(centred ? "layer_norm" : "rms_norm", [&](const Kernels& k) {
    std::vector<float> out(x.size());
    (centred ? k.layer_norm : k.rms_norm)(x.data(), w.data(), b, n, 1e-5f, out.data());
    return out;
  });
  const std::vector<float> in_place = everywhere("norm in place", [&](const Kernels& k) {
    std::vector<float> out = x;
    (centred ? k.layer_norm : k.rms_norm)(out.data(), w.data(), b, n, 1e-5f, out.data());
    return out;
  });
  CHECK(same_bits(apart, in_place), "a norm in place differs");
  const std::vector<double> wanted = ref::norm(x, w, bias, 1e-5, centred);
  for (size_t i = 0; i < x.size(); ++i)
    check_close("norm", apart[i], wanted[i], 4 * kFunctionTolerance * (std::fabs(wanted[i]) + std::fabs(w[i]) + 1e-3));
}

void test_rowwise(int n) {
  std::vector<float> x = random_values(size_t(n), 5), w = random_values(size_t(n)), up = random_values(size_t(n));
  x[0] = 100;
  if (n > 1) x[1] = -100;  // both ends of exp
  for (const bool biased : {false, true})
    for (const bool centred : {false, true}) test_norm(x, w, biased ? up : std::vector<float>{}, centred);
  const std::vector<float> sums = everywhere("add_scaled", [&](const Kernels& k) {
    std::vector<float> out = x;
    k.add_scaled(out.data(), up.data(), 0.37f, n);
    return out;
  });
  for (int i = 0; i < n; ++i)
    CHECK(sums[size_t(i)] == std::fma(0.37f, up[size_t(i)], x[size_t(i)]), "add_scaled is one fma");
  const std::vector<float> powers = everywhere("exp_row", [&](const Kernels& k) {
    std::vector<float> out = x;
    k.exp_row(out.data(), n, 30.0f);
    return out;
  });
  for (int i = 0; i < n; ++i) {
    const double wanted = std::exp(double(x[size_t(i)] - 30.0f));
    check_close("exp_row", powers[size_t(i)], wanted, 4e-7 * wanted + 1e-37);
  }
  for (const Nonlinearity kind : {kSilu, kGelu, kGeluTanh, kRelu}) {
    const std::vector<float> y = everywhere("glu", [&](const Kernels& k) {
      std::vector<float> gate = x;
      k.glu(gate.data(), up.data(), n, kind);
      return gate;
    });
    for (int i = 0; i < n; ++i) {
      const double f = ref::nonlinear(double(x[size_t(i)]), kind), g = double(up[size_t(i)]);
      check_close("glu", y[size_t(i)], f * g,
                  kFunctionTolerance * (std::fabs(x[size_t(i)]) + 1e-3) * (std::fabs(g) + 1e-3));
    }
  }
}

void test_rope(int heads, int dim, int half) {
  const std::vector<float> x = random_values(size_t(heads) * size_t(dim));
  std::vector<float> cos(size_t(half) + 1), sin(size_t(half) + 1);
  for (int i = 0; i < half; ++i) cos[size_t(i)] = std::cos(float(i) + 0.3f), sin[size_t(i)] = std::sin(float(i) + 0.3f);
  const std::vector<float> y = everywhere("rope", [&](const Kernels& k) {
    std::vector<float> out = x;
    k.rope(out.data(), heads, dim, half, cos.data(), sin.data(), 0.25f);
    return out;
  });
  for (int h = 0; h < heads; ++h)
    for (int i = 0; i < dim; ++i) {
      const float* v = x.data() + size_t(h) * size_t(dim);
      double wanted = double(v[i]);
      if (i < half)
        wanted = double(v[i]) * double(cos[size_t(i)]) - double(v[i + half]) * double(sin[size_t(i)]);
      else if (i < 2 * half)
        wanted = double(v[i]) * double(cos[size_t(i - half)]) + double(v[i - half]) * double(sin[size_t(i - half)]);
      check_close("rope", y[size_t(h) * size_t(dim) + size_t(i)], wanted * 0.25, kFunctionTolerance);
    }
}

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
  for (const auto& [rows, cols] : {std::pair{37, 172}, std::pair{16, 32}, std::pair{5, 8}, std::pair{48, 300}}) {
    for (const int group : {0, 32, 64, 128}) {
      test_packed(rows, cols, 8, group, true);
      test_packed(rows, cols, 4, group, true);
      test_packed(rows, cols, 4, group, false);
      test_packed(rows, cols, 5, group, true);
      test_packed(rows, cols, 5, group, false);
      test_packed(rows, cols, 6, group, true);
      test_packed(rows, cols, 3, group, true);
      test_packed(rows, cols, 3, group, false);
      test_packed(rows, cols, 2, group, false);
      test_packed(rows, cols, 4, group, true, 0, true);
    }
    test_packed(rows, cols, 6, 16, true);
    test_packed(rows, cols, 3, 16, true);
    test_packed(rows, cols, 2, 16, false);
    for (const int group : {32, 64, 256}) {
      test_packed(rows, cols, 4, group, false, 32);
      test_packed(rows, cols, 5, group, false, 32);
      test_packed(rows, cols, 6, group, true, 16);
      test_packed(rows, cols, 3, group, true, 16);
      test_packed(rows, cols, 2, group, false, 16);
    }
    for (const Dtype dtype : {kF32, kF16}) test_plain(rows, cols, dtype);
    test_pairs(rows, cols);
  }
  for (const float size : {0.0f, 0x1p-118f, 0x1p-124f}) test_denormals(size);
  for (const int group : {0, 32}) test_packed(150, 1100, 8, group, true, 0, false, kManyTokens);
  test_packed(150, 1100, 4, 32, true, 0, false, kManyTokens);
  test_packed(150, 1100, 5, 256, false, 32, false, kManyTokens);
  test_packed(150, 1100, 2, 256, false, 16, false, kManyTokens);
  for (const int n : {1, 7, 16, 172, 260}) test_rowwise(n);
  test_rope(3, 8, 4);
  test_rope(2, 80, 20);
  test_rope(2, 64, 32);
  test_rope(2, 24, 0);
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
  return check::finish("test_kernels");
}
