// The smallest test frame that does: count failures, print the first of each place, exit non-zero.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

namespace check {

inline int failures = 0;

inline void that(bool ok, const char* file, int line, const std::string& what) {
  if (ok) return;
  if (++failures <= 20) std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
}

// Fresh numbers at every run; TRILEMMA_TEST_SEED repeats one.
inline std::mt19937& random() {
  static std::mt19937 engine = [] {
    const char* given = std::getenv("TRILEMMA_TEST_SEED");
    const unsigned seed = given ? unsigned(std::strtoul(given, nullptr, 10)) : std::random_device{}();
    std::printf("TRILEMMA_TEST_SEED=%u\n", seed);
    return std::mt19937(seed);
  }();
  return engine;
}
inline float normal() { return std::normal_distribution<float>()(random()); }
inline int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random()); }

inline int finish(const char* name) {
  std::printf("%s: %s (%d failures)\n", name, failures ? "FAILED" : "passed", failures);
  return failures ? 1 : 0;
}

}  // namespace check

#define CHECK(condition, what) check::that((condition), __FILE__, __LINE__, (what))
