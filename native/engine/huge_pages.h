// Large areas on huge pages: reading them then costs little address translation.
#pragma once

#include <atomic>
#include <cstddef>
#include <vector>

namespace trilemma {

constexpr std::size_t kHugePage = 2 << 20;

// Only advice: a refusal costs time alone.
void advise_huge(void* data, std::size_t bytes);

// Areas that are filled on small pages, and moved to huge ones once they have been in use for a while.
//
// A huge page is slow to come by for the first time: it is cleared whole, and a virtual machine may have to fetch it from
// its host. A model that is opened so has its first token up to a second later; moved afterwards, the page costs the same,
// but nobody waits for it who asks for a few tokens only.
class LaterHugePages {
 public:
  // Whether the system can move pages that are filled. Else areas are better advised from the start.
  static bool possible();

  // An area that begins at a huge page, as far as it is filled. Not safe beside `move_one`.
  void add(std::byte* data, std::size_t bytes);
  std::size_t count() const { return pages_.size(); }
  bool left() const { return next_.load(std::memory_order_relaxed) < pages_.size(); }
  // Moves the next page, if one is left; any threads at once, beside any readers.
  void move_one() const;

 private:
  std::vector<std::byte*> pages_;
  mutable std::atomic<std::size_t> next_{0};
};

}  // namespace trilemma
