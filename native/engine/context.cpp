#include "context.h"

#include <algorithm>

#include "dispatch.h"

namespace trilemma {
namespace {

constexpr int kDefaultChunk = 128;

const ContextOptions& validated(const Model& model, const ContextOptions& o) {
  const auto require = [](bool ok, const std::string& what) {
    if (!ok) throw EngineFault(what);
  };
  require(model.finalized(), "The model is not finalized: some of its tensors may be missing.");
  require(o.threads >= 1 && o.threads <= 1024, "threads=" + std::to_string(o.threads) + " must be in 1..1024.");
  require(o.max_sequences >= 1, "max_sequences=" + std::to_string(o.max_sequences) + " must be at least 1.");
  require(o.chunk >= 0, "chunk=" + std::to_string(o.chunk) + " must not be negative.");
  require(o.max_context >= 1 && o.max_context <= model.config().max_context,
          "max_context=" + std::to_string(o.max_context) + " must be in 1.." +
              std::to_string(model.config().max_context) + ", the model's own context.");
  return o;
}

}  // namespace

Context::Context(std::shared_ptr<const Model> model, const ContextOptions& options)
    : model_(std::move(model)),
      kernels_(pick_kernels(validated(*model_, options).isa)),
      threads_(options.threads),
      kv_(model_->config(), options.kv, options.max_context, options.max_sequences),
      rope_(model_->config(), options.max_context) {
  // A pass can not be longer than what all sequences together may hold.
  const long long most = static_cast<long long>(options.max_context) * options.max_sequences;
  const int chunk = options.chunk ? options.chunk : kDefaultChunk;
  scratch_.chunk = int(std::min<long long>(chunk, most));
  scratch_.pass = options.kv == KvMode::kNone ? options.max_context : scratch_.chunk;
  scratch_.chunk = std::min(scratch_.chunk, scratch_.pass);
  reserve();
}

void Context::reserve() {
  const DecoderConfig& c = model_->config();
  const size_t dim = size_t(c.dim);
  size_t q = 0, kv = 0, hidden = 0;
  bool apart = false, both_apart = false, split = false;
  InputForms forms;
  forms.add(model_->head());
  Scratch& s = scratch_;
  s.rows = s.chunk;
  for (size_t i = 0; i < c.layers.size(); ++i) {
    const LayerConfig& layer = c.layers[i];
    forms.add(model_->layers()[i]);
    apart |= layer.parallel || layer.post_norms;
    both_apart |= layer.parallel && layer.post_norms;
    if (const auto& a = layer.attention) {
      q = std::max(q, size_t(a->q_dim()));
      kv = std::max(kv, size_t(a->kv_dim()));
    }
    if (layer.ffn) hidden = std::max(hidden, size_t(layer.ffn->hidden));
    if (const auto& e = layer.experts) {
      hidden = std::max({hidden, size_t(e->hidden), size_t(e->shared_hidden)});
      s.rows = std::max(s.rows, e->active);
      split = true;
    }
  }
  const auto rows = [](int tokens, size_t width) { return AlignedBuffer(size_t(tokens) * width * sizeof(float)); };
  s.x = rows(s.pass, dim);
  s.normed = rows(s.chunk, round_up(dim, kBlock));
  s.q = rows(s.chunk, q);
  s.k = rows(s.chunk, kv);
  s.v = rows(s.chunk, kv);
  s.attended = rows(s.chunk, round_up(q, kBlock));
  s.gate = rows(s.rows, round_up(hidden, kBlock));
  s.up = rows(s.rows, hidden);
  if (apart) s.part[0] = rows(s.chunk, dim);
  if (both_apart) s.part[1] = rows(s.chunk, dim);
  if (split) reserve_experts();
  s.input.reserve(forms, int(std::max({dim, q, hidden})), s.rows, split);
}

void Context::reserve_experts() {
  Scratch& s = scratch_;
  const size_t dim = size_t(model_->config().dim), size = sizeof(float);
  size_t scores = 0;
  for (const LayerConfig& layer : model_->config().layers) {
    if (!layer.experts) continue;
    scores = std::max(scores, size_t(layer.experts->router_rows()));
    s.routing.reserve(*layer.experts, s.chunk);
  }
  s.scores = AlignedBuffer(size_t(s.chunk) * scores * size);
  s.gathered = AlignedBuffer(size_t(s.rows) * round_up(dim, kBlock) * size);
  s.routed = AlignedBuffer(size_t(s.rows) * dim * size);
}

MemoryUse Context::memory() const {
  const Scratch& s = scratch_;
  std::size_t scratch = rope_.bytes() + s.input.bytes() + s.routing.bytes();
  for (const AlignedBuffer* b : {&s.x, &s.normed, &s.q, &s.k, &s.v, &s.attended, &s.gate, &s.up, &s.part[0], &s.part[1],
                                 &s.scores, &s.gathered, &s.routed})
    scratch += b->bytes();
  return {model_->weights_bytes(), kv_.bytes(), scratch};
}

std::size_t Context::logits_rows(std::span<const Slice> slices) {
  std::size_t rows = 0;
  for (const Slice& s : slices)
    rows += s.logits == LogitsMode::kAll ? s.tokens.size() : s.logits == LogitsMode::kLast ? 1 : 0;
  return rows;
}

void Context::check(std::span<const Slice> slices) const {
  for (size_t i = 0; i < slices.size(); ++i) {
    const Slice& s = slices[i];
    const size_t length = size_t(kv_.length(s.sequence)) + s.tokens.size();
    if (s.tokens.empty()) throw EngineFault("Sequence " + std::to_string(s.sequence) + " was given no tokens.");
    if (length > size_t(kv_.capacity()))
      throw EngineFault("Sequence " + std::to_string(s.sequence) + " would hold " + std::to_string(length) +
                        " tokens; this context holds " + std::to_string(kv_.capacity()) + ".");
    for (size_t j = 0; j < i; ++j)
      if (slices[j].sequence == s.sequence)
        throw EngineFault("Sequence " + std::to_string(s.sequence) + " appears twice in one step.");
    for (const std::int32_t token : s.tokens)
      if (token < 0 || token >= model_->config().vocab_size)
        throw EngineFault("Token " + std::to_string(token) + " is outside the vocabulary of " +
                          std::to_string(model_->config().vocab_size) + ".");
  }
}

void Context::forward(std::span<const Slice> slices, float* logits, const InterruptCheck& interrupted) {
  check(slices);
  if (kv_.mode() == KvMode::kNone)
    run_uncached(slices, logits, interrupted);
  else
    run_cached(slices, logits, interrupted);
  for (const Slice& s : slices) kv_.append(s.sequence, s.tokens.data(), int(s.tokens.size()));
}

}  // namespace trilemma
