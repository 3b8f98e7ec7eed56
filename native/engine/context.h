// One way of running a model: threads, instruction set, KV cache and scratch, all sized once.
//
// `forward` takes slices of several sequences, prefill and decode mixed. Results depend on none of: threads,
// instruction set, how tokens are split over calls and chunks, what else is in the batch.
#pragma once

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "memory_plan.h"
#include "rope_table.h"
#include "routing.h"
#include "thread_pool.h"

namespace trilemma {

enum class LogitsMode { kNone, kLast, kAll };

struct Slice {
  int sequence;
  std::span<const std::int32_t> tokens;
  LogitsMode logits;
};

// Asked now and then during long work; true stops it by throwing Interrupted.
using InterruptCheck = std::function<bool()>;
struct Interrupted {};

class Context {
 public:
  Context(std::shared_ptr<const Model> model, const ContextOptions& options);
  Context(const Context&) = delete;

  const Model& model() const { return *model_; }
  KvPool& sequences() { return kv_; }
  bool share_prefixes() const { return share_prefixes_; }
  const char* isa() const { return kernels_.name; }
  int threads() const { return threads_; }
  int max_context() const { return kv_.capacity(); }
  MemoryUse memory() const;
  // Of the model; read once, when it is first asked for.
  std::uint64_t fingerprint();

  // Rows of logits that `forward` will write.
  static std::size_t logits_rows(std::span<const Slice> slices);
  // `logits` is (logits_rows, vocab). Sequences grow only when all went well.
  // Throws EngineFault, before anything is computed, for a bad token, an unknown or repeated sequence, one that would
  // outgrow the context, or more pages than are left.
  void forward(std::span<const Slice> slices, float* logits, const InterruptCheck& interrupted = {});

 private:
  // Consecutive tokens of one sequence inside a pass.
  struct Segment {
    int sequence, first, count, position;
  };
  struct Scratch {
    AlignedBuffer x;  // residual stream, (pass, dim)
    AlignedBuffer normed, q, k, v, attended, gate, up;
    AlignedBuffer partial;  // attention of a few heads over many positions: what each chunk of them adds
    AlignedBuffer part[2];  // outputs that wait for their norm or for the other part of a parallel layer
    AlignedBuffer scores, gathered, routed;  // experts: (chunk, router rows); (rows, dim) going in and coming out
    AlignedBuffer low_rank;  // what the first of each pair gives, and the second multiplies
    Routing routing;
    ProductInput input, low_input;
    Foresight foresight;
    int pass = 0, chunk = 0;
    int rows = 0;  // of gate, up and the product input: a chunk, or the experts of one token
  };
  struct Pass;
  // What of an attention is done: in a last layer all rows store keys and values, but only wanted ones ask.
  enum class AttentionPart { kWhole, kKeys, kQueries };

  void reserve(const ScratchPlan& plan);
  void check(std::span<const Slice> slices) const;
  // Once the model was read so often that it pays, some of its weights move to huge pages.
  void move_weights();
  void take_pages(std::span<const Slice> slices);
  void run_cached(std::span<const Slice> slices, float* logits, const InterruptCheck& interrupted);
  void run_uncached(std::span<const Slice> slices, float* logits, const InterruptCheck& interrupted);
  float* run_pass(Pass& pass, float* logits, const InterruptCheck& interrupted);
  void embed(const Pass& pass);
  void run_layer(const Pass& pass, int layer, int first, int count, AttentionPart part);
  void run_last_layer(Pass& pass);
  // These add a part's output for rows [first, first + count) to `out`, (count, dim).
  void attention(const Pass& pass, int layer, int first, int count, AttentionPart part, float* out);
  void feed_forward(int layer, int first, int count, float* out);
  void dense(const FfnSpec& spec, const FfnWeights& w, int count, float* out);
  void experts(const ExpertsSpec& spec, const ExpertsWeights& w, int count, float* out);
  void run_experts(const ExpertsSpec& spec, const ExpertsWeights& w, int begin, int end, int count, float* out);
  void activate(const FfnSpec& spec, const InputForms& forms, std::span<const int> rows_of_parts);
  struct AttentionPlan;
  AttentionPlan plan_attention(const Pass& pass, int layer, int first, int count) const;
  void project(int layer, int first, int count, AttentionPart part);
  void place(const AttentionPlan& plan, int layer, int count, AttentionPart part);
  void attend(const AttentionPlan& plan, int layer);
  void add_part(const Norm& post_norm, float* rows, float* x, int count);
  float* write_logits(const Pass& pass, float* logits);
  void norm(const InputForms& forms, const Norm& norm, int first, int count);
  // Products of the input at hand, with what low-rank pairs add to them.
  void products(std::span<const Product> products);
  void products(std::initializer_list<Product> list) { products(std::span(list.begin(), list.size())); }
  void norm_row(const Norm& norm, const float* x, float* out) const;
  // run(first, count) for rows that go through a layer together.
  template <class Run>
  void each_chunk(int rows, const Run& run) const {
    for (int first = 0; first < rows; first += scratch_.chunk) run(first, std::min(scratch_.chunk, rows - first));
  }
  // Row-wise work, of about `floats` a row.
  template <class Task>
  void each_token(int count, double floats, const Task& task) const {
    ThreadPool::instance().run_rows(threads_, count, floats, task);
  }

  std::shared_ptr<const Model> model_;
  const Kernels& kernels_;
  int threads_;
  KvPool kv_;
  bool share_prefixes_;
  std::optional<std::uint64_t> fingerprint_;
  int passes_ = 0;  // over the model, while its weights lie on small pages
  RopeTables rope_;
  Scratch scratch_;
};

}  // namespace trilemma
