#include "sampler.h"

#include <algorithm>
#include <cmath>

namespace trilemma {

double uniform(std::uint64_t seed, std::uint64_t position) {
  std::uint64_t x = seed + (position + 1) * 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return double((x ^ (x >> 31)) >> 11) * 0x1p-53;
}

namespace {

// Where the first of the highest values is. In lanes, as a chain of comparisons takes a seventh of a small model's step.
std::size_t highest(std::span<const float> values) {
  constexpr std::size_t kLanes = 32, kChunk = 1024;
  float most = -INFINITY;
  std::size_t where = 0;  // the chunk that has it, first
  for (std::size_t first = 0; first < values.size(); first += kChunk) {
    const auto chunk = values.subspan(first, std::min(kChunk, values.size() - first));
    float lanes[kLanes];
    std::fill_n(lanes, kLanes, -INFINITY);
    std::size_t i = 0;
    for (; i + kLanes <= chunk.size(); i += kLanes)
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        const float value = chunk[i + lane];
        lanes[lane] = value > lanes[lane] ? value : lanes[lane];
      }
    for (; i < chunk.size(); ++i) lanes[0] = std::max(lanes[0], chunk[i]);
    const float here = *std::max_element(lanes, lanes + kLanes);
    if (here > most) most = here, where = first;
  }
  while (where + 1 < values.size() && values[where] != most) ++where;
  return where;
}

}  // namespace

Sampler::Sampler(const SamplerSettings& settings, int vocab_size)
    : settings_(settings), seen_(std::size_t(vocab_size), false) {}

std::int32_t Sampler::choose(std::span<float> logits, std::uint64_t position) {
  if (settings_.repetition_penalty != 1) {
    const float factor = float(settings_.repetition_penalty);
    for (std::size_t t = 0; t < logits.size(); ++t)
      if (seen_[t]) logits[t] = logits[t] > 0 ? logits[t] / factor : logits[t] * factor;
  }
  if (settings_.temperature == 0) return std::int32_t(highest(logits));
  return draw(logits, position);
}

std::int32_t Sampler::draw(std::span<const float> logits, std::uint64_t position) {
  const auto before = [&](std::int32_t a, std::int32_t b) {
    const float x = logits[std::size_t(a)], y = logits[std::size_t(b)];
    return x > y || (x == y && a < b);
  };
  order_.resize(logits.size());
  for (std::size_t i = 0; i < order_.size(); ++i) order_[i] = std::int32_t(i);
  std::size_t count = order_.size();
  if (settings_.top_k > 0) count = std::min(count, std::size_t(settings_.top_k));
  std::partial_sort(order_.begin(), order_.begin() + std::ptrdiff_t(count), order_.end(), before);

  const double peak = double(logits[std::size_t(order_[0])]) / settings_.temperature;
  probabilities_.resize(count);
  double total = 0;
  for (std::size_t i = 0; i < count; ++i) {
    probabilities_[i] = std::exp(double(logits[std::size_t(order_[i])]) / settings_.temperature - peak);
    total += probabilities_[i];
  }
  if (settings_.top_p < 1) {  // the token that crosses top_p stays
    double running = probabilities_[0];
    std::size_t kept = 1;
    for (; kept < count && running < settings_.top_p * total; ++kept) running += probabilities_[kept];
    count = kept;
  }
  while (count > 1 && probabilities_[count - 1] < settings_.min_p * probabilities_[0]) --count;

  double running = 0;
  for (std::size_t i = 0; i < count; ++i) running += probabilities_[i];
  const double target = uniform(settings_.seed, position) * running;
  running = 0;
  for (std::size_t i = 0; i < count; ++i) {
    running += probabilities_[i];
    if (running > target) return order_[i];
  }
  return order_[count - 1];
}

}  // namespace trilemma
