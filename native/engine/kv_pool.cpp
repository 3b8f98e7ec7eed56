#include "kv_pool.h"

#include <algorithm>
#include <cstring>
#include <tuple>

namespace trilemma {
namespace {

KvType type_of(KvMode mode) { return mode == KvMode::kInt8 ? kKvInt8 : mode == KvMode::kBf16 ? kKvBf16 : kKvF32; }

std::size_t element_bytes(KvType type) { return type == kKvF32 ? 4 : type == kKvBf16 ? 2 : 1; }

}  // namespace

int KvPool::page_positions(int capacity) { return std::min(int(round_up(size_t(capacity), kKvTile)), int(kKvPage)); }

std::vector<std::uint8_t*> KvPool::cut(const AlignedBuffer& data, std::size_t page_bytes, int pages) {
  std::vector<std::uint8_t*> all;
  for (int p = 0; p < pages; ++p) all.push_back(data.as<std::uint8_t>() + size_t(p) * page_bytes);
  return all;
}

KvPool::KvPool(const DecoderConfig& config, KvMode mode, int capacity, int sequences)
    : mode_(mode), type_(type_of(mode)), capacity_(capacity), page_(page_positions(capacity)) {
  std::tie(layers_, page_bytes_) = lay_out(config, mode, page_);
  slots_.resize(size_t(sequences));
  const int pages = pages_for(capacity);
  if (mode == KvMode::kNone) {
    shared_ = AlignedBuffer(size_t(pages) * page_bytes_);
    shared_pages_ = cut(shared_, page_bytes_, pages);
    for (Slot& s : slots_) s.history.reserve(size_t(capacity));
    return;
  }
  for (Slot& s : slots_) {
    s.data = AlignedBuffer(size_t(pages) * page_bytes_);
    s.pages = cut(s.data, page_bytes_, pages);
  }
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
    l.padded_dim = int(round_up(size_t(l.head_dim), 16));
    const std::size_t positions = size_t(l.heads) * size_t(page);
    l.k = take(positions * size_t(l.head_dim) * element_bytes(type));
    l.v = take(positions * size_t(l.padded_dim) * element_bytes(type));
    if (type == kKvInt8) {
      l.k_scale = take(positions * sizeof(float));
      l.v_scale = take(positions * sizeof(float));
    }
    largest = std::max(largest, at);
  }
  return {std::move(layers), largest};
}

std::size_t KvPool::bytes_of(const DecoderConfig& config, KvMode mode, int capacity, int sequences) {
  const std::size_t block = size_t(pages_for(capacity)) * lay_out(config, mode, page_positions(capacity)).second;
  if (mode == KvMode::kNone) return block + size_t(sequences) * size_t(capacity) * sizeof(std::int32_t);
  return size_t(sequences) * block;
}

KvPool::Slot& KvPool::slot(int sequence) { return const_cast<Slot&>(static_cast<const KvPool*>(this)->slot(sequence)); }

const KvPool::Slot& KvPool::slot(int sequence) const {
  if (sequence < 0 || size_t(sequence) >= slots_.size() || !slots_[size_t(sequence)].used)
    throw EngineFault("There is no sequence " + std::to_string(sequence) + " in this context.");
  return slots_[size_t(sequence)];
}

int KvPool::create() {
  for (size_t i = 0; i < slots_.size(); ++i)
    if (!slots_[i].used) {
      slots_[i].used = true;
      slots_[i].length = 0;
      slots_[i].history.clear();
      return int(i);
    }
  throw EngineFault("All " + std::to_string(slots_.size()) +
                    " sequences of this context are in use. Release one, or open the context for more.");
}

int KvPool::fork(int sequence) {
  const int fresh = (slot(sequence), create());
  const Slot& from = slot(sequence);
  Slot& to = slot(fresh);
  to.history = from.history;
  to.length = from.length;
  if (mode_ != KvMode::kNone) std::memcpy(to.data.data(), from.data.data(), size_t(pages_for(from.length)) * page_bytes_);
  return fresh;
}

void KvPool::truncate(int sequence, int length) {
  Slot& s = slot(sequence);
  if (length < 0 || length > s.length)
    throw EngineFault("Can not truncate a sequence of " + std::to_string(s.length) + " positions to " +
                      std::to_string(length) + ".");
  s.length = length;
  if (mode_ == KvMode::kNone) s.history.resize(size_t(length));
}

void KvPool::release(int sequence) { slot(sequence).used = false; }

void KvPool::append(int sequence, const std::int32_t* tokens, int count) {
  Slot& s = slot(sequence);
  s.length += count;
  if (mode_ == KvMode::kNone) s.history.insert(s.history.end(), tokens, tokens + count);
}

KvView KvPool::view(int sequence, int layer) const {
  const Layout& l = layers_[size_t(layer)];
  const auto& pages = mode_ == KvMode::kNone ? shared_pages_ : slot(sequence).pages;
  return {pages.data(), l.k, l.v, l.k_scale, l.v_scale, type_, l.head_dim, l.padded_dim, page_};
}

std::size_t KvPool::bytes() const {
  std::size_t total = shared_.bytes();
  for (const Slot& s : slots_) total += s.data.bytes() + s.history.capacity() * sizeof(std::int32_t);
  return total;
}

}  // namespace trilemma
