// The KV cache of every sequence of a context: create, fork, truncate, release.
//
// Every sequence owns pages for `capacity` positions. Without a cache (KvMode::kNone) a sequence keeps only its
// tokens, and one f32 buffer of a single layer is reused by all layers while everything is computed again.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "aligned.h"
#include "config.h"

namespace trilemma {

enum class KvMode { kNone, kF32, kBf16, kInt8 };

class KvPool {
 public:
  KvPool(const DecoderConfig& config, KvMode mode, int capacity, int sequences);

  // An empty sequence. Throws EngineFault when all are taken.
  int create();
  int fork(int sequence);
  void truncate(int sequence, int length);
  void release(int sequence);

  int length(int sequence) const { return slot(sequence).length; }
  int capacity() const { return capacity_; }
  KvMode mode() const { return mode_; }
  const std::vector<std::int32_t>& history(int sequence) const { return slot(sequence).history; }
  // Called once the tokens' keys and values are in the cache.
  void append(int sequence, const std::int32_t* tokens, int count);

  // Valid until the sequence is released.
  KvView view(int sequence, int layer) const;
  std::size_t bytes() const;
  // What a pool of these sizes would take.
  static std::size_t bytes_of(const DecoderConfig& config, KvMode mode, int capacity, int sequences);

 private:
  struct Layout {  // of one layer inside a page, in bytes
    std::size_t k = 0, v = 0, k_scale = 0, v_scale = 0;
    int heads = 0, head_dim = 0, padded_dim = 0;
  };
  struct Slot {
    bool used = false;
    int length = 0;
    std::vector<std::int32_t> history;  // kNone only
    AlignedBuffer data;
    std::vector<std::uint8_t*> pages;
  };

  // Layouts of all layers, and the bytes of a page (kNone: of one that all layers share).
  static std::pair<std::vector<Layout>, std::size_t> lay_out(const DecoderConfig& config, KvMode mode, int page);
  static int page_positions(int capacity);
  static int pages_for(int positions) { return (positions + kKvPage - 1) / kKvPage; }
  Slot& slot(int sequence);
  const Slot& slot(int sequence) const;
  static std::vector<std::uint8_t*> cut(const AlignedBuffer& data, std::size_t page_bytes, int pages);

  KvMode mode_;
  KvType type_;
  int capacity_, page_;  // positions
  std::size_t page_bytes_ = 0;
  std::vector<Layout> layers_;
  std::vector<Slot> slots_;
  AlignedBuffer shared_;  // kNone only, and its pages
  std::vector<std::uint8_t*> shared_pages_;
};

}  // namespace trilemma
