#include "memory_plan.h"

#include <algorithm>

#include "dispatch.h"
#include "rope_table.h"
#include "routing.h"

namespace trilemma {
namespace {

// Where products run in tiles, weights are turned into what these multiply once a chunk: longer ones, as far as their
// activations stay small.
constexpr int kDefaultChunk = 128, kTilesChunk = 256;
constexpr long long kTilesCells = 192 * 8192;  // tokens x channels of the widest dense layer

// Products of one input: queries, keys and values.
constexpr int kMostProducts = 3;

// Of all layers, the widest.
struct Widths {
  size_t q = 0, kv = 0, hidden = 0, scores = 0, partial = 0;
};

void plan_rows(ScratchPlan& plan, const DecoderConfig& config, const ContextOptions& options) {
  // A pass can not be longer than what all sequences together may hold.
  const long long most = static_cast<long long>(options.max_context) * options.max_sequences;
  int usual = kDefaultChunk;
  if (pick_kernels(options.isa).workspace_bytes) {
    long long widest = 1;
    for (const LayerConfig& layer : config.layers)
      if (layer.ffn) widest = std::max<long long>(widest, layer.ffn->hidden);
    usual = int(std::clamp<long long>(kTilesCells / widest / 32 * 32, kDefaultChunk, kTilesChunk));
  }
  plan.chunk = int(std::min<long long>(options.chunk ? options.chunk : usual, most));
  plan.pass = options.kv == KvMode::kNone ? options.max_context : plan.chunk;
  plan.chunk = std::min(plan.chunk, plan.pass);
  plan.rows = plan.chunk;
  for (const LayerConfig& layer : config.layers)
    if (layer.experts) plan.rows = std::max(plan.rows, layer.experts->active);
}

Widths plan_experts(ScratchPlan& plan, const DecoderConfig& config, Widths widest) {
  for (const LayerConfig& layer : config.layers) {
    const auto& e = layer.experts;
    if (!e) continue;
    plan.split = true;
    plan.pairs = std::max(plan.pairs, size_t(plan.chunk) * size_t(e->active));
    plan.firsts = std::max(plan.firsts, size_t(e->count) + 1);
    widest.hidden = std::max({widest.hidden, size_t(e->hidden), size_t(e->shared_hidden)});
    widest.scores = std::max(widest.scores, size_t(e->router_rows()));
  }
  return widest;
}

}  // namespace

void validate(const DecoderConfig& config, const ContextOptions& o) {
  const auto require = [](bool ok, const std::string& what) {
    if (!ok) throw EngineFault(what);
  };
  require(o.threads >= 1 && o.threads <= 1024, "threads=" + std::to_string(o.threads) + " must be in 1..1024.");
  require(o.max_sequences >= 1, "max_sequences=" + std::to_string(o.max_sequences) + " must be at least 1.");
  require(o.kv_positions >= 0, "kv_positions=" + std::to_string(o.kv_positions) + " must not be negative.");
  require(o.chunk >= 0, "chunk=" + std::to_string(o.chunk) + " must not be negative.");
  require(o.max_context >= 1 && o.max_context <= config.max_context,
          "max_context=" + std::to_string(o.max_context) + " must be in 1.." + std::to_string(config.max_context) +
              ", the model's own context.");
}

std::size_t partial_floats(const AttentionSpec& spec) {
  const size_t rows = size_t(spec.heads / spec.kv_heads);
  return rows * (round_up(size_t(spec.head_dim), 16) + kPanel);
}

ScratchPlan plan_scratch(const DecoderConfig& config, const ContextOptions& options) {
  ScratchPlan plan;
  plan_rows(plan, config, options);
  Widths w = plan_experts(plan, config, {});
  bool apart = false, both_apart = false;
  for (const LayerConfig& layer : config.layers) {
    apart |= layer.parallel || layer.post_norms;
    both_apart |= layer.parallel && layer.post_norms;
    if (layer.attention) {
      w.q = std::max(w.q, size_t(layer.attention->q_dim()));
      w.kv = std::max(w.kv, size_t(layer.attention->kv_dim()));
      w.partial = std::max(w.partial, partial_floats(*layer.attention));
    }
    if (layer.ffn) w.hidden = std::max(w.hidden, size_t(layer.ffn->hidden));
  }
  const size_t dim = size_t(config.dim), wide = round_up(dim, kBlock);
  const auto floats = [](int rows, size_t width) { return size_t(rows) * width * sizeof(float); };
  plan.x = floats(plan.pass, dim);
  plan.normed = floats(plan.chunk, wide);
  plan.q = floats(plan.chunk, w.q);
  plan.k = plan.v = floats(plan.chunk, w.kv);
  plan.attended = floats(plan.chunk, round_up(w.q, kBlock));
  const int chunks = (options.max_context + kKvChunk - 1) / kKvChunk;
  if (chunks > 1) plan.partial = floats(kSplitHeads * chunks, w.partial);
  plan.gate = floats(plan.rows, round_up(w.hidden, kBlock));
  plan.up = floats(plan.rows, w.hidden);
  if (apart) plan.part[0] = floats(plan.chunk, dim);
  if (both_apart) plan.part[1] = floats(plan.chunk, dim);
  plan.columns = int(std::max({dim, w.q, w.hidden}));
  for (const LayerConfig& layer : config.layers) plan.rank = std::max(plan.rank, layer.low_rank);
  if (plan.rank) plan.low_rows = kMostProducts * plan.rows;
  plan.low_rank = floats(plan.low_rows, round_up(size_t(plan.rank), kBlock));
  if (!plan.split) return plan;
  plan.scores = floats(plan.chunk, w.scores);
  plan.gathered = floats(plan.rows, wide);
  plan.routed = floats(plan.rows, dim);
  return plan;
}

MemoryUse plan_memory(const DecoderConfig& config, const InputForms& forms, const ContextOptions& options) {
  config.validate();
  validate(config, options);
  const ScratchPlan s = plan_scratch(config, options);
  const std::size_t buffers = s.x + s.normed + s.q + s.k + s.v + s.attended + s.partial + s.gate + s.up + s.part[0] + s.part[1] +
                              s.scores + s.gathered + s.routed + s.low_rank;
  const Kernels& kernels = pick_kernels(options.isa);
  std::size_t derived = ProductInput::bytes_of(kernels, forms, s.columns, s.rows, s.split);
  if (s.rank) derived += ProductInput::bytes_of(kernels, forms, s.rank, s.low_rows, true);
  const KvPool::Bytes kv = KvPool::bytes_of(config, options.pool());
  const std::size_t scratch = buffers + derived + kv.tables + Routing::bytes_of(s.pairs, s.firsts) +
                              RopeTables::bytes_of(config, options.max_context);
  return {0, kv.cache, scratch};
}

}  // namespace trilemma
