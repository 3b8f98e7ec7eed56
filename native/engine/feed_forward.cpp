// The feed-forward half of a layer: a dense block, or a router, a shared block and the chosen experts.
//
// A token's sum is the same whatever else is in the batch: shared block first, then its experts in ascending order.
#include <algorithm>
#include <cstring>

#include "context.h"

namespace trilemma {

void Context::feed_forward(int layer, int first, int count, float* out) {
  const LayerConfig& spec = model_->config().layers[size_t(layer)];
  const LayerWeights& w = model_->layers()[size_t(layer)];
  InputForms forms;
  for (const Linear* l : {&w.ffn.gate, &w.ffn.up, &w.experts.router, &w.experts.shared.gate, &w.experts.shared.up})
    forms.add(*l);
  norm(forms, w.ffn_norm, first, count);
  if (spec.ffn)
    dense(*spec.ffn, w.ffn, count, out);
  else
    experts(*spec.experts, w.experts, count, out);
}

// Reads the product input that `norm` left.
void Context::dense(const FfnSpec& spec, const FfnWeights& w, int count, float* out) {
  const size_t hidden = size_t(spec.hidden), ld = round_up(hidden, kBlock);
  Scratch& s = scratch_;
  float *gate = s.gate.as<float>(), *up = s.up.as<float>();
  if (spec.gated)
    products({{&w.gate, gate, ld}, {&w.up, up, hidden}});
  else
    products({{&w.up, gate, ld}});
  InputForms forms;
  forms.add(w.down);
  activate(spec, forms, {&count, 1});
  products({{&w.down, out, size_t(model_->config().dim), true}});
}

// gate = f(gate) * up for all rows; the result becomes the product input.
void Context::activate(const FfnSpec& spec, const InputForms& forms, std::span<const int> rows_of_parts) {
  const size_t hidden = size_t(spec.hidden), ld = round_up(hidden, kBlock);
  Scratch& s = scratch_;
  float *gate = s.gate.as<float>(), *up = s.up.as<float>();
  int rows = 0;
  for (const int n : rows_of_parts) rows += n;
  s.input.begin(forms, gate, spec.hidden, rows_of_parts);
  each_token(rows, 4.0 * double(hidden), [&](int i) {
    const float* other = spec.gated ? up + size_t(i) * hidden : nullptr;
    kernels_.glu(gate + size_t(i) * ld, other, spec.hidden, spec.activation);
    s.input.prepare(kernels_, i);
  });
}

void Context::experts(const ExpertsSpec& spec, const ExpertsWeights& w, int count, float* out) {
  const size_t dim = size_t(model_->config().dim), scores_ld = size_t(spec.router_rows());
  Scratch& s = scratch_;
  float* scores = s.scores.as<float>();
  products({{&w.router, scores, scores_ld}});
  if (spec.shared_hidden) dense(spec.shared(), w.shared, count, out);
  s.routing.begin(spec, count);
  each_token(count, double(scores_ld) * (spec.active + 4), [&](int i) {
    s.routing.choose(kernels_, i, scores + size_t(i) * scores_ld);
    if (w.bias) kernels_.add_scaled(out + size_t(i) * dim, w.bias, 1.0f, int(dim));
  });
  s.routing.sort();
  // As many experts at once as the scratch has rows for; one never has more tokens than a chunk.
  for (int begin = 0, end; begin < spec.count; begin = end) {
    const int first = s.routing.first(begin);
    for (end = begin + 1; end < spec.count && s.routing.first(end + 1) - first <= s.rows;) ++end;
    if (s.routing.first(end) > first) run_experts(spec, w, begin, end, count, out);
  }
}

void Context::run_experts(const ExpertsSpec& spec, const ExpertsWeights& w, int begin, int end, int count, float* out) {
  Scratch& s = scratch_;
  const Routing& routing = s.routing;
  const int base = routing.first(begin), rows = routing.first(end) - base;
  const size_t dim = size_t(model_->config().dim), dim_ld = round_up(dim, kBlock);
  const size_t hidden = size_t(spec.hidden), hidden_ld = round_up(hidden, kBlock);
  InputForms forms, down_forms;
  std::vector<int> rows_of_parts;
  std::vector<Product> in_products, out_products;
  for (int e = begin; e < end; ++e) {
    const int n = routing.first(e + 1) - routing.first(e), part = int(rows_of_parts.size());
    if (n == 0) continue;
    const FfnWeights& expert = w.experts[size_t(e)];
    const size_t row = size_t(routing.first(e) - base);
    forms.add(expert.gate);
    forms.add(expert.up);
    down_forms.add(expert.down);
    rows_of_parts.push_back(n);
    in_products.push_back({&expert.gate, s.gate.as<float>() + row * hidden_ld, hidden_ld, false, part});
    in_products.push_back({&expert.up, s.up.as<float>() + row * hidden, hidden, false, part});
    out_products.push_back({&expert.down, s.routed.as<float>() + row * dim, dim, false, part});
  }
  s.input.begin(forms, s.gathered.as<float>(), int(dim), rows_of_parts);
  each_token(rows, 2.0 * double(dim), [&](int i) {
    const float* from = s.normed.as<float>() + size_t(routing.token(base + i)) * dim_ld;
    std::memcpy(s.gathered.as<float>() + size_t(i) * dim_ld, from, dim * sizeof(float));
    s.input.prepare(kernels_, i);
  });
  products(in_products);
  activate(spec.one(), down_forms, rows_of_parts);
  products(out_products);
  each_token(count, double(dim) * spec.active, [&](int i) {
    for (int j = 0; j < spec.active; ++j) {
      const int row = routing.row(i, j) - base;
      if (row < 0 || row >= rows) continue;
      const float* routed = s.routed.as<float>() + size_t(row) * dim;
      kernels_.add_scaled(out + size_t(i) * dim, routed, routing.gate(i, j), int(dim));
    }
  });
}

}  // namespace trilemma
