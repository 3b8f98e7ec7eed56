#include "kv_pool.h"

#include <algorithm>
#include <limits>

namespace trilemma {
namespace {

KvType type_of(KvMode mode) {
  switch (mode) {
    case KvMode::kBf16: return kKvBf16;
    case KvMode::kInt8: return kKvInt8;
    case KvMode::kInt4: return kKvInt4;
    default: return kKvF32;
  }
}

std::size_t bits_of(KvType type) { return type == kKvF32 ? 32 : type == kKvBf16 ? 16 : type == kKvInt8 ? 8 : 4; }

// Fewer tokens in common are not worth the copy of a page.
constexpr int kLeastShared = 8;

// Dimensions of one lane's values, and of a line of values: see KvView.
std::size_t step_of(KvType type) { return 32 / bits_of(type); }
std::size_t line_of(KvType type) { return type == kKvInt4 ? 32 : 16; }

}  // namespace

int KvPool::page_positions(int capacity) { return std::min(int(round_up(size_t(capacity), kKvTile)), int(kKvPage)); }

int KvPool::page_count(const KvPoolOptions& o) {
  if (o.mode == KvMode::kNone) return 0;
  const size_t page = size_t(page_positions(o.capacity)), most = size_t(o.sequences) * size_t(pages_for(o.capacity));
  const size_t wanted = o.positions ? std::min((size_t(o.positions) + page - 1) / page, most) : most;
  return int(std::min(wanted, size_t(std::numeric_limits<std::int32_t>::max())));
}

KvPool::KvPool(const DecoderConfig& config, const KvPoolOptions& o)
    : mode_(o.mode),
      type_(type_of(o.mode)),
      capacity_(o.capacity),
      page_(page_positions(o.capacity)),
      share_(o.share_prefixes && o.mode != KvMode::kNone),
      tables_(table_bytes_of(o)),
      layers_(lay_out(config, mode_, page_).first),
      page_bytes_(lay_out(config, mode_, page_).second),
      pages_(page_count(o), page_, page_bytes_, share_),
      slots_(static_cast<size_t>(o.sequences)) {
  const size_t pages = size_t(pages_for(capacity_));
  for (Slot& s : slots_) {
    if (mode_ == KvMode::kNone) {
      s.history.reserve(size_t(capacity_));
    } else {
      s.pages.reserve(pages);
      s.data.reserve(pages);
    }
  }
  if (mode_ != KvMode::kNone) return;
  shared_ = AlignedBuffer(pages * page_bytes_);
  for (size_t p = 0; p < pages; ++p) shared_pages_.push_back(shared_.as<std::uint8_t>() + p * page_bytes_);
}

std::pair<std::vector<KvPool::Layout>, std::size_t> KvPool::lay_out(const DecoderConfig& config, KvMode mode,
                                                                    int page) {
  const KvType type = type_of(mode);
  std::vector<Layout> layers;
  std::size_t at = 0, largest = 0;
  const auto take = [&](std::size_t bytes) {
    const std::size_t start = at;
    at += round_up(bytes, 64);
    return start;
  };
  for (const LayerConfig& layer : config.layers) {
    Layout& l = layers.emplace_back();
    if (!layer.attention) continue;
    if (mode == KvMode::kNone) at = 0;  // every layer starts at the front of the shared buffer
    l.heads = layer.attention->kv_heads;
    l.head_dim = layer.attention->head_dim;
    l.key_dim = int(round_up(size_t(l.head_dim), step_of(type)));
    l.padded_dim = int(round_up(size_t(l.head_dim), 16));
    l.value_dim = int(round_up(size_t(l.head_dim), line_of(type)));
    const std::size_t positions = size_t(l.heads) * size_t(page);
    l.k = take(positions * size_t(l.key_dim) * bits_of(type) / 8);
    l.v = take(positions * size_t(l.value_dim) * bits_of(type) / 8);
    if (type == kKvInt8 || type == kKvInt4) {
      l.k_scale = take(positions * sizeof(float));  // or two bf16
      l.v_scale = take(positions * sizeof(float));
    }
    largest = std::max(largest, at);
  }
  return {std::move(layers), largest};
}

std::size_t KvPool::table_bytes_of(const KvPoolOptions& o) {
  if (o.mode == KvMode::kNone) return 0;
  const size_t entries = size_t(o.sequences) * size_t(pages_for(o.capacity));
  return KvPages::table_bytes(page_count(o), page_positions(o.capacity)) +
         entries * (sizeof(std::int32_t) + sizeof(std::uint8_t*));
}

KvPool::Bytes KvPool::bytes_of(const DecoderConfig& config, const KvPoolOptions& o) {
  const std::size_t page = lay_out(config, o.mode, page_positions(o.capacity)).second;
  if (o.mode != KvMode::kNone) return {size_t(page_count(o)) * page, table_bytes_of(o)};
  return {size_t(pages_for(o.capacity)) * page + size_t(o.sequences) * size_t(o.capacity) * sizeof(std::int32_t), 0};
}

std::size_t KvPool::bytes() const {
  std::size_t total = shared_.bytes() + size_t(pages_.count()) * page_bytes_;
  for (const Slot& s : slots_) total += s.history.capacity() * sizeof(std::int32_t);
  return total;
}

KvPool::Slot& KvPool::slot(int sequence) { return const_cast<Slot&>(static_cast<const KvPool*>(this)->slot(sequence)); }

const KvPool::Slot& KvPool::slot(int sequence) const {
  if (sequence < 0 || size_t(sequence) >= slots_.size() || !slots_[size_t(sequence)].used)
    throw EngineFault("There is no sequence " + std::to_string(sequence) + " in this context.");
  return slots_[size_t(sequence)];
}

void KvPool::set_page(Slot& slot, int index, int page) {
  slot.pages[size_t(index)] = page;
  slot.data[size_t(index)] = pages_.data(page);
}

int KvPool::create() {
  for (size_t i = 0; i < slots_.size(); ++i)
    if (!slots_[i].used) {
      slots_[i].used = true;
      return int(i);
    }
  throw EngineFault("All " + std::to_string(slots_.size()) +
                    " sequences of this context are in use. Release one, or open the context for more.");
}

std::pair<int, int> KvPool::create(std::span<const std::int32_t> tokens) {
  const int sequence = create();
  Slot& s = slot(sequence);
  if (!share_ || tokens.empty()) return {sequence, 0};
  tokens = tokens.first(std::min(tokens.size(), size_t(capacity_)) - 1);  // the last one gives the logits
  for (int before = KvPages::kNoPage; !tokens.empty();) {
    const KvPages::Match match = pages_.find(before, tokens.first(std::min(tokens.size(), size_t(page_))));
    const bool whole = match.tokens == page_;
    if (!whole && match.tokens < kLeastShared) break;
    pages_.hold(match.page);
    s.pages.push_back(match.page);
    s.data.push_back(pages_.data(match.page));
    s.length += match.tokens;
    tokens = tokens.subspan(size_t(match.tokens));
    before = match.page;
    if (!whole) break;
  }
  return {sequence, s.length};
}

int KvPool::fork(int sequence) {
  const int fresh = (slot(sequence), create());
  const Slot& from = slot(sequence);
  Slot& to = slot(fresh);
  to.history = from.history;
  to.length = from.length;
  to.pages = from.pages;
  to.data = from.data;
  for (const std::int32_t page : to.pages) pages_.hold(page);
  return fresh;
}

// The last page first, so that it is also the first whose memory is taken.
void KvPool::trim(Slot& s, bool keep) {
  const size_t wanted = size_t(pages_for(s.length));
  while (s.pages.size() > wanted) {
    pages_.drop(s.pages.back(), keep);
    s.pages.pop_back();
    s.data.pop_back();
  }
}

void KvPool::truncate(int sequence, int length) {
  Slot& s = slot(sequence);
  if (length < 0 || length > s.length)
    throw EngineFault("Can not truncate a sequence of " + std::to_string(s.length) + " positions to " +
                      std::to_string(length) + ".");
  s.length = length;
  if (mode_ == KvMode::kNone)
    s.history.resize(size_t(length));
  else
    trim(s, false);
}

void KvPool::release(int sequence) {
  Slot& s = slot(sequence);
  s.length = 0;
  s.history.clear();
  trim(s, share_);
  s.used = false;
}

bool KvPool::reserve(int sequence, int count) {
  Slot& s = slot(sequence);
  if (mode_ == KvMode::kNone) return true;
  if (const int filled = s.length % page_; filled != 0) {
    const int last = s.pages[size_t(pages_for(s.length) - 1)];
    if (pages_.writable(last)) {
      pages_.cut(last, filled);
    } else {
      const int copy = pages_.take_copy(last, filled);
      if (copy == KvPages::kNoPage) return false;
      set_page(s, pages_for(s.length) - 1, copy);
    }
  }
  while (int(s.pages.size()) < pages_for(s.length + count)) {
    const int page = pages_.take();
    if (page == KvPages::kNoPage) {
      trim(s, false);
      return false;
    }
    s.pages.push_back(page);
    s.data.push_back(pages_.data(page));
  }
  return true;
}

void KvPool::append(int sequence, std::span<const std::int32_t> tokens) {
  Slot& s = slot(sequence);
  if (mode_ == KvMode::kNone) {
    s.history.insert(s.history.end(), tokens.begin(), tokens.end());
    s.length += int(tokens.size());
  }
  while (mode_ != KvMode::kNone && !tokens.empty()) {
    const int index = s.length / page_, count = int(std::min(tokens.size(), size_t(page_ - s.length % page_)));
    const int before = index ? s.pages[size_t(index - 1)] : KvPages::kNoPage;
    set_page(s, index, pages_.add(s.pages[size_t(index)], before, tokens.first(size_t(count))));
    s.length += count;
    tokens = tokens.subspan(size_t(count));
  }
}

std::vector<std::int32_t> KvPool::history(int sequence) const {
  const Slot& s = slot(sequence);
  std::vector<std::int32_t> all = s.history;
  for (const std::int32_t page : s.pages) {
    const auto part = pages_.tokens(page);
    all.insert(all.end(), part.begin(), part.end());
  }
  all.resize(size_t(s.length));
  return all;
}

KvView KvPool::view(int sequence, int layer) const {
  const Layout& l = layers_[size_t(layer)];
  const auto& pages = mode_ == KvMode::kNone ? shared_pages_ : slot(sequence).data;
  return {pages.data(), l.k, l.v, l.k_scale, l.v_scale, type_, l.head_dim, l.key_dim, l.padded_dim, l.value_dim, page_};
}

}  // namespace trilemma
