// Large areas on huge pages: reading them then costs no address translation.
#pragma once

#include <cstddef>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace trilemma {

constexpr std::size_t kHugePage = 2 << 20;

// Only advice: a refusal costs time alone.
inline void advise_huge([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__)
  madvise(data, bytes, MADV_HUGEPAGE);
#endif
}

}  // namespace trilemma
