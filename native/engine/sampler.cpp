#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "thread_pool.h"

namespace trilemma {

double uniform(std::uint64_t seed, std::uint64_t position) {
  std::uint64_t x = seed + (position + 1) * 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return double((x ^ (x >> 31)) >> 11) * 0x1p-53;
}

namespace {

constexpr std::size_t kHead = 64, kWiden = 16;  // likeliest tokens, among which most draws fall; then so many times more
constexpr std::size_t kPart = 2048;             // logits that are looked at together
constexpr double kNothing = -60;                // e to the power of that is nothing beside rounding, however often

// In lanes: a chain of comparisons over the vocabulary takes a seventh of a small model's step.
float highest(std::span<const float> values) {
  constexpr std::size_t kLanes = 32;
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, -INFINITY);
  std::size_t i = 0;
  for (; i + kLanes <= values.size(); i += kLanes)
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const float value = values[i + lane];
      lanes[lane] = value > lanes[lane] ? value : lanes[lane];
    }
  for (; i < values.size(); ++i) lanes[0] = std::max(lanes[0], values[i]);
  return *std::max_element(lanes, lanes + kLanes);
}

// Where the first of the highest values is: found in its part alone.
std::size_t first_of_highest(std::span<const float> values) {
  float most = -INFINITY;
  std::size_t where = 0;
  for (std::size_t first = 0; first < values.size(); first += kPart) {
    const float here = highest(values.subspan(first, std::min(kPart, values.size() - first)));
    if (here > most) most = here, where = first;
  }
  while (where + 1 < values.size() && values[where] != most) ++where;
  return where;
}

}  // namespace

Sampler::Sampler(const SamplerSettings& settings, int vocab_size, int threads)
    : settings_(settings), threads_(threads), seen_(std::size_t(vocab_size), false) {}

std::int32_t Sampler::choose(std::span<float> logits, std::uint64_t position) {
  if (settings_.repetition_penalty != 1) {
    const float factor = float(settings_.repetition_penalty);
    for (std::size_t t = 0; t < logits.size(); ++t)
      if (seen_[t]) logits[t] = logits[t] > 0 ? logits[t] / factor : logits[t] * factor;
  }
  if (settings_.temperature == 0) return std::int32_t(first_of_highest(logits));
  return draw(logits, position);
}

std::int32_t Sampler::draw(std::span<const float> logits, std::uint64_t position) {
  const double u = uniform(settings_.seed, position);
  const std::size_t all = logits.size();
  double total = 0;
  for (std::size_t head = kHead; settings_.top_k == 0 && 4 * head < all; head *= kWiden) {
    order(logits, head);
    if (head == kHead) total = sum(logits);
    const std::int32_t token = draw_from_order(logits, u, total);
    if (token >= 0) return token;
  }
  order(logits, settings_.top_k > 0 ? std::min(all, std::size_t(settings_.top_k)) : all);
  return draw_from_order(logits, u, -1);
}

// Of all probabilities, as parts of the highest; the same on any number of threads.
double Sampler::sum(std::span<const float> logits) {
  const double peak = double(logits[std::size_t(order_[0])]) / settings_.temperature;
  sums_.assign((logits.size() + kPart - 1) / kPart, 0);
  ThreadPool::instance().run(threads_, int(sums_.size()), [&](int item) {
    const std::size_t first = std::size_t(item) * kPart;
    double total = 0;
    for (const float logit : logits.subspan(first, std::min(kPart, logits.size() - first))) {
      const double below = double(logit) / settings_.temperature - peak;
      if (below > kNothing) total += std::exp(below);
    }
    sums_[std::size_t(item)] = total;
  });
  return std::accumulate(sums_.begin(), sums_.end(), 0.0);
}

// The `count` likeliest tokens: falling logit, then rising id.
void Sampler::order(std::span<const float> logits, std::size_t count) {
  float least = -INFINITY;
  if (count < logits.size() / 4) {  // as many parts as tokens are wanted: no maximum of a part need be missed
    least = INFINITY;
    const std::size_t size = logits.size() / count;
    for (std::size_t part = 0; part < count; ++part) least = std::min(least, highest(logits.subspan(part * size, size)));
  }
  order_.clear();
  for (std::size_t i = 0; i < logits.size(); ++i)
    if (!(logits[i] < least)) order_.push_back(std::int32_t(i));
  const auto before = [&](std::int32_t a, std::int32_t b) {
    const float x = logits[std::size_t(a)], y = logits[std::size_t(b)];
    return x > y || (x == y && a < b);
  };
  std::partial_sort(order_.begin(), order_.begin() + std::ptrdiff_t(count), order_.end(), before);
  order_.resize(count);
}

// The draw among the tokens of `order_`, whose probabilities are in proportion to their share of `total`; where that is
// negative, of their own sum: then there are no others. -1 where it may fall on one of the others.
std::int32_t Sampler::draw_from_order(std::span<const float> logits, double u, double total) {
  const bool whole = total < 0;
  std::size_t count = order_.size();
  const double peak = double(logits[std::size_t(order_[0])]) / settings_.temperature;
  probabilities_.resize(count);
  for (std::size_t i = 0; i < count; ++i)
    probabilities_[i] = std::exp(double(logits[std::size_t(order_[i])]) / settings_.temperature - peak);
  if (whole) total = std::accumulate(probabilities_.begin(), probabilities_.end(), 0.0);
  bool cut = whole;
  if (settings_.top_p < 1) {  // the token that crosses top_p stays
    double running = probabilities_[0];
    std::size_t kept = 1;
    for (; kept < count && running < settings_.top_p * total; ++kept) running += probabilities_[kept];
    if (!whole && running < settings_.top_p * total) return -1;
    count = kept, cut = true;
  }
  if (settings_.min_p > 0) {
    const bool beyond = !cut && !(probabilities_[count - 1] < settings_.min_p * probabilities_[0]);
    if (beyond) return -1;
    while (count > 1 && probabilities_[count - 1] < settings_.min_p * probabilities_[0]) --count;
    cut = true;
  }
  if (cut) total = std::accumulate(probabilities_.begin(), probabilities_.begin() + std::ptrdiff_t(count), 0.0);
  const double target = u * total;
  double running = 0;
  for (std::size_t i = 0; i < count; ++i) {
    running += probabilities_[i];
    if (running > target) return order_[i];
  }
  return cut ? order_[count - 1] : -1;
}

}  // namespace trilemma
