// The engine without Python: a small random model under threads, chunks, batches and sanitizers.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <numeric>
#include <thread>
#include <vector>

#include "check.h"
#include "engine/dispatch.h"
#include "engine/foresight.h"
#include "engine/generate.h"
#include "engine/sampler.h"
#include "engine/thread_pool.h"

using namespace trilemma;

namespace {

// Every option of the schema somewhere.
DecoderConfig small_config() {
  DecoderConfig c;
  c.dim = 60;
  c.vocab_size = 211;
  c.max_context = 1200;
  c.norm_bias = true;
  c.embedding_scale = 2.5f;
  c.learned_positions = true;
  const RopeSpec rope{{1.0f, 0.1f, 0.01f, 0.001f}, 1.0f}, partial{{1.0f, 0.2f, 0.03f}, 1.1f};
  c.layers.push_back({AttentionSpec{6, 2, 8, rope, 0.35f, 0, true, false}, FfnSpec{172}, {}});
  c.layers.push_back({AttentionSpec{3, 3, 11, partial, 0.35f, 40, false, true, true}, FfnSpec{33}, {}, true});
  c.layers.push_back({std::nullopt, FfnSpec{50, kGelu, false, true}, {}, false, true});
  c.layers.push_back({AttentionSpec{4, 1, 8, rope, 0.35f}, {}, ExpertsSpec{5, 2, 44, kSilu}, false, true});
  ExpertsSpec shared{7, 3, 21, kGeluTanh, RouterKind::kGlu, GateKind::kOne, 39, true};
  c.layers.push_back({AttentionSpec{2, 2, 8, std::nullopt, 0.35f}, {}, shared, true, true});
  c.layers[1].low_rank = 7;
  c.layers[2].low_rank = 33;
  c.layers[4].low_rank = 16;
  return c;
}

Matrix random_matrix(Arena& arena, const std::string& name, int rows, int cols, bool packed) {
  if (!packed) {
    std::vector<float> values(size_t(rows) * size_t(cols));
    for (float& v : values) v = check::normal() * 0.1f;
    return Matrix::plain(arena, name, kF32, rows, cols, {values.data(), values.size() * 4}, Activation::kF32);
  }
  const size_t panels = size_t((rows + 15) / 16), blocks = size_t((cols + 31) / 32);
  std::vector<uint8_t> codes(panels * blocks * 256);
  for (uint8_t& c : codes) c = uint8_t(check::between(0, 255));
  std::vector<uint16_t> scales(panels * blocks * 16, 0x2400);  // 1/64
  return Matrix::packed(arena, name, {4, true, 32}, rows, cols, Activation::kInt8,
                        {{codes.data(), codes.size()}, {scales.data(), scales.size() * 2}});
}

std::shared_ptr<Model> small_model(bool packed, NormKind norm) {
  DecoderConfig config = small_config();
  config.norm = norm;
  auto model = std::make_shared<Model>(config);
  const auto expected = model->expected();
  for (const auto& [name, shape] : expected) {
    if (shape.second) {
      const bool plain = !packed || name == "position.weight" || name.find("router") != std::string::npos;
      model->add_matrix(name, random_matrix(model->arena(), name, shape.first, shape.second, !plain));
      continue;
    }
    std::vector<float> values(static_cast<size_t>(shape.first));
    for (float& v : values) v = float(name.ends_with("norm.weight")) + check::normal() * 0.1f;
    model->add_vector(name, values.data(), values.size());
  }
  model->finalize();
  return model;
}

std::vector<std::int32_t> random_tokens(int n) {
  std::vector<std::int32_t> tokens;
  for (int i = 0; i < n; ++i) tokens.push_back(check::between(0, 210));
  return tokens;
}

std::vector<float> logits(Context& context, int sequence, std::span<const std::int32_t> tokens) {
  const Slice slice{sequence, tokens, LogitsMode::kAll};
  std::vector<float> out(tokens.size() * 211);
  context.forward({&slice, 1}, out.data());
  return out;
}

bool same(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

void test_one_answer(const std::shared_ptr<Model>& model, KvMode kv) {
  const std::vector<std::int32_t> tokens = random_tokens(150);
  std::vector<float> wanted;
  for (const std::string& isa : supported_isas()) {
    // The processor's bf16 product has bits of its own.
    if (wanted.empty() || (kv == KvMode::kBf16 && pick_kernels(isa).bf16)) {
      Context plain(model, {1, isa, kv, 160, 1, 0});
      wanted = logits(plain, plain.sequences().create(), tokens);
    }
    for (const int chunk : {0, 1, 33}) {
      Context context(model, {3, isa, kv, 160, 3, chunk});
      const int first = context.sequences().create(), second = context.sequences().create();
      CHECK(same(logits(context, first, tokens), wanted), "whole, " + isa);
      const std::span<const std::int32_t> all(tokens);
      std::vector<float> parts = logits(context, second, all.first(70));
      const int copy = context.sequences().fork(second);
      const std::vector<float> rest = logits(context, copy, all.subspan(70));
      parts.insert(parts.end(), rest.begin(), rest.end());
      CHECK(same(parts, wanted), "in parts and forked, " + isa);
      // Two sequences in one step.
      context.sequences().truncate(first, 69);
      context.sequences().truncate(copy, 100);
      const Slice slices[] = {{copy, all.subspan(100, 30), LogitsMode::kLast},
                              {first, all.subspan(69, 1), LogitsMode::kAll}};
      std::vector<float> both(2 * 211);
      context.forward(slices, both.data());
      CHECK(same(std::span(both).first(211), std::span(wanted).subspan(129 * 211, 211)), "batch, " + isa);
      CHECK(same(std::span(both).last(211), std::span(wanted).subspan(69 * 211, 211)), "batch, " + isa);
    }
  }
}

// Decode over several chunks of positions, which threads share: equal to one thread, to other sizes of chunks of tokens,
// and to prefill at once.
void test_long_context(const std::shared_ptr<Model>& model, KvMode kv) {
  const std::vector<std::int32_t> tokens = random_tokens(1100);
  Context plain(model, {1, "", kv, 1200, 1, 0});
  const std::vector<float> wanted = logits(plain, plain.sequences().create(), tokens);
  const std::span<const std::int32_t> all(tokens);
  for (const int threads : {1, 2, 3}) {
    Context context(model, {threads, "", kv, 1200, 2, 50});
    const int sequence = context.sequences().create(), other = context.sequences().create();
    logits(context, sequence, all.first(1098));
    logits(context, other, all.first(600));
    const Slice slices[] = {{sequence, all.subspan(1098, 1), LogitsMode::kLast},
                            {other, all.subspan(600, 1), LogitsMode::kLast}};
    std::vector<float> both(2 * 211);
    context.forward(slices, both.data());
    const std::vector<float> last = logits(context, sequence, all.subspan(1099));
    const auto row = [&](size_t i) { return std::span(wanted).subspan(i * 211, 211); };
    CHECK(same(std::span(both).first(211), row(1098)), "two sequences over long contexts");
    CHECK(same(std::span(both).last(211), row(600)), "two sequences over long contexts");
    CHECK(same(last, row(1099)), "decode over a long context");
  }
}

// Random forks, truncations, shared beginnings, releases and steps over several sequences in a pool that is too small for
// all: what a sequence gives is what its tokens give in a fresh one.
void test_pages(const std::shared_ptr<Model>& model, KvMode kv) {
  Context plain(model, {1, "", kv, 300, 1, 0});
  Context context(model, {2, "", kv, 300, 4, 0, 1000, true});
  KvPool& pool = context.sequences();
  std::map<int, std::vector<std::int32_t>> held;
  const auto any = [&] { return std::next(held.begin(), check::between(0, int(held.size()) - 1)); };
  const auto step = [&](const std::vector<std::pair<int, std::vector<std::int32_t>>>& parts) {
    std::vector<Slice> slices;
    for (const auto& [sequence, tokens] : parts) slices.push_back({sequence, tokens, LogitsMode::kLast});
    std::vector<float> out(parts.size() * 211);
    try {
      context.forward(slices, out.data());
    } catch (const EngineFault&) {
      for (const auto& [sequence, tokens] : parts)
        CHECK(pool.length(sequence) == int(held[sequence].size()), "a refused step must change nothing");
      return;
    }
    for (size_t i = 0; i < parts.size(); ++i) {
      std::vector<std::int32_t>& all = held[parts[i].first];
      all.insert(all.end(), parts[i].second.begin(), parts[i].second.end());
      const int fresh = plain.sequences().create();
      const std::vector<float> wanted = logits(plain, fresh, all);
      plain.sequences().release(fresh);
      CHECK(same(std::span(out).subspan(i * 211, 211), std::span(wanted).last(211)), "after any operations");
      CHECK(pool.history(parts[i].first) == all, "the tokens of a sequence");
    }
  };
  for (int round = 0; round < 60; ++round) {
    const int action = held.empty() ? 0 : check::between(0, 7);
    if (action <= 1 && held.size() < 4) {
      std::vector<std::int32_t> tokens = random_tokens(check::between(1, 200));
      if (!held.empty()) {
        const std::vector<std::int32_t>& other = any()->second;
        std::copy_n(other.begin(), std::min(other.size(), tokens.size()) / 2, tokens.begin());
      }
      const auto [sequence, there] = pool.create(tokens);
      CHECK(there < int(tokens.size()) && pool.length(sequence) == there, "the last token is left to do");
      held[sequence].assign(tokens.begin(), tokens.begin() + there);
      step({{sequence, {tokens.begin() + there, tokens.end()}}});
    } else if (action == 2 && held.size() < 4) {
      const auto from = any();
      held[pool.fork(from->first)] = from->second;
    } else if (action == 3) {
      const auto at = any();
      at->second.resize(size_t(check::between(0, int(at->second.size()))));
      pool.truncate(at->first, int(at->second.size()));
    } else if (action == 4) {
      const int sequence = any()->first;
      pool.release(sequence);
      held.erase(sequence);
    } else if (action == 5) {
      const auto at = any();
      const std::vector<std::uint8_t> saved = pool.save(at->first, 7);
      pool.release(at->first);
      const std::vector<std::int32_t> tokens = at->second;
      held.erase(at);
      try {
        held[pool.restore(saved, 7)] = tokens;
      } catch (const EngineFault&) {
      }
    } else {
      std::vector<std::pair<int, std::vector<std::int32_t>>> parts;
      for (const auto& [sequence, tokens] : held)
        if (tokens.size() < 200) parts.push_back({sequence, random_tokens(check::between(1, 100))});
      if (!parts.empty()) step(parts);
    }
    const KvPages::Use use = pool.pages();
    CHECK(use.held + use.kept <= use.total, "no page is counted twice");
  }
  for (const auto& [sequence, tokens] : held) pool.release(sequence);
  CHECK(pool.pages().held == 0, "all pages are given back");
}

template <class Work>
bool refuses(const Work& work) {
  try {
    work();
  } catch (const EngineFault&) {
    return true;
  }
  return false;
}

void test_refusals(const std::shared_ptr<Model>& model) {
  Context context(model, {1, "", KvMode::kBf16, 16, 1, 0});
  CHECK(refuses([&] { context.sequences().length(0); }), "a sequence that was never made");
  const int s = context.sequences().create();
  CHECK(refuses([&] { logits(context, s, std::vector<std::int32_t>{211}); }), "a token outside the vocabulary");
  CHECK(refuses([&] { logits(context, s, random_tokens(17)); }), "more than the context");
  CHECK(refuses([&] { context.sequences().truncate(s, 1); }), "growing by truncation");
  CHECK(refuses([&] { Context(model, {1, "", KvMode::kBf16, 1201, 1, 0}); }), "a context longer than the model's");
  CHECK(refuses([&] { Context(model, {0, "", KvMode::kBf16, 16, 1, 0}); }), "no threads");
  CHECK(context.sequences().length(s) == 0, "a refused step must change nothing");
}

void test_interruption(const std::shared_ptr<Model>& model) {
  Context context(model, {2, "", KvMode::kF32, 160, 1, 0});
  GenerateRequest request{random_tokens(5), 100, {0.8, 0, 0.9, 0.01, 1.1, 7}, {}};
  int seen = 0;
  const GenerateResult cut = generate(context, request, [&](std::int32_t) { return ++seen < 4; }, {});
  const GenerateResult whole = generate(context, request, {}, {});
  CHECK(cut.tokens.size() == 4 && cut.reason == FinishReason::kInterrupted, "stopped by the callback");
  CHECK(whole.tokens.size() == 100 && whole.reason == FinishReason::kLength, "as long as asked");
  CHECK(std::equal(cut.tokens.begin(), cut.tokens.end(), whole.tokens.begin()), "the same tokens");
}

// Products over threads, in items of every size: equal to each matrix in one call of its kernel, the whole output written.
void test_products(bool packed) {
  Arena arena;
  const Kernels& kernels = pick_kernels("");
  const int columns = 70;
  std::vector<Matrix> matrices;
  for (const int rows : {5000, 33, 2100}) matrices.push_back(random_matrix(arena, std::to_string(rows), rows, columns, packed));
  std::vector<Linear> linears;
  InputForms forms;
  for (const Matrix& m : matrices) linears.push_back({&m, nullptr});
  for (const Linear& l : linears) forms.add(l);
  for (const std::vector<int>& parts : {std::vector<int>{1}, {7}, {83}, {300}, {40, 1, 19}}) {
    const int rows = std::accumulate(parts.begin(), parts.end(), 0);
    AlignedBuffer x(size_t(rows) * 96 * sizeof(float));
    for (int i = 0; i < rows * 96; ++i) x.as<float>()[i] = check::normal();
    ProductInput input;
    input.reserve(kernels, forms, columns, rows, parts.size() > 1);
    input.begin(forms, x.as<float>(), columns, parts);
    for (int i = 0; i < rows; ++i) input.prepare(kernels, i);
    const auto run = [&](auto multiply_all) {
      std::vector<std::vector<float>> outputs;
      std::vector<Product> products;
      for (size_t i = 0; i < linears.size(); ++i) {
        const int part = int(i % parts.size()), width = linears[i].weight->rows();
        outputs.emplace_back(size_t(parts[size_t(part)]) * size_t(width), 1e30f);
        products.push_back({&linears[i], outputs.back().data(), size_t(width), false, part});
      }
      multiply_all(products);
      return outputs;
    };
    const auto wanted = run([&](const std::vector<Product>& products) {
      for (const Product& p : products) {
        const Matrix& w = *p.linear->weight;
        const Output out{p.y, p.ld, nullptr, false};
        if (packed)
          kernels.matmul_int8(w.packed_view(), input.int8(p.part, w.grid().shares_row_scale()), input.rows(p.part), 0,
                              w.panels(), out);
        else
          kernels.matmul_plain(w.plain_view(), input.floats(p.part, false), input.rows(p.part), 0, w.panels(), out);
      }
    });
    for (const int threads : {1, 2, 3, 5})
      CHECK(run([&](const auto& products) { multiply(kernels, threads, input, products); }) == wanted,
            std::to_string(rows) + " tokens on " + std::to_string(threads) + " threads");
  }
}

// Many small jobs from several threads at once: what a thread sanitizer should see.
void test_pool() {
  const auto client = [] {
    for (int round = 0; round < 2000; ++round) {
      std::vector<int> done(size_t(round % 17) + 1, 0);
      ThreadPool::instance().run(1 + round % 4, int(done.size()), [&](int i) { done[size_t(i)] += i + 1; });
      for (size_t i = 0; i < done.size(); ++i) CHECK(done[i] == int(i) + 1, "an item was lost or done twice");
      std::vector<int> rows(size_t(round % 71), 0);
      ThreadPool::instance().run_rows(1 + round % 5, int(rows.size()), 1e4, [&](int i) { ++rows[size_t(i)]; });
      for (const int times : rows) CHECK(times == 1, "a row was lost or done twice");
    }
  };
  std::thread other(client);
  client();
  other.join();
}

// Greedy: the first of the highest logits, wherever it lies.
void test_greedy() {
  for (int round = 0; round < 500; ++round) {
    std::vector<float> logits(size_t(check::between(1, round % 2 ? 5000 : 70)));
    const int levels = round % 3 ? 1 << 20 : 3;  // few: many are equal, zeros of both signs too
    for (float& v : logits) v = float(check::between(-levels, round % 5 ? levels : 0));
    if (round % 4 == 0) logits[size_t(check::between(0, int(logits.size()) - 1))] = -0.0f;
    if (round % 7 == 0) std::fill(logits.begin(), logits.end() - 1, -INFINITY);
    const auto wanted = std::max_element(logits.begin(), logits.end()) - logits.begin();
    CHECK(Sampler({}, int(logits.size()), 1).choose(logits, 0) == int(wanted),
          "not the first of the highest of " + std::to_string(logits.size()));
  }
}

// The draw as sampling.py words it, over the whole vocabulary in order.
int plain_draw(const SamplerSettings& s, const std::vector<float>& logits, std::uint64_t position) {
  std::vector<int> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[size_t(a)] > logits[size_t(b)]; });
  if (s.top_k > 0) order.resize(std::min(order.size(), size_t(s.top_k)));
  std::vector<double> p;
  for (const int i : order) p.push_back(std::exp((double(logits[size_t(i)]) - double(logits[size_t(order[0])])) / s.temperature));
  const double total = std::accumulate(p.begin(), p.end(), 0.0);
  double before = 0;
  size_t kept = 0;
  for (; kept < p.size() && (kept == 0 || before < s.top_p * total || s.top_p == 1); ++kept) before += p[kept];
  while (kept > 1 && p[kept - 1] < s.min_p) --kept;
  const double target = uniform(s.seed, position) * std::accumulate(p.begin(), p.begin() + std::ptrdiff_t(kept), 0.0);
  double running = 0;
  for (size_t i = 0; i < kept; ++i)
    if ((running += p[i]) > target) return order[i];
  return order[kept - 1];
}

// Few tokens are put in order for a draw; it is that of all of them, however flat or peaked they are.
void test_draws() {
  for (int round = 0; round < 600; ++round) {
    std::vector<float> logits(size_t(check::between(1, round % 2 ? 9000 : 400)));
    const float spread = std::exp(2 * check::normal());
    for (float& v : logits) v = std::round(spread * check::normal() * 64) / 64;  // some are equal
    SamplerSettings s;
    s.temperature = std::exp(check::normal());
    s.seed = std::uint64_t(check::between(0, 1 << 30));
    if (round % 3 == 0) s.top_k = check::between(1, 300);
    if (round % 4 == 0) s.top_p = check::between(1, 99) / 100.0;
    if (round % 5 == 0) s.min_p = check::between(1, 99) / 1000.0;
    for (std::uint64_t position = 0; position < 4; ++position) {
      const int wanted = plain_draw(s, logits, position);
      for (const int threads : {1, 3}) {
        std::vector<float> given = logits;
        CHECK(Sampler(s, int(logits.size()), threads).choose(given, position) == wanted,
              "another token of " + std::to_string(logits.size()));
      }
    }
  }
}

// A pass of jobs is followed by what the pass before showed, around its end too; each job is asked once.
void test_foresight() {
  Foresight foresight;
  const Linear jobs[3];
  int asked = 0;
  const auto after = [&](int job) {
    return foresight.after(&jobs[job], [&] {
      ++asked;
      return NextReads{};
    });
  };
  foresight.restart();
  CHECK(after(0) == nullptr && after(1) == nullptr, "a first pass knows what follows");
  foresight.restart();
  const NextReads* second = after(0);
  const NextReads* first = after(1);
  CHECK(first && second && first != second, "a second pass does not know what follows");
  CHECK(asked == 2, "a known job is asked again");
  foresight.restart();
  CHECK(after(2) == second, "another first job changes what follows it");
  CHECK(asked == 3, "another job is not asked");
}

}  // namespace

// Weights are moved by several threads while another reads them.
void test_moving_weights() {
  Arena arena;
  std::vector<std::span<std::uint32_t>> parts;
  for (const std::size_t count : {std::size_t(1) << 20, std::size_t(3) << 20, std::size_t(17) << 20, std::size_t(5)}) {
    parts.emplace_back(reinterpret_cast<std::uint32_t*>(arena.take(count * 4)), count);
    std::iota(parts.back().begin(), parts.back().end(), std::uint32_t(parts.size()));
  }
  const auto sum = [&] {
    std::uint64_t total = 0;
    for (const auto& part : parts)
      for (std::size_t i = 0; i < part.size(); i += 13) total += part[i];
    return total;
  };
  const std::uint64_t wanted = sum();
  CHECK(!arena.huge_pages().left(), "nothing moves while weights are read in");
  arena.filled();
  CHECK(!LaterHugePages::possible() || arena.huge_pages().count() >= 30, "pages that lie beyond the first region");
  std::vector<std::thread> movers;
  for (int i = 0; i < 3; ++i)
    movers.emplace_back([&] {
      while (arena.huge_pages().left()) arena.huge_pages().move_one();
    });
  for (int i = 0; i < 5; ++i) CHECK(sum() == wanted, "read while they move");
  for (std::thread& mover : movers) mover.join();
  CHECK(sum() == wanted, "read afterwards");
  for (const auto& part : parts)
    for (std::size_t i = 0; i < part.size(); ++i)
      if (part[i] != std::uint32_t(&part - parts.data()) + 1 + i) return CHECK(false, "a value has changed");
}

int main() {
  test_moving_weights();
  test_pool();
  test_foresight();
  test_greedy();
  test_draws();
  for (const bool packed : {false, true}) {
    const auto model = small_model(packed, packed ? NormKind::kRms : NormKind::kLayer);
    for (const KvMode kv : {KvMode::kNone, KvMode::kF32, KvMode::kBf16, KvMode::kInt8}) test_one_answer(model, kv);
    for (const KvMode kv : {KvMode::kBf16, KvMode::kInt8}) test_long_context(model, kv);
    for (const KvMode kv : {KvMode::kNone, KvMode::kF32, KvMode::kInt8}) test_pages(model, kv);
    test_products(packed);
    test_refusals(model);
    test_interruption(model);
  }
  return check::finish("test_engine");
}
