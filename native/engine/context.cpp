#include "context.h"

#include <algorithm>

#include "dispatch.h"

namespace trilemma {
namespace {

// Passes over the weights before they move to huge pages, and about how many more share that work. It takes as long as
// is lost on small pages in about so many passes where they cost a fifth of the speed, and in some hundred where less.
constexpr int kPassesOnSmallPages = 128, kMovingPasses = 64;

const ContextOptions& validated(const Model& model, const ContextOptions& options) {
  if (!model.finalized()) throw EngineFault("The model is not finalized: some of its tensors may be missing.");
  validate(model.config(), options);
  return options;
}

}  // namespace

Context::Context(std::shared_ptr<const Model> model, const ContextOptions& options)
    : model_(std::move(model)),
      kernels_(pick_kernels(validated(*model_, options).isa)),
      threads_(options.threads),
      kv_(model_->config(), options.pool()),
      share_prefixes_(options.share_prefixes),
      rope_(model_->config(), options.max_context) {
  reserve(plan_scratch(model_->config(), options));
}

void Context::reserve(const ScratchPlan& plan) {
  Scratch& s = scratch_;
  s.pass = plan.pass;
  s.chunk = plan.chunk;
  s.rows = plan.rows;
  s.x = AlignedBuffer(plan.x);
  s.normed = AlignedBuffer(plan.normed);
  s.q = AlignedBuffer(plan.q);
  s.k = AlignedBuffer(plan.k);
  s.v = AlignedBuffer(plan.v);
  s.attended = AlignedBuffer(plan.attended);
  s.partial = AlignedBuffer(plan.partial);
  s.gate = AlignedBuffer(plan.gate);
  s.up = AlignedBuffer(plan.up);
  for (const int i : {0, 1}) s.part[i] = AlignedBuffer(plan.part[i]);
  s.scores = AlignedBuffer(plan.scores);
  s.gathered = AlignedBuffer(plan.gathered);
  s.routed = AlignedBuffer(plan.routed);
  s.routing.reserve(plan.pairs, plan.firsts);
  InputForms forms;
  forms.add(model_->head());
  for (const LayerWeights& layer : model_->layers()) forms.add(layer);
  s.input.reserve(kernels_, forms, plan.columns, plan.rows, plan.split);
  s.low_rank = AlignedBuffer(plan.low_rank);
  if (plan.rank) s.low_input.reserve(kernels_, forms, plan.rank, plan.low_rows, true);
}

MemoryUse Context::memory() const {
  const Scratch& s = scratch_;
  std::size_t scratch = kv_.table_bytes() + rope_.bytes() + s.input.bytes() + s.low_input.bytes() + s.routing.bytes();
  for (const AlignedBuffer* b : {&s.x, &s.normed, &s.q, &s.k, &s.v, &s.attended, &s.partial, &s.gate, &s.up, &s.part[0], &s.part[1],
                                 &s.scores, &s.gathered, &s.routed, &s.low_rank})
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
  try {
    take_pages(slices);
    if (kv_.mode() == KvMode::kNone)
      run_uncached(slices, logits, interrupted);
    else
      run_cached(slices, logits, interrupted);
  } catch (...) {
    for (const Slice& s : slices) kv_.truncate(s.sequence, kv_.length(s.sequence));  // gives their new pages back
    throw;
  }
  for (const Slice& s : slices) kv_.append(s.sequence, s.tokens);
  move_weights();
}

void Context::move_weights() {
  const LaterHugePages& pages = model_->huge_pages();
  if (!pages.left() || ++passes_ <= kPassesOnSmallPages) return;
  ThreadPool::instance().run(threads_, int(pages.count() / kMovingPasses) + 1, [&](int) { pages.move_one(); });
}

void Context::take_pages(std::span<const Slice> slices) {
  for (const Slice& s : slices)
    if (!kv_.reserve(s.sequence, int(s.tokens.size())))
      throw EngineFault("All " + std::to_string(kv_.pages().total) + " pages of the cache are in use, of " +
                        std::to_string(kKvPage) + " positions each. Release or shorten sequences, or open with more.");
}

std::uint64_t Context::fingerprint() {
  if (!fingerprint_) fingerprint_ = model_->fingerprint();
  return *fingerprint_;
}

}  // namespace trilemma
