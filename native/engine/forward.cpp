// The decoder step: how tokens travel through the layers. Sizes and checks are in context.cpp.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "context.h"
#include "thread_pool.h"

namespace trilemma {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kInterruptInterval = std::chrono::milliseconds(50);
// Floats of row-wise work below which one thread is faster.
constexpr double kSerialFloats = 8e3;
// (token, head) rows of one attention work item: four register blocks.
constexpr int kAttentionRows = 32;

}  // namespace

// Tokens that go through all layers together, in rows of the residual stream.
struct Context::Pass {
  std::vector<std::int32_t> tokens;
  std::vector<Segment> segments;
  std::vector<int> wanted;  // rows whose logits are asked for, ascending

  void add(const Slice& slice, int from, int count, int position, bool all, bool last) {
    segments.push_back({slice.sequence, int(tokens.size()), count, position});
    for (int i = 0; i < count; ++i) {
      if (all || (last && i == count - 1)) wanted.push_back(int(tokens.size()));
      tokens.push_back(slice.tokens[size_t(from + i)]);
    }
  }
};

template <class Task>
void Context::each_token(int count, double work, const Task& task) {
  ThreadPool::instance().run(count * work < kSerialFloats ? 1 : threads_, count, task);
}

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
  const int total = int(pass.tokens.size());
  auto checked = Clock::now();
  embed(pass);
  for (int layer = 0; layer < int(model_->layers().size()); ++layer) {
    for (int first = 0; first < total; first += scratch_.chunk) {
      const int count = std::min(scratch_.chunk, total - first);
      attention(pass, layer, first, count);
      feed_forward(layer, first, count);
    }
    if (interrupted && Clock::now() - checked > kInterruptInterval) {
      if (interrupted()) throw Interrupted{};
      checked = Clock::now();
    }
  }
  return write_logits(pass, logits);
}

void Context::embed(const Pass& pass) {
  const size_t dim = size_t(model_->config().dim);
  const Matrix& table = model_->embedding();
  each_token(int(pass.tokens.size()), double(dim),
             [&](int i) { table.read_row(pass.tokens[size_t(i)], scratch_.x.as<float>() + size_t(i) * dim); });
}

void Context::norm(const InputForms& forms, const float* weight, int first, int count) {
  const int dim = model_->config().dim;
  const size_t ld = round_up(size_t(dim), kBlock);
  float* normed = scratch_.normed.as<float>();
  scratch_.input.begin(forms, normed, dim, count);
  each_token(count, 2.0 * dim, [&](int i) {
    const float* x = scratch_.x.as<float>() + size_t(first + i) * size_t(dim);
    kernels_.rms_norm(x, weight, dim, model_->config().norm_eps, normed + size_t(i) * ld);
    scratch_.input.prepare(kernels_, i);
  });
}

void Context::attention(const Pass& pass, int layer, int first, int count) {
  const auto& spec = model_->config().layers[size_t(layer)].attention;
  if (!spec) return;
  const AttentionWeights& w = model_->layers()[size_t(layer)].attention;
  const size_t dim = size_t(model_->config().dim), q_dim = size_t(spec->q_dim()), kv_dim = size_t(spec->kv_dim());
  Scratch& s = scratch_;
  InputForms forms;
  for (const Linear* l : {&w.q, &w.k, &w.v}) forms.add(*l);
  norm(forms, w.norm, first, count);
  multiply(kernels_, threads_, s.input,
           {{&w.q, s.q.as<float>(), q_dim}, {&w.k, s.k.as<float>(), kv_dim}, {&w.v, s.v.as<float>(), kv_dim}});
  attend(pass, layer, first, count);
  InputForms out_forms;
  out_forms.add(w.o);
  s.input.begin(out_forms, s.attended.as<float>(), int(q_dim), count);
  each_token(count, double(q_dim), [&](int i) { s.input.prepare(kernels_, i); });
  multiply(kernels_, threads_, s.input, {{&w.o, s.x.as<float>() + size_t(first) * dim, dim, true}});
}

// Rotates q and k, stores k and v, and mixes values: for the part of each segment inside [first, first + count).
void Context::attend(const Pass& pass, int layer, int first, int count) {
  struct Part {
    KvView kv;
    int row, count, position, first_item, blocks;
  };
  const AttentionSpec& spec = *model_->config().layers[size_t(layer)].attention;
  const size_t q_dim = size_t(spec.q_dim()), kv_dim = size_t(spec.kv_dim());
  const int group = spec.heads / spec.kv_heads, half = rope_.half(layer);
  float *q = scratch_.q.as<float>(), *k = scratch_.k.as<float>(), *v = scratch_.v.as<float>();
  std::vector<Part> parts;
  int items = 0;
  double work = 0;
  for (const Segment& segment : pass.segments) {
    const int begin = std::max(segment.first, first), end = std::min(segment.first + segment.count, first + count);
    if (begin >= end) continue;
    const int position = segment.position + begin - segment.first;
    const int blocks = ((end - begin) * group + kAttentionRows - 1) / kAttentionRows;
    parts.push_back({kv_.view(segment.sequence, layer), begin - first, end - begin, position, items, blocks});
    items += blocks * spec.kv_heads;
    work += double(position + end - begin) * (end - begin) * double(q_dim);
  }
  const auto part_of = [&](auto matches) { return *std::find_if(parts.begin(), parts.end(), matches); };
  each_token(count, 2.0 * double(q_dim + 2 * kv_dim), [&](int i) {
    const Part part = part_of([&](const Part& p) { return i < p.row + p.count; });
    const int position = part.position + i - part.row;
    float *qi = q + size_t(i) * q_dim, *ki = k + size_t(i) * kv_dim, *vi = v + size_t(i) * kv_dim;
    const float* cos = half ? rope_.cos(layer, position) : nullptr;
    const float* sin = half ? rope_.sin(layer, position) : nullptr;
    kernels_.rope(qi, spec.heads, spec.head_dim, half, cos, sin, spec.scale);
    if (half) kernels_.rope(ki, spec.kv_heads, spec.head_dim, half, cos, sin, 1.0f);
    kernels_.kv_store(part.kv, ki, vi, spec.kv_heads, position);
  });
  const size_t ld_out = round_up(q_dim, kBlock);
  ThreadPool::instance().run(work < 2 * kSerialFloats ? 1 : threads_, items, [&](int item) {
    const Part part = part_of([&](const Part& p) { return item < p.first_item + p.blocks * spec.kv_heads; });
    const int head = (item - part.first_item) / part.blocks, block = (item - part.first_item) % part.blocks;
    const size_t column = size_t(head * group) * size_t(spec.head_dim);
    const int rows = part.count * group;
    kernels_.attention(
        part.kv, {q + size_t(part.row) * q_dim + column,
                  scratch_.attended.as<float>() + size_t(part.row) * ld_out + column, q_dim, ld_out, group, head,
                  block * kAttentionRows, std::min(rows, (block + 1) * kAttentionRows), part.position, spec.window});
  });
}

void Context::feed_forward(int layer, int first, int count) {
  const auto& spec = model_->config().layers[size_t(layer)].ffn;
  if (!spec) return;
  const FfnWeights& w = model_->layers()[size_t(layer)].ffn;
  const size_t dim = size_t(model_->config().dim), hidden = size_t(spec->hidden), ld = round_up(hidden, kBlock);
  Scratch& s = scratch_;
  float *gate = s.gate.as<float>(), *up = s.up.as<float>();
  InputForms forms;
  forms.add(w.up);
  if (spec->gated) forms.add(w.gate);
  norm(forms, w.norm, first, count);
  if (spec->gated)
    multiply(kernels_, threads_, s.input, {{&w.gate, gate, ld}, {&w.up, up, hidden}});
  else
    multiply(kernels_, threads_, s.input, {{&w.up, gate, ld}});
  InputForms down_forms;
  down_forms.add(w.down);
  s.input.begin(down_forms, gate, int(hidden), count);
  each_token(count, 4.0 * double(hidden), [&](int i) {
    const float* other = spec->gated ? up + size_t(i) * hidden : nullptr;
    kernels_.glu(gate + size_t(i) * ld, other, int(hidden), spec->activation);
    s.input.prepare(kernels_, i);
  });
  multiply(kernels_, threads_, s.input, {{&w.down, s.x.as<float>() + size_t(first) * dim, dim, true}});
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
      kernels_.rms_norm(x, model_->final_norm(), dim, model_->config().norm_eps, normed + size_t(i) * ld);
      scratch_.input.prepare(kernels_, i);
    });
    multiply(kernels_, threads_, scratch_.input, {{&model_->head(), logits, vocab}});
    logits += size_t(count) * vocab;
  }
  return logits;
}

}  // namespace trilemma
