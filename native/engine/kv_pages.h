// The pages of a KV cache: who holds them, which tokens they are of, and which of them others may share.
//
// All pages are reserved at once and none is touched before it is taken, so that the size is known beforehand and a
// page never moves. A page is held by any number of sequences; it may be written by its only holder, as long as no page
// goes on from it. With `share`, pages that are done stay as children of the page before them (a tree of prefixes, as
// in Zheng et al. 2023, "SGLang"): whoever begins with the same tokens finds them, compared token by token, and pages
// that nobody holds are kept until their memory is needed, the longest unused first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "aligned.h"

namespace trilemma {

// Zero-filled address space of the system's own pages: nothing is resident before it is written.
class Reservation {
 public:
  explicit Reservation(std::size_t bytes, bool huge);
  ~Reservation();
  Reservation(const Reservation&) = delete;
  std::uint8_t* data() const { return data_; }

 private:
  void* mapped_ = nullptr;
  std::size_t mapped_bytes_ = 0;
  AlignedBuffer buffer_;  // where the system can not map
  std::uint8_t* data_ = nullptr;
};

class KvPages {
 public:
  static constexpr int kNoPage = -1;

  // `count` pages of `positions` positions and `bytes` bytes each.
  KvPages(int count, int positions, std::size_t bytes, bool share);

  int count() const { return int(pages_.size()); }
  std::uint8_t* data(int page) const { return memory_.data() + std::size_t(page) * bytes_; }
  std::span<const std::int32_t> tokens(int page) const { return {first_token(page), std::size_t(at(page).tokens)}; }

  // A zero-filled page with one holder; kNoPage when all are held.
  int take();
  // One with the first `tokens` positions of `page`, of which one holder less is then counted; kNoPage as above.
  int take_copy(int page, int tokens);
  void hold(int page) { ++pages_[size_t(page)].holders; }
  // One holder less. An unheld page that others may share is kept when `keep` says so or others go on from it.
  void drop(int page, bool keep);
  bool writable(int page) const { return at(page).holders == 1 && at(page).children == 0; }

  // Forgets the tokens from `tokens` on, which are about to be written over.
  void cut(int page, int tokens) { pages_[size_t(page)].tokens = std::min(at(page).tokens, tokens); }
  // Records what was written behind the page's tokens, which follow those of `before` (kNoPage: nothing). When the page
  // is full and another one holds the same beginning, that one takes its place. Returns the page to go on with.
  int add(int page, int before, std::span<const std::int32_t> tokens);
  // For what was not computed here: neither the page nor what follows it is offered to others.
  void add_foreign(int page, std::span<const std::int32_t> tokens);

  struct Match {
    int page = kNoPage, tokens = 0;
  };
  // The page behind `before` that begins with the most of `tokens`.
  Match find(int before, std::span<const std::int32_t> tokens) const;

  struct Use {
    int total, held, kept;
  };
  Use use() const;
  // Of the tables beside the pages.
  static std::size_t table_bytes(int count, int positions);

 private:
  struct Page {
    std::int32_t holders = 0, tokens = 0;
    std::int32_t before = kNoPage, children = 0;
    std::uint64_t released = 0;  // when its last holder left
    bool linked = false;         // in the tree
    bool used = false;           // written before
    bool foreign = false;
  };

  const Page& at(int page) const { return pages_[size_t(page)]; }
  const std::int32_t* first_token(int page) const { return tokens_.data() + size_t(page) * size_t(positions_); }
  void record(int page, std::span<const std::int32_t> tokens);
  void link(int page, int before);
  void unlink(int page);
  void free(int page);
  // The page unheld for longest leaves the tree; kNoPage when there is none.
  int evict();

  Reservation memory_;
  int positions_;
  std::size_t bytes_;
  bool share_;
  std::uint64_t clock_ = 0;
  std::vector<Page> pages_;
  std::vector<std::int32_t> tokens_;  // (page, position)
  std::vector<std::int32_t> free_;    // the last one is taken first: memory that was touched before
};

}  // namespace trilemma
