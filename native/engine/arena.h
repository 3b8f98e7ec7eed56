// Where all weights lie: large regions, on huge pages beyond the first.
//
// Decode reads every weight once a token; with 4 KiB pages its address translation costs a quarter to a third of the
// bandwidth. Matrices are smaller than a huge page, so they share regions.
#pragma once

#include <vector>

#include "aligned.h"

namespace trilemma {

class Arena {
 public:
  // 64-byte aligned, zero-filled, valid as long as the arena.
  std::byte* take(std::size_t bytes);
  // Calls visit(data, bytes) for all that was taken, in order.
  template <class Visit>
  void each(const Visit& visit) const {
    for (const AlignedBuffer& region : regions_)
      visit(region.data(), &region == &regions_.back() ? used_ : region.bytes());
  }

 private:
  std::vector<AlignedBuffer> regions_;
  std::size_t used_ = 0;  // of the last region
};

}  // namespace trilemma
