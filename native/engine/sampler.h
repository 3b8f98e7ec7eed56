// How the next token is chosen: the same rule as trilemma.runtime.sampling, which documents it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace trilemma {

struct SamplerSettings {
  double temperature = 0;  // 0: greedy
  int top_k = 0;
  double top_p = 1, min_p = 0, repetition_penalty = 1;
  std::uint64_t seed = 0;
};

class Sampler {
 public:
  Sampler(const SamplerSettings& settings, int vocab_size, int threads);

  // A token that the repetition penalty punishes from now on.
  void saw(std::int32_t token) { seen_[std::size_t(token)] = true; }
  // Chooses from `logits` (changed in place) the token that follows `position` others.
  std::int32_t choose(std::span<float> logits, std::uint64_t position);

 private:
  std::int32_t draw(std::span<const float> logits, std::uint64_t position);
  double sum(std::span<const float> logits);
  void order(std::span<const float> logits, std::size_t count);
  std::int32_t draw_from_order(std::span<const float> logits, double u, double total);

  SamplerSettings settings_;
  int threads_;
  std::vector<bool> seen_;
  std::vector<std::int32_t> order_;
  std::vector<double> probabilities_, sums_;
};

// A number in [0, 1) that depends on seed and position alone (splitmix64).
double uniform(std::uint64_t seed, std::uint64_t position);

}  // namespace trilemma
