// The KV cache of the sequences of a context: create, fork, truncate, release, save, restore.
//
// A sequence is a table of pages (kv_pages.h), taken as it grows, out of one reserve for all. Forks share pages and copy
// the last, partly filled one when either side writes on; a sequence that begins like another one takes over its pages.
// Without a cache (KvMode::kNone) a sequence keeps only its tokens, and one f32 buffer of a single layer is reused by
// all layers while everything is computed again.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "aligned.h"
#include "config.h"
#include "kv_pages.h"

namespace trilemma {

enum class KvMode { kNone, kF32, kBf16, kInt8, kInt4 };

// Raise it when the inside of a page changes: saved sequences of another version are refused.
constexpr std::uint32_t kKvLayoutVersion = 2;

struct KvPoolOptions {
  KvMode mode = KvMode::kBf16;
  int capacity = 0;  // positions of each sequence
  int sequences = 1;
  int positions = 0;  // of all sequences together, rounded up to pages; 0: capacity of each
  bool share_prefixes = false;
};

class KvPool {
 public:
  KvPool(const DecoderConfig& config, const KvPoolOptions& options);

  // An empty sequence. Throws EngineFault when all are taken.
  int create();
  // A sequence that already holds as many of `tokens` as are in the cache, never all of them: (sequence, positions).
  std::pair<int, int> create(std::span<const std::int32_t> tokens);
  int fork(int sequence);
  void truncate(int sequence, int length);
  void release(int sequence);

  int length(int sequence) const { return slot(sequence).length; }
  int capacity() const { return capacity_; }
  KvMode mode() const { return mode_; }
  std::vector<std::int32_t> history(int sequence) const;

  // Room for `count` more positions, the pages of which nobody else holds. False, with the sequence as it was, when all
  // pages are held.
  bool reserve(int sequence, int count);
  // Called once the tokens' keys and values are in the cache.
  void append(int sequence, std::span<const std::int32_t> tokens);

  // Valid until the sequence is changed.
  KvView view(int sequence, int layer) const;

  // A sequence as bytes for `restore` into a pool over the same model, whose `fingerprint` the caller knows.
  std::vector<std::uint8_t> save(int sequence, std::uint64_t fingerprint) const;
  // Throws EngineFault for bytes that are damaged, of another model or form of cache, or too long.
  int restore(std::span<const std::uint8_t> bytes, std::uint64_t fingerprint);

  KvPages::Use pages() const { return pages_.use(); }
  std::size_t bytes() const;
  std::size_t table_bytes() const { return tables_; }
  struct Bytes {
    std::size_t cache, tables;
  };
  // What a pool of these sizes would take.
  static Bytes bytes_of(const DecoderConfig& config, const KvPoolOptions& options);

 private:
  struct Layout {  // of one layer inside a page, in bytes
    std::size_t k = 0, v = 0, k_scale = 0, v_scale = 0;
    int heads = 0, head_dim = 0, key_dim = 0, padded_dim = 0, value_dim = 0;
  };
  struct Slot {
    bool used = false;
    int length = 0;
    std::vector<std::int32_t> history;  // kNone only
    std::vector<std::int32_t> pages;
    std::vector<std::uint8_t*> data;  // of the pages
  };

  // Layouts of all layers, and the bytes of a page (kNone: of one that all layers share).
  static std::pair<std::vector<Layout>, std::size_t> lay_out(const DecoderConfig& config, KvMode mode, int page);
  static int page_positions(int capacity);
  static int pages_for(int positions) { return (positions + kKvPage - 1) / kKvPage; }
  static int page_count(const KvPoolOptions& options);
  static std::size_t table_bytes_of(const KvPoolOptions& options);
  Slot& slot(int sequence);
  const Slot& slot(int sequence) const;
  void set_page(Slot& slot, int index, int page);
  void trim(Slot& slot, bool keep);
  std::uint64_t layout_fingerprint() const;

  KvMode mode_;
  KvType type_;
  int capacity_, page_;  // positions
  bool share_;
  std::size_t tables_;
  std::vector<Layout> layers_;
  std::size_t page_bytes_;
  KvPages pages_;
  std::vector<Slot> slots_;
  AlignedBuffer shared_;  // kNone only, and its pages
  std::vector<std::uint8_t*> shared_pages_;
};

}  // namespace trilemma
