#include "routing.h"

#include <algorithm>
#include <cmath>

namespace trilemma {
namespace {

// Indices of the `count` highest of `n` scores, ascending. Scores are few: no heap pays.
void highest(const float* scores, int n, int count, int* chosen) {
  for (int i = 0; i < count; ++i) {
    int best = -1;
    for (int e = 0; e < n; ++e)
      if (std::find(chosen, chosen + i, e) == chosen + i && (best < 0 || scores[e] > scores[best])) best = e;
    chosen[i] = best;
  }
  std::sort(chosen, chosen + count);
}

float highest_value(const float* values, int n) { return *std::max_element(values, values + n); }

// values = e^(values - max); their sum, in ascending order.
float exponentials(const Kernels& kernels, float* values, int n) {
  kernels.exp_row(values, n, highest_value(values, n));
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += values[i];
  return sum;
}

}  // namespace

void Routing::reserve(std::size_t pairs, std::size_t firsts) {
  expert_.reserve(pairs);
  row_.reserve(pairs);
  gate_.reserve(pairs);
  token_.reserve(pairs);
  first_.reserve(firsts);
}

std::size_t Routing::bytes() const {
  return 4 * (expert_.capacity() + row_.capacity() + gate_.capacity() + token_.capacity() + first_.capacity());
}

void Routing::begin(const ExpertsSpec& spec, int tokens) {
  spec_ = spec;
  tokens_ = tokens;
  const size_t pairs = size_t(tokens) * size_t(spec.active);
  expert_.resize(pairs);
  row_.resize(pairs);
  gate_.resize(pairs);
  token_.resize(pairs);
  first_.assign(size_t(spec.count) + 1, 0);
}

void Routing::choose(const Kernels& kernels, int token, float* scores) {
  const int count = spec_.count, active = spec_.active;
  int* chosen = expert_.data() + at(token, 0);
  float* gates = gate_.data() + at(token, 0);
  if (spec_.router == RouterKind::kGlu) {
    kernels.glu(scores, scores + count, count, spec_.activation);
    for (int e = 0; e < count; ++e) scores[e] = std::fabs(scores[e]);
  }
  highest(scores, count, active, chosen);
  float sum = 1;
  if (spec_.gates == GateKind::kSoftmax) sum = exponentials(kernels, scores, count);
  for (int i = 0; i < active; ++i) gates[i] = spec_.gates == GateKind::kOne ? 1 : scores[chosen[i]];
  if (spec_.gates == GateKind::kNormalized) sum = exponentials(kernels, gates, active);
  for (int i = 0; i < active; ++i) gates[i] /= sum;
}

void Routing::sort() {
  for (const int e : expert_) ++first_[size_t(e) + 1];
  for (size_t e = 1; e < first_.size(); ++e) first_[e] += first_[e - 1];
  // first_[e] walks to the end of e's rows, which is the start of the next expert's.
  for (size_t pair = 0; pair < expert_.size(); ++pair) {
    row_[pair] = first_[size_t(expert_[pair])]++;
    token_[size_t(row_[pair])] = int(pair / size_t(spec_.active));
  }
  for (size_t e = first_.size() - 1; e > 0; --e) first_[e] = first_[e - 1];
  first_[0] = 0;
}

}  // namespace trilemma
