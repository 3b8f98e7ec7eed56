// Norms, nonlinearities, sums and rotations on every instruction set: equal to scalar bit for bit, and to the double-precision
// reference within a named tolerance, at odd sizes.

#include "kernel_tables.h"

using namespace trilemma;
namespace ref = trilemma::reference;

namespace {

constexpr double kFunctionTolerance = 1e-6;

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

}  // namespace

int main() {
  for (const int n : {1, 7, 16, 172, 260}) test_rowwise(n);
  test_rope(3, 8, 4);
  test_rope(2, 80, 20);
  test_rope(2, 64, 32);
  test_rope(2, 24, 0);
  return check::finish("test_rows");
}
