// What a context reserves, by arithmetic alone: the one home of these sizes. `Context` allocates by it, and a forecast
// states it before any weight is read.
#pragma once

#include <string>

#include "kv_pool.h"
#include "product.h"

namespace trilemma {

struct ContextOptions {
  int threads = 1;
  std::string isa;  // empty: the fastest
  KvMode kv = KvMode::kBf16;
  int max_context = 0;
  int max_sequences = 1;
  int chunk = 0;  // tokens that run through a layer together; 0: a good default
  int kv_positions = 0;  // of all sequences together, in whole pages; 0: max_context of each
  bool share_prefixes = false;

  KvPoolOptions pool() const { return {kv, max_context, max_sequences, kv_positions, share_prefixes}; }
};

// Throws EngineFault naming the option that the model can not be opened with.
void validate(const DecoderConfig& config, const ContextOptions& options);

// Bytes of each buffer; the names are those of Context::Scratch.
struct ScratchPlan {
  int pass = 0, chunk = 0;
  int rows = 0;     // of gate, up and the product input: a chunk, or the experts of one token
  int columns = 0;  // of the widest product input
  bool split = false;
  std::size_t x = 0, normed = 0, q = 0, k = 0, v = 0, attended = 0, gate = 0, up = 0;
  std::size_t partial = 0;
  std::size_t part[2] = {0, 0};
  std::size_t scores = 0, gathered = 0, routed = 0;
  int rank = 0, low_rows = 0;  // of the widest low-rank pair; of all pairs' inner vectors in one product call
  std::size_t low_rank = 0;
  std::size_t pairs = 0, firsts = 0;  // entries of the routing
};

// A decode step of so few heads (of the cache, over all sequences) is spread over threads by chunks of positions too.
constexpr int kSplitHeads = 16;
// Floats that one head and one chunk then need.
std::size_t partial_floats(const AttentionSpec& spec);

ScratchPlan plan_scratch(const DecoderConfig& config, const ContextOptions& options);

struct MemoryUse {
  std::size_t weights, kv, scratch;
};

// KV cache and scratch of a context over a model whose matrices ask for `forms`; weights are left at 0.
MemoryUse plan_memory(const DecoderConfig& config, const InputForms& forms, const ContextOptions& options);

}  // namespace trilemma
