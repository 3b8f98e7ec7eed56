// Which experts each token of a chunk runs, and the order in which the experts see the tokens.
#pragma once

#include <vector>

#include "config.h"

namespace trilemma {

class Routing {
 public:
  // pairs: (token, expert) pairs of a chunk; firsts: one more than experts.
  void reserve(std::size_t pairs, std::size_t firsts);
  static std::size_t bytes_of(std::size_t pairs, std::size_t firsts) { return 4 * (4 * pairs + firsts); }
  std::size_t bytes() const;

  void begin(const ExpertsSpec& spec, int tokens);
  // Chooses for one token and destroys its scores; safe to call for different tokens at once. The highest `active`
  // scores win, equal ones by the lower index; a token's experts are kept in ascending order.
  void choose(const Kernels& kernels, int token, float* scores);
  // Sorts (token, expert) pairs by expert, tokens ascending: the rows that experts work on.
  void sort();

  // After `sort`: rows [first(e), first(e + 1)) belong to expert e.
  int first(int expert) const { return first_[size_t(expert)]; }
  int token(int row) const { return token_[size_t(row)]; }
  // Of a token's i-th expert.
  int row(int token, int i) const { return row_[at(token, i)]; }
  float gate(int token, int i) const { return gate_[at(token, i)]; }

 private:
  std::size_t at(int token, int i) const { return std::size_t(token) * std::size_t(spec_.active) + std::size_t(i); }

  ExpertsSpec spec_;
  int tokens_ = 0;
  std::vector<int> expert_, row_;  // (tokens, active)
  std::vector<float> gate_;        // (tokens, active)
  std::vector<int> first_, token_;
};

}  // namespace trilemma
