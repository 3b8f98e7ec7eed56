// The KV cache of every sequence of a context: create, fork, truncate, release.
//
// Every sequence owns a block for `capacity` positions. Without a cache (KvMode::kNone) a sequence keeps only its
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

  KvView view(int sequence, int layer) const;
  std::size_t bytes() const;
  // What a pool of these sizes would take.
  static std::size_t bytes_of(const DecoderConfig& config, KvMode mode, int capacity, int sequences);

 private:
  struct Layout {  // of one layer inside a sequence's block, in bytes
    std::size_t k = 0, v = 0, k_scale = 0, v_scale = 0;
    int heads = 0, head_dim = 0, padded_dim = 0;
  };
  struct Slot {
    bool used = false;
    int length = 0;
    std::vector<std::int32_t> history;  // kNone only
    AlignedBuffer data;
  };

  // Layouts of all layers, and the bytes of a sequence's block (kNone: of the buffer that all layers share).
  static std::pair<std::vector<Layout>, std::size_t> lay_out(const DecoderConfig& config, KvMode mode, int capacity);
  Slot& slot(int sequence);
  const Slot& slot(int sequence) const;
  void copy_positions(const Slot& from, Slot& to) const;

  KvMode mode_;
  KvType type_;
  int capacity_, padded_capacity_;
  std::vector<Layout> layers_;
  std::vector<Slot> slots_;
  AlignedBuffer shared_;  // kNone only
};

}  // namespace trilemma
