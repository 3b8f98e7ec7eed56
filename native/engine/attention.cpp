// The attention half of a layer: products around it, rotation and cache, and its work spread over threads.
#include <algorithm>
#include <vector>

#include "context.h"
#include "pass.h"

namespace trilemma {
namespace {

// Items that a thread gets of one token's heads and chunks, about: many share the work evenly, few read long runs of the cache.
constexpr int kItemsPerThread = 8;

}  // namespace

// What each segment inside [first, first + count) attends to, and the work items that it is cut into: heads of the cache and
// blocks of rows, or of one token, groups of heads, and where few heads meet many positions, runs of chunks of those.
struct Context::AttentionPlan {
  struct Part {
    KvView kv;
    int row, count, position, first_item, blocks;
    int first_chunk = 0, chunks = 1, run = 1;  // chunks of an item
    int heads = 1;                             // KV heads of an item
    std::size_t partial = 0;                   // floats into the scratch

    bool split() const { return chunks > 1; }
    int runs() const { return (chunks + run - 1) / run; }
    int items(int kv_heads) const { return blocks * runs() * ((kv_heads + heads - 1) / heads); }
  };
  std::vector<Part> parts;
  int items = 0;
  double work = 0;

  const Part& of_item(int item, int kv_heads) const {
    return *std::find_if(parts.begin(), parts.end(),
                         [&](const Part& p) { return item < p.first_item + p.items(kv_heads); });
  }
  const Part& of_row(int row) const {
    return *std::find_if(parts.begin(), parts.end(), [&](const Part& p) { return row < p.row + p.count; });
  }
};

void Context::attention(const Pass& pass, int layer, int first, int count, AttentionPart part, float* out) {
  const int q_dim = model_->config().layers[size_t(layer)].attention->q_dim();
  const AttentionWeights& w = model_->layers()[size_t(layer)].attention;
  Scratch& s = scratch_;
  project(layer, first, count, part);
  const AttentionPlan plan = plan_attention(pass, layer, first, count);
  place(plan, layer, count, part);
  if (part == AttentionPart::kKeys) return;
  attend(plan, layer);
  InputForms forms;
  forms.add(w.o);
  s.input.begin(forms, s.attended.as<float>(), q_dim, count);
  each_token(count, double(q_dim), [&](int i) { s.input.prepare(kernels_, i); });
  products({{&w.o, out, size_t(model_->config().dim), true}});
}

// Rows' queries, keys and values, or what of them is asked for.
void Context::project(int layer, int first, int count, AttentionPart part) {
  const AttentionSpec& spec = *model_->config().layers[size_t(layer)].attention;
  const LayerWeights& weights = model_->layers()[size_t(layer)];
  const AttentionWeights& w = weights.attention;
  const Product all[] = {{&w.q, scratch_.q.as<float>(), size_t(spec.q_dim())},
                         {&w.k, scratch_.k.as<float>(), size_t(spec.kv_dim())},
                         {&w.v, scratch_.v.as<float>(), size_t(spec.kv_dim())}};
  std::span<const Product> asked(all);
  if (part == AttentionPart::kKeys) asked = asked.subspan(1);
  if (part == AttentionPart::kQueries) asked = asked.first(1);
  InputForms forms;
  for (const Product& p : asked) forms.add(*p.linear);
  norm(forms, weights.attention_norm, first, count);
  products(asked);
}

Context::AttentionPlan Context::plan_attention(const Pass& pass, int layer, int first, int count) const {
  const AttentionSpec& spec = *model_->config().layers[size_t(layer)].attention;
  const int group = spec.heads / spec.kv_heads;
  AttentionPlan plan;
  int wide = 0;  // items if every one were a head and a block
  for (const Segment& segment : pass.segments) {
    const int begin = std::max(segment.first, first), end = std::min(segment.first + segment.count, first + count);
    if (begin >= end) continue;
    const int position = segment.position + begin - segment.first, tokens = end - begin;
    const int blocks = (tokens * group + kAttentionRows - 1) / kAttentionRows;
    plan.parts.push_back({kv_.view(segment.sequence, layer), begin - first, tokens, position, 0, blocks});
    wide += blocks * spec.kv_heads;
    plan.work += double(position + tokens) * tokens * double(spec.q_dim());
  }
  const bool split = threads_ > 1 && wide <= kSplitHeads && scratch_.partial.bytes() > 0;
  const int wanted = threads_ > 1 ? kItemsPerThread * threads_ : 1, parts = int(plan.parts.size());
  std::size_t partial = 0;
  for (AttentionPlan::Part& p : plan.parts) {
    const int seen = p.position + 1, begin = spec.window && seen > spec.window ? seen - spec.window : 0;
    if (p.count == 1 && split) {
      p.first_chunk = begin / kKvChunk;
      p.chunks = p.position / kKvChunk - p.first_chunk + 1;
      p.partial = partial;
      partial += size_t(p.chunks * spec.kv_heads) * partial_floats(spec);
    }
    if (p.count == 1) {
      const int most = std::max(1, std::min(spec.kv_heads, attention_rows(p.kv.padded_dim) / group));
      p.heads = std::clamp(p.chunks * spec.kv_heads * parts / wanted, 1, most);
      p.run = std::clamp(p.chunks * spec.kv_heads * parts / (p.heads * wanted), 1, p.chunks);
    }
    p.first_item = plan.items;
    plan.items += p.items(spec.kv_heads);
  }
  return plan;
}

// Mixes values for the part of each segment that the plan holds.
void Context::attend(const AttentionPlan& plan, int layer) {
  const AttentionSpec& spec = *model_->config().layers[size_t(layer)].attention;
  const int group = spec.heads / spec.kv_heads;
  const size_t q_dim = size_t(spec.q_dim()), ld_out = round_up(q_dim, kBlock), partial = partial_floats(spec);
  const auto task_of = [&](const AttentionPlan::Part& part, int head, int heads, int block, int chunk) {
    const size_t column = size_t(head * group) * size_t(spec.head_dim);
    const int rows = part.count * group * heads;
    const size_t at = part.partial + size_t(chunk * spec.kv_heads + head) * partial;
    return AttentionTask{scratch_.q.as<float>() + size_t(part.row) * q_dim + column,
                         scratch_.attended.as<float>() + size_t(part.row) * ld_out + column, q_dim, ld_out, group * heads,
                         head, heads, block * kAttentionRows, std::min(rows, (block + 1) * kAttentionRows), part.position,
                         spec.window, part.split() ? scratch_.partial.as<float>() + at : nullptr,
                         part.first_chunk + chunk, std::min(part.run, part.chunks - chunk), size_t(spec.kv_heads) * partial};
  };
  const int threads = plan.work < 2 * ThreadPool::kSerialFloats ? 1 : threads_;
  ThreadPool::instance().run(threads, plan.items, [&](int item) {
    const AttentionPlan::Part& part = plan.of_item(item, spec.kv_heads);
    const int at = item - part.first_item, runs = part.runs(), block = at / runs % part.blocks;
    const int head = at / (part.blocks * runs) * part.heads;
    kernels_.attention(part.kv, task_of(part, head, std::min(part.heads, spec.kv_heads - head), block, at % runs * part.run));
  });
  if (std::none_of(plan.parts.begin(), plan.parts.end(), [](const AttentionPlan::Part& p) { return p.split(); })) return;
  ThreadPool::instance().run(threads, int(plan.parts.size()) * spec.kv_heads, [&](int item) {
    const AttentionPlan::Part& part = plan.parts[size_t(item / spec.kv_heads)];
    if (part.split()) kernels_.attention_merge(part.kv, task_of(part, item % spec.kv_heads, 1, 0, 0), part.chunks);
  });
}

// Norms (where the layer does) and rotates queries and keys, and stores keys and values.
void Context::place(const AttentionPlan& plan, int layer, int count, AttentionPart part) {
  const AttentionSpec& spec = *model_->config().layers[size_t(layer)].attention;
  const AttentionWeights& w = model_->layers()[size_t(layer)].attention;
  const size_t q_dim = size_t(spec.q_dim()), kv_dim = size_t(spec.kv_dim());
  const int half = rope_.half(layer);
  const auto norm_heads = [&](const float* weight, float* row, int heads) {
    for (int h = 0; weight && h < heads; ++h) {
      float* head = row + h * spec.head_dim;
      kernels_.rms_norm(head, weight, nullptr, spec.head_dim, model_->config().norm_eps, head);
    }
  };
  each_token(count, 2.0 * double(q_dim + 2 * kv_dim), [&](int i) {
    const AttentionPlan::Part& at = plan.of_row(i);
    const int position = at.position + i - at.row;
    const float* cos = half ? rope_.cos(layer, position) : nullptr;
    const float* sin = half ? rope_.sin(layer, position) : nullptr;
    if (part != AttentionPart::kKeys) {
      float* q = scratch_.q.as<float>() + size_t(i) * q_dim;
      norm_heads(w.q_norm, q, spec.heads);
      kernels_.rope(q, spec.heads, spec.head_dim, half, cos, sin, spec.scale);
    }
    if (part != AttentionPart::kQueries) {
      float* k = scratch_.k.as<float>() + size_t(i) * kv_dim;
      norm_heads(w.k_norm, k, spec.kv_heads);
      if (half) kernels_.rope(k, spec.kv_heads, spec.head_dim, half, cos, sin, 1.0f);
      kernels_.kv_store(at.kv, k, scratch_.v.as<float>() + size_t(i) * kv_dim, spec.kv_heads, position);
    }
  });
}

}  // namespace trilemma
