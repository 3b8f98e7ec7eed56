// The decoder step: how tokens travel through the layers. Sizes and checks are in context.cpp.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "context.h"
#include "pass.h"

namespace trilemma {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kInterruptInterval = std::chrono::milliseconds(50);

}  // namespace

void Context::run_cached(std::span<const Slice> slices, float* logits, const InterruptCheck& interrupted) {
  Pass pass;
  const auto flush = [&] {
    if (!pass.tokens.empty()) logits = run_pass(pass, logits, interrupted);
    pass = {};
  };
  for (const Slice& slice : slices) {
    const int total = int(slice.tokens.size()), start = kv_.length(slice.sequence);
    for (int done = 0; done < total;) {
      const int count = std::min(total - done, scratch_.pass - int(pass.tokens.size()));
      const bool ends = done + count == total;
      pass.add(slice, done, count, start + done, slice.logits == LogitsMode::kAll,
               ends && slice.logits == LogitsMode::kLast);
      done += count;
      if (int(pass.tokens.size()) == scratch_.pass) flush();
    }
  }
  flush();
}

// Without a cache a pass is a whole sequence from its first token on.
void Context::run_uncached(std::span<const Slice> slices, float* logits, const InterruptCheck& interrupted) {
  for (const Slice& slice : slices) {
    std::vector<std::int32_t> all = kv_.history(slice.sequence);
    const int before = int(all.size());
    all.insert(all.end(), slice.tokens.begin(), slice.tokens.end());
    Pass pass;
    pass.add({slice.sequence, all, slice.logits}, 0, int(all.size()), 0, false, slice.logits == LogitsMode::kLast);
    if (slice.logits == LogitsMode::kAll)
      for (int row = before; row < int(all.size()); ++row) pass.wanted.push_back(row);
    logits = run_pass(pass, logits, interrupted);
  }
}

float* Context::run_pass(Pass& pass, float* logits, const InterruptCheck& interrupted) {
  const int total = int(pass.tokens.size()), layers = int(model_->layers().size());
  const bool cut = int(pass.wanted.size()) < total;
  auto checked = Clock::now();
  scratch_.foresight.restart();
  embed(pass);
  for (int layer = 0; layer < layers - cut; ++layer) {
    each_chunk(total, [&](int first, int count) { run_layer(pass, layer, first, count, AttentionPart::kWhole); });
    if (interrupted && Clock::now() - checked > kInterruptInterval) {
      if (interrupted()) throw Interrupted{};
      checked = Clock::now();
    }
  }
  if (cut) run_last_layer(pass);
  return write_logits(pass, logits);
}

// Of rows whose logits nobody asked for, only keys and values are ever read again. Leaves the wanted rows in front.
void Context::run_last_layer(Pass& pass) {
  const int layer = int(model_->layers().size()) - 1;
  if (model_->config().layers.back().attention)
    each_chunk(int(pass.tokens.size()),
               [&](int first, int count) { attention(pass, layer, first, count, AttentionPart::kKeys, nullptr); });
  const size_t dim = size_t(model_->config().dim);
  float* x = scratch_.x.as<float>();
  for (size_t i = 0; i < pass.wanted.size(); ++i)
    std::memmove(x + i * dim, x + size_t(pass.wanted[i]) * dim, dim * sizeof(float));
  pass = pass.only_wanted();
  each_chunk(int(pass.tokens.size()),
             [&](int first, int count) { run_layer(pass, layer, first, count, AttentionPart::kQueries); });
}

void Context::embed(const Pass& pass) {
  const DecoderConfig& c = model_->config();
  const size_t dim = size_t(c.dim);
  const bool plain = c.embedding_scale == 1.0f && !c.learned_positions;
  each_token(int(pass.tokens.size()), double(dim), [&](int i) {
    float* x = scratch_.x.as<float>() + size_t(i) * dim;
    if (plain) return model_->embedding().read_row(pass.tokens[size_t(i)], x);
    std::vector<float> row(dim);
    model_->embedding().read_row(pass.tokens[size_t(i)], row.data());
    if (c.learned_positions)
      model_->positions()->read_row(pass.position(i), x);
    else
      std::memset(x, 0, dim * sizeof(float));
    kernels_.add_scaled(x, row.data(), c.embedding_scale, c.dim);
  });
}

void Context::norm_row(const Norm& norm, const float* x, float* out) const {
  const DecoderConfig& c = model_->config();
  const auto kernel = c.norm == NormKind::kLayer ? kernels_.layer_norm : kernels_.rms_norm;
  kernel(x, norm.weight, norm.bias, c.dim, c.norm_eps, out);
}

void Context::norm(const InputForms& forms, const Norm& norm, int first, int count) {
  const int dim = model_->config().dim;
  const size_t ld = round_up(size_t(dim), kBlock);
  float* normed = scratch_.normed.as<float>();
  scratch_.input.begin(forms, normed, dim, count);
  each_token(count, 2.0 * dim, [&](int i) {
    norm_row(norm, scratch_.x.as<float>() + size_t(first + i) * size_t(dim), normed + size_t(i) * ld);
    scratch_.input.prepare(kernels_, i);
  });
}

// y = W x, then y += b (a x): the first of each pair runs beside the matrices, the second ones as parts of an input of
// their own.
void Context::products(std::span<const Product> asked) {
  Scratch& s = scratch_;
  const LowRank* any = asked[0].linear->low_rank;  // all of a layer's products have one or none
  if (!any) return multiply(kernels_, threads_, s.input, asked, &s.foresight);
  const int rank = any->rank();
  const size_t ld = round_up(size_t(rank), kBlock);
  std::vector<Product> first(asked.begin(), asked.end()), second;
  std::vector<int> rows_of_parts;
  InputForms forms;
  int rows = 0;
  for (const Product& p : asked) {
    const LowRank& pair = *p.linear->low_rank;
    first.push_back({&pair.a, s.low_rank.as<float>() + size_t(rows) * ld, ld, false, p.part});
    second.push_back({&pair.b, p.y, p.ld, true, int(rows_of_parts.size())});
    forms.add(pair.b);
    rows_of_parts.push_back(s.input.rows(p.part));
    rows += rows_of_parts.back();
  }
  multiply(kernels_, threads_, s.input, first, &s.foresight);
  s.low_input.begin(forms, s.low_rank.as<float>(), rank, rows_of_parts);
  each_token(rows, double(rank), [&](int i) { s.low_input.prepare(kernels_, i); });
  multiply(kernels_, threads_, s.low_input, second, &s.foresight);
}

// x + attention, then x + ffn of that; in a parallel layer the ffn reads x first and waits apart.
void Context::run_layer(const Pass& pass, int layer, int first, int count, AttentionPart part) {
  const LayerConfig& spec = model_->config().layers[size_t(layer)];
  const LayerWeights& w = model_->layers()[size_t(layer)];
  const size_t size = size_t(count) * size_t(model_->config().dim);
  float* x = scratch_.x.as<float>() + size_t(first) * size_t(model_->config().dim);
  const auto destination = [&](bool apart, const AlignedBuffer& buffer) {
    if (apart) std::memset(buffer.data(), 0, size * sizeof(float));
    return apart ? buffer.as<float>() : x;
  };
  const bool ffn = spec.ffn || spec.experts;
  float* late = nullptr;
  if (ffn && spec.parallel) feed_forward(layer, first, count, late = destination(true, scratch_.part[0]));
  if (spec.attention) {
    float* out = destination(spec.post_norms, scratch_.part[late ? 1 : 0]);
    attention(pass, layer, first, count, part, out);
    if (out != x) add_part(w.attention_post_norm, out, x, count);
  }
  if (ffn && !spec.parallel) {
    float* out = destination(spec.post_norms, scratch_.part[0]);
    feed_forward(layer, first, count, out);
    if (out != x) late = out;
  }
  if (late) add_part(w.ffn_post_norm, late, x, count);
}

// x += rows, normed before where the layer has post norms.
void Context::add_part(const Norm& post_norm, float* rows, float* x, int count) {
  const int dim = model_->config().dim;
  each_token(count, 2.0 * dim, [&](int i) {
    float* row = rows + size_t(i) * size_t(dim);
    if (post_norm.weight) norm_row(post_norm, row, row);
    kernels_.add_scaled(x + size_t(i) * size_t(dim), row, 1.0f, dim);
  });
}

float* Context::write_logits(const Pass& pass, float* logits) {
  const int dim = model_->config().dim;
  const size_t vocab = size_t(model_->config().vocab_size), ld = round_up(size_t(dim), kBlock);
  InputForms forms;
  forms.add(model_->head());
  float* normed = scratch_.normed.as<float>();
  for (size_t done = 0; done < pass.wanted.size(); done += size_t(scratch_.chunk)) {
    const int count = int(std::min(pass.wanted.size() - done, size_t(scratch_.chunk)));
    scratch_.input.begin(forms, normed, dim, count);
    each_token(count, 2.0 * dim, [&](int i) {
      const float* x = scratch_.x.as<float>() + size_t(pass.wanted[done + size_t(i)]) * size_t(dim);
      norm_row(model_->final_norm(), x, normed + size_t(i) * ld);
      scratch_.input.prepare(kernels_, i);
    });
    const Product head[] = {{&model_->head(), logits, vocab}};
    multiply(kernels_, threads_, scratch_.input, head, &scratch_.foresight);
    logits += size_t(count) * vocab;
  }
  return logits;
}

}  // namespace trilemma
