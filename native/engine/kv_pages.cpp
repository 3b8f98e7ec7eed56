#include "kv_pages.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace trilemma {
namespace {

// Larger pages lie on huge ones; smaller ones would grow by that.
constexpr std::size_t kLargePage = 1 << 20;

}  // namespace

Reservation::Reservation(std::size_t bytes, bool huge) {
  if (bytes == 0) return;
#if defined(__linux__)
  const std::size_t alignment = huge ? kHugePage : 64;
  mapped_bytes_ = bytes + (huge ? kHugePage : 0);
  mapped_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped_ == MAP_FAILED) throw std::bad_alloc();
  data_ = reinterpret_cast<std::uint8_t*>(round_up(reinterpret_cast<std::uintptr_t>(mapped_), alignment));
  if (huge) advise_huge(data_, bytes);
#else
  buffer_ = AlignedBuffer(bytes);
  data_ = buffer_.as<std::uint8_t>();
#endif
}

Reservation::~Reservation() {
#if defined(__linux__)
  if (mapped_bytes_) munmap(mapped_, mapped_bytes_);
#endif
}

KvPages::KvPages(int count, int positions, std::size_t bytes, bool share)
    : memory_(size_t(count) * bytes, bytes >= kLargePage),
      positions_(positions),
      bytes_(bytes),
      share_(share),
      pages_(static_cast<size_t>(count)),
      tokens_(size_t(count) * size_t(positions)),
      free_(static_cast<size_t>(count)) {
  for (int i = 0; i < count; ++i) free_[size_t(i)] = count - 1 - i;
}

std::size_t KvPages::table_bytes(int count, int positions) {
  return size_t(count) * (sizeof(Page) + sizeof(std::int32_t) * (size_t(positions) + 1));
}

int KvPages::take() {
  int page = kNoPage;
  if (!free_.empty()) {
    page = free_.back();
    free_.pop_back();
  } else if ((page = evict()) == kNoPage) {
    return kNoPage;
  }
  Page& p = pages_[size_t(page)];
  if (p.used) std::memset(data(page), 0, bytes_);  // as when it was new: nothing of another text stays
  p = {.holders = 1, .used = true};
  return page;
}

int KvPages::take_copy(int page, int tokens) {
  const int copy = take();
  if (copy == kNoPage) return kNoPage;
  std::memcpy(data(copy), data(page), bytes_);
  record(copy, {first_token(page), size_t(tokens)});
  if (at(page).linked) link(copy, at(page).before);
  pages_[size_t(copy)].foreign = at(page).foreign;
  drop(page, true);
  return copy;
}

void KvPages::drop(int page, bool keep) {
  Page& p = pages_[size_t(page)];
  if (--p.holders > 0) return;
  if (p.linked && (p.children > 0 || (keep && p.tokens > 0)))
    p.released = ++clock_;
  else
    free(page);
}

void KvPages::free(int page) {
  unlink(page);
  free_.push_back(page);
}

// A page is left after those that go on from it, so the oldest one has no children.
int KvPages::evict() {
  int oldest = kNoPage;
  for (int i = 0; i < count(); ++i)
    if (at(i).holders == 0 && at(i).linked && (oldest == kNoPage || at(i).released < at(oldest).released)) oldest = i;
  if (oldest != kNoPage) unlink(oldest);
  return oldest;
}

void KvPages::link(int page, int before) {
  Page& p = pages_[size_t(page)];
  p.linked = true;
  p.before = before;
  if (before != kNoPage) ++pages_[size_t(before)].children;
}

void KvPages::unlink(int page) {
  Page& p = pages_[size_t(page)];
  if (p.linked && p.before != kNoPage) --pages_[size_t(p.before)].children;
  p.linked = false;
  p.before = kNoPage;
}

void KvPages::record(int page, std::span<const std::int32_t> tokens) {
  Page& p = pages_[size_t(page)];
  std::copy(tokens.begin(), tokens.end(), tokens_.begin() + std::ptrdiff_t(page) * positions_ + p.tokens);
  p.tokens += int(tokens.size());
}

int KvPages::add(int page, int before, std::span<const std::int32_t> tokens) {
  record(page, tokens);
  if (!share_ || at(page).foreign || (before != kNoPage && !at(before).linked)) return page;
  unlink(page);  // not to be found itself
  if (at(page).tokens == positions_) {
    const Match same = find(before, this->tokens(page));
    if (same.tokens == positions_) {
      hold(same.page);
      pages_[size_t(page)].holders = 0;
      free(page);
      return same.page;
    }
  }
  link(page, before);
  return page;
}

void KvPages::add_foreign(int page, std::span<const std::int32_t> tokens) {
  record(page, tokens);
  pages_[size_t(page)].foreign = true;
}

KvPages::Match KvPages::find(int before, std::span<const std::int32_t> tokens) const {
  Match best;
  for (int i = 0; i < count(); ++i) {
    const Page& p = at(i);
    if (!p.linked || p.before != before) continue;
    const std::int32_t* own = first_token(i);
    const int most = int(std::min(tokens.size(), size_t(p.tokens)));
    const int same = int(std::mismatch(own, own + most, tokens.begin()).first - own);
    if (same > best.tokens) best = {i, same};
  }
  return best;
}

KvPages::Use KvPages::use() const {
  Use use{count(), 0, 0};
  for (const Page& p : pages_) (p.holders ? use.held : use.kept) += p.holders || p.linked;
  return use;
}

}  // namespace trilemma
