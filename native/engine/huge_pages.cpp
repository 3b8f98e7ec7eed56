#include "huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1
#endif
#endif

namespace trilemma {

#if defined(__linux__)

void advise_huge(void* data, std::size_t bytes) { madvise(data, bytes, MADV_HUGEPAGE); }

bool LaterHugePages::possible() {
  static const bool known = madvise(nullptr, 0, MADV_COLLAPSE) == 0;
  return known;
}

void LaterHugePages::add(std::byte* data, std::size_t bytes) {
  for (std::size_t at = 0; at + kHugePage <= bytes; at += kHugePage) pages_.push_back(data + at);
}

void LaterHugePages::move_one() const {
  const std::size_t page = next_.fetch_add(1, std::memory_order_relaxed);
  if (page < pages_.size()) madvise(pages_[page], kHugePage, MADV_COLLAPSE);  // where none is free, it stays as it is
}

#else

void advise_huge(void*, std::size_t) {}
bool LaterHugePages::possible() { return false; }
void LaterHugePages::add(std::byte*, std::size_t) {}
void LaterHugePages::move_one() const {}

#endif

}  // namespace trilemma
