#include "arena.h"

#include <algorithm>

namespace trilemma {
namespace {

// Small models stay on small pages: rounding up to huge ones would show in their memory.
constexpr std::size_t kFirstRegion = 8 << 20;
constexpr std::size_t kRegion = 64 << 20;

}  // namespace

std::byte* Arena::take(std::size_t bytes) {
  const std::size_t size = round_up(bytes, 64);
  if (regions_.empty() || used_ + size > regions_.back().bytes()) {
    const bool first = regions_.empty() && size <= kFirstRegion;
    if (first) {
      regions_.emplace_back(kFirstRegion);
    } else {
      const AlignedBuffer& region = regions_.emplace_back(std::max(kRegion, round_up(size, kHugePage)), kHugePage);
      if (!LaterHugePages::possible()) advise_huge(region.data(), region.bytes());
    }
    used_ = 0;
  }
  std::byte* at = regions_.back().data() + used_;
  used_ += size;
  return at;
}

void Arena::filled() {
  if (!LaterHugePages::possible()) return;
  for (const AlignedBuffer& region : regions_) {
    const bool huge = reinterpret_cast<std::uintptr_t>(region.data()) % kHugePage == 0;
    if (huge) huge_pages_.add(region.data(), &region == &regions_.back() ? used_ : region.bytes());
  }
}

}  // namespace trilemma
