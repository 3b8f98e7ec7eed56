// The int8 forms of a row of activations, on every instruction set, beside a plain account of what they are.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "engine/dispatch.h"
#include "kernels/table.h"

namespace {

using namespace trilemma;

struct Forms {
  std::vector<int8_t> codes;
  std::vector<float> row_scale, scale, base, sum, half_sum[2];
  std::vector<int32_t> starts[kStarts];

  Forms(int tokens, int blocks, size_t width) : row_scale(size_t(tokens)) {
    const size_t cells = (size_t(tokens) + width - 1) / width * width * size_t(blocks);
    codes.resize(cells * kBlock);
    scale.resize(cells);
    base.resize(cells);
    sum.resize(cells);
    for (std::vector<float>& half : half_sum) half.resize(cells);
    for (std::vector<int32_t>& start : starts) start.resize(cells);
  }
  Int8Input view(bool shared, int blocks, int width) {
    Int8Input input{codes.data(), shared ? row_scale.data() : nullptr, scale.data(), shared ? base.data() : nullptr, sum.data(),
                    {half_sum[0].data(), half_sum[1].data()}, {}, width, blocks, nullptr};
    for (int i = 0; i < kStarts; ++i) input.start[i] = starts[i].data();
    return input;
  }
  bool operator==(const Forms&) const = default;
};

float peak_of(const float* x, int n) {
  float peak = 0.0f;
  for (int i = 0; i < n; ++i) peak = std::max(peak, std::fabs(x[i]));
  return peak;
}

// One block as the formats say: codes are x / scale to the nearest integer, ties to even.
void round_block(const float* x, float inverse, float scale, bool shared, size_t at, Forms& forms) {
  int half[2] = {0, 0};
  for (int i = 0; i < kBlock; ++i) {
    const int code = std::clamp(int(std::nearbyint(x[i] * inverse)), -127, 127);
    forms.codes[at * kBlock + size_t(i)] = int8_t(code);
    half[i / 16] += code;
  }
  const int sum = half[0] + half[1];
  forms.scale[at] = scale;
  forms.sum[at] = scale * float(sum);
  for (int i = 0; i < 2; ++i) forms.half_sum[i][at] = scale * float(half[i]);
  // Read as a float, what starts there is the scale times (1.5 * 2^23 + what is added as integers).
  const float first = shared ? scale * 12582912.0f : 0.0f;
  if (shared) forms.base[at] = -first;
  const auto start = [&](Int8Start which, int undone) { forms.starts[which][at] = std::bit_cast<int32_t>(first) - undone; };
  start(kStart0, 0);
  start(kStart4, 4 * sum);
  start(kStart8, 8 * sum);
  start(kStart16, 16 * sum);
  start(kStart32, 32 * sum);
  start(kStart4Low, 4 * half[0]);
  start(kStart4High, 4 * half[1]);
  start(kStart32Low, 32 * half[0]);
  start(kStart32High, 32 * half[1]);
  start(kStart128, 128 * sum);
}

void round_row(const float* x, int token, int blocks, int width, bool shared, Forms& forms) {
  const float row = peak_of(x, blocks * kBlock), row_scale = row < 0x1p-80f ? 0.0f : row / 127.0f;
  if (shared) forms.row_scale[size_t(token)] = row_scale;
  for (int b = 0; b < blocks; ++b, x += kBlock) {
    const size_t at = (size_t(token / width) * size_t(blocks) + size_t(b)) * size_t(width) + size_t(token % width);
    const float peak = peak_of(x, kBlock);
    if (shared) {
      // As many doublings as leave the block within the row's largest value; where all codes are 0 anyway, none.
      int e = 0;
      while (row_scale > 0.0f && e < kMaxShift && std::ldexp(double(peak), e + 1) <= double(row)) ++e;
      const float inverse = row_scale == 0.0f ? 0.0f : 1.0f / row_scale;
      round_block(x, std::ldexp(inverse, e), std::ldexp(1.0f, -e), true, at, forms);
    } else {
      const float scale = peak / 127.0f;
      round_block(x, scale > 0x1p-126f ? 1.0f / scale : 0.0f, scale, false, at, forms);
    }
  }
}

// Blocks of zeros, of one large value, of values that lie half way between codes, and of sizes far apart.
std::vector<float> values_of(int tokens, int blocks) {
  std::vector<float> x(size_t(tokens) * size_t(blocks) * kBlock);
  for (size_t first = 0; first < x.size(); first += kBlock) {
    const int kind = check::between(0, 5), exponent = check::between(-40, 40);
    for (size_t i = first; i < first + kBlock; ++i)
      x[i] = kind == 0   ? 0.0f
             : kind == 1 ? float(check::between(-254, 254)) / 2
                         : std::ldexp(check::normal(), kind == 2 ? exponent : 0);
    if (kind == 1) x[first] = 127.0f;
    if (kind == 3) x[first + size_t(check::between(0, kBlock - 1))] = 1000.0f;
  }
  return x;
}

void test_quantize(int tokens, int blocks, bool shared, bool vanishing) {
  std::vector<float> x = values_of(tokens, blocks);
  if (vanishing)
    for (float& value : x) value *= 0x1p-126f;
  const int width = std::min(tokens, 16);
  Forms wanted(tokens, blocks, size_t(width));
  const auto row = [&](int t) { return x.data() + size_t(t) * size_t(blocks) * kBlock; };
  for (int t = 0; t < tokens; ++t) round_row(row(t), t, blocks, width, shared, wanted);
  for (const std::string& name : supported_isas()) {
    Forms found(tokens, blocks, size_t(width));
    const Int8Input input = found.view(shared, blocks, width);
    for (int t = 0; t < tokens; ++t) pick_kernels(name).quantize_int8(row(t), t, input);
    CHECK(found == wanted, "quantize_int8 of " + name + ": " + std::to_string(tokens) + " tokens, " +
                               std::to_string(blocks) + " blocks" + (shared ? ", one scale a row" : "") +
                               (vanishing ? ", next to nothing" : ""));
  }
}

// What is no number leaves no number behind.
void test_nan(int blocks) {
  std::vector<float> x = values_of(1, blocks);
  const int at = check::between(0, blocks * kBlock - 1);
  x[size_t(at)] = std::nanf("");
  for (const std::string& name : supported_isas()) {
    Forms own(1, blocks, 1), shared(1, blocks, 1);
    pick_kernels(name).quantize_int8(x.data(), 0, own.view(false, blocks, 1));
    pick_kernels(name).quantize_int8(x.data(), 0, shared.view(true, blocks, 1));
    CHECK(std::isnan(own.scale[size_t(at / kBlock)]), "the scale of a block with NaN on " + name);
    CHECK(std::isnan(shared.row_scale[0]), "the scale of a row with NaN on " + name);
  }
}

}  // namespace

int main() {
  for (const int blocks : {1, 2, 9, 15, 16, 17, 18, 33, 88})
    for (const int tokens : {1, 3, 16, 17}) {
      for (const bool shared : {false, true})
        for (const bool vanishing : {false, true}) test_quantize(tokens, blocks, shared, vanishing);
      test_nan(blocks);
    }
  return check::finish("test_inputs");
}
