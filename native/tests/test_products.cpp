// Matrix products on every instruction set that this host has: equal to scalar bit for bit, and to the double-precision reference
// within a named tolerance, at odd sizes.

#include <span>

#include "engine/aligned.h"
#include "kernel_tables.h"

using namespace trilemma;
namespace ref = trilemma::reference;

namespace {

const int kTokens[] = {1, 2, 3, 5, 6, 8, 16, 17, 31, 45};
// More than are held at once where weights are turned into another form first.
const int kManyTokens[] = {273};
constexpr double kSumTolerance = 1e-6;  // of the sum of absolute terms

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
  std::vector<float> row_scale, scale, base, sum, half_sum[2];
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
    base.resize(cells);
    sum.resize(cells);
    for (std::vector<float>& half : half_sum) half.resize(cells);
    input = {codes.data(), shared ? row_scale.data() : nullptr, scale.data(), shared ? base.data() : nullptr, sum.data(),
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
  return check::finish("test_products");
}
