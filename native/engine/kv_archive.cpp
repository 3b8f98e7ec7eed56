// A sequence as bytes and back: a header that says what it belongs to, its tokens, its pages as they lie in memory.
#include <cstring>

#include "fingerprint.h"
#include "kv_pool.h"

namespace trilemma {
namespace {

constexpr char kMagic[8] = {'T', 'R', 'I', 'L', 'K', 'V', '0', '1'};

struct Header {
  char magic[8];
  std::uint64_t model, layout, page_bytes, checksum;  // the checksum is of everything behind the header
  std::int32_t mode, length;
};
static_assert(sizeof(Header) == 48);

const char* name_of(std::int32_t mode) {
  static const char* const names[] = {"none", "f32", "bf16", "int8", "int4"};
  return mode >= 0 && mode < 5 ? names[mode] : "unknown";
}

std::uint64_t checksum_of(std::span<const std::uint8_t> bytes) {
  Fingerprint found;
  found.add(bytes.data(), bytes.size());
  return found.value();
}

[[noreturn]] void refuse(const std::string& why) { throw EngineFault("This saved sequence can not be restored: " + why); }

}  // namespace

std::uint64_t KvPool::layout_fingerprint() const {
  Fingerprint all;
  all.number(kKvLayoutVersion);
  all.number(page_);
  for (const Layout& l : layers_)
    for (const std::size_t n : {l.k, l.v, l.k_scale, l.v_scale, size_t(l.heads), size_t(l.head_dim), size_t(l.padded_dim)})
      all.number(std::uint64_t(n));
  return all.value();
}

std::vector<std::uint8_t> KvPool::save(int sequence, std::uint64_t fingerprint) const {
  const Slot& s = slot(sequence);
  const std::vector<std::int32_t> all = history(sequence);
  const size_t pages = mode_ == KvMode::kNone ? 0 : size_t(pages_for(s.length)), page = pages ? page_bytes_ : 0;
  const size_t token_bytes = all.size() * sizeof(std::int32_t);
  std::vector<std::uint8_t> bytes(sizeof(Header) + token_bytes + pages * page);
  std::uint8_t* at = bytes.data() + sizeof(Header);
  if (token_bytes) std::memcpy(at, all.data(), token_bytes);
  at += token_bytes;
  for (size_t p = 0; p < pages; ++p) std::memcpy(at + p * page, s.data[p], page);
  Header header{{}, fingerprint, layout_fingerprint(), page_bytes_, checksum_of(std::span(bytes).subspan(sizeof(Header))),
                std::int32_t(mode_), s.length};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  std::memcpy(bytes.data(), &header, sizeof(header));
  return bytes;
}

int KvPool::restore(std::span<const std::uint8_t> bytes, std::uint64_t fingerprint) {
  Header h;
  if (bytes.size() < sizeof(h)) refuse("it has only " + std::to_string(bytes.size()) + " bytes.");
  std::memcpy(&h, bytes.data(), sizeof(h));
  if (std::memcmp(h.magic, kMagic, sizeof(kMagic)) != 0) refuse("it does not begin as one of this version does.");
  if (h.mode != std::int32_t(mode_))
    refuse(std::string("its cache is ") + name_of(h.mode) + ", that of this engine " + name_of(std::int32_t(mode_)) +
           ". Open the engine with its precision.");
  if (h.model != fingerprint) refuse("it was computed by other weights. Compute it again with this model.");
  if (h.layout != layout_fingerprint() || h.page_bytes != page_bytes_)
    refuse("its pages are laid out otherwise: by another version, or for contexts of less than 128 positions.");
  if (h.length < 0 || h.length > capacity_)
    refuse("it holds " + std::to_string(h.length) + " positions; this context holds " + std::to_string(capacity_) + ".");
  const auto body = bytes.subspan(sizeof(h));
  const size_t token_bytes = size_t(h.length) * sizeof(std::int32_t);
  const size_t pages = mode_ == KvMode::kNone ? 0 : size_t(pages_for(h.length));
  if (body.size() != token_bytes + pages * page_bytes_ || checksum_of(body) != h.checksum) refuse("it is damaged.");
  std::vector<std::int32_t> all(static_cast<size_t>(h.length));
  if (token_bytes) std::memcpy(all.data(), body.data(), token_bytes);
  const int sequence = create();
  if (!reserve(sequence, h.length)) {
    release(sequence);
    throw EngineFault("There are not " + std::to_string(pages) + " free pages for the saved sequence. Release others.");
  }
  Slot& s = slot(sequence);
  s.length = h.length;
  if (mode_ == KvMode::kNone) s.history = all;
  for (size_t p = 0; p < pages; ++p) {
    std::memcpy(s.data[p], body.data() + token_bytes + p * page_bytes_, page_bytes_);
    const size_t from = p * size_t(page_);
    pages_.add_foreign(s.pages[p], std::span(all).subspan(from, std::min(all.size() - from, size_t(page_))));
  }
  return sequence;
}

}  // namespace trilemma
