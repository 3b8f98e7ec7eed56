// Every table of kernels that this host has, run side by side: what the tests of products, rows and attention share.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "check.h"
#include "engine/dispatch.h"
#include "kernels/reference.h"

namespace trilemma {
#if defined(__x86_64__)
extern const Kernels kernels_avxvnni_evex;
#endif

inline std::vector<const Kernels*> tables() {
  std::vector<const Kernels*> all;
  for (const std::string& isa : supported_isas()) {
    all.push_back(&pick_kernels(isa));
#if defined(__x86_64__)
    if (isa == "avx512") all.insert(all.end() - 1, &kernels_avxvnni_evex);
#endif
  }
  return all;
}

inline std::vector<float> random_values(size_t n, float scale = 1) {
  std::vector<float> v(n);
  for (float& x : v) x = check::normal() * scale;
  return v;
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Runs `compute` with every table and checks that the bits agree; returns the scalar result.
inline std::vector<float> everywhere(const char* what, const std::function<std::vector<float>(const Kernels&)>& compute) {
  const std::vector<float> first = compute(*tables()[0]);
  for (const Kernels* k : tables()) CHECK(same_bits(compute(*k), first), std::string(what) + " differs in " + k->name);
  return first;
}

inline void check_close(const char* what, double found, double wanted, double tolerance) {
  CHECK(std::fabs(found - wanted) <= tolerance,
        std::string(what) + ": " + std::to_string(found) + ", expected " + std::to_string(wanted));
}

inline size_t padded(int k) { return size_t((k + 31) / 32 * 32); }

inline float bf16_value(float x) {
  const uint32_t b = std::bit_cast<uint32_t>(x);
  return std::bit_cast<float>((b + 0x7fff + ((b >> 16) & 1)) & 0xffff0000u);
}

}  // namespace trilemma
