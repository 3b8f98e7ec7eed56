// Where weights lie that are not used from a mapped file: large regions, those beyond the first on huge pages sooner or
// later.
//
// Decode reads every weight once a token; with 4 KiB pages its address translation costs 6% of the bandwidth of one host,
// a quarter to a third of another's. Matrices are smaller than a huge page, so they share regions.
#pragma once

#include <memory>
#include <vector>

#include "aligned.h"
#include "huge_pages.h"

namespace trilemma {

class Arena {
 public:
  // 64-byte aligned, zero-filled, valid as long as the arena.
  std::byte* take(std::size_t bytes);
  // Something that holds further weights, such as a mapped file, kept as long as the arena.
  void keep(std::shared_ptr<const void> owner) { kept_.push_back(std::move(owner)); }
  // Everything is filled: what is there may move to huge pages.
  void filled();
  const LaterHugePages& huge_pages() const { return huge_pages_; }

 private:
  std::vector<AlignedBuffer> regions_;
  std::vector<std::shared_ptr<const void>> kept_;
  std::size_t used_ = 0;  // of the last region
  LaterHugePages huge_pages_;
};

}  // namespace trilemma
