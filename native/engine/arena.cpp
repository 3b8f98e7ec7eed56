#include "arena.h"

#include <algorithm>

#include "huge_pages.h"

namespace trilemma {
namespace {

// Small models stay on small pages: rounding up to huge ones would show in their memory.
constexpr std::size_t kFirstRegion = 8 << 20;
constexpr std::size_t kRegion = 64 << 20;

AlignedBuffer new_region(std::size_t bytes, bool first) {
  AlignedBuffer region(bytes, first ? 64 : kHugePage);
  if (!first) advise_huge(region.data(), region.bytes());
  return region;
}

}  // namespace

std::byte* Arena::take(std::size_t bytes) {
  const std::size_t size = round_up(bytes, 64);
  if (regions_.empty() || used_ + size > regions_.back().bytes()) {
    const bool first = regions_.empty() && size <= kFirstRegion;
    regions_.push_back(new_region(first ? kFirstRegion : std::max(kRegion, round_up(size, kHugePage)), first));
    used_ = 0;
  }
  std::byte* at = regions_.back().data() + used_;
  used_ += size;
  return at;
}

}  // namespace trilemma
