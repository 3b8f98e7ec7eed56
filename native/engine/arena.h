// Where weights lie that are not used from a mapped file: large regions, on huge pages beyond the first.
//
// Decode reads every weight once a token; with 4 KiB pages its address translation costs a quarter to a third of the
// bandwidth. Matrices are smaller than a huge page, so they share regions.
#pragma once

#include <memory>
#include <vector>

#include "aligned.h"

namespace trilemma {

class Arena {
 public:
  // 64-byte aligned, zero-filled, valid as long as the arena.
  std::byte* take(std::size_t bytes);
  // Something that holds further weights, such as a mapped file, kept as long as the arena.
  void keep(std::shared_ptr<const void> owner) { kept_.push_back(std::move(owner)); }

 private:
  std::vector<AlignedBuffer> regions_;
  std::vector<std::shared_ptr<const void>> kept_;
  std::size_t used_ = 0;  // of the last region
};

}  // namespace trilemma
