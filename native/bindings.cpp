// The only file that knows Python: records to structs, buffers to spans, errors to exceptions.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "engine/dispatch.h"
#include "engine/crc32.h"
#include "engine/generate.h"
#include "engine/loader.h"
#include "engine/probe.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace trilemma {
namespace {

using ByteArray = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatArray = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using TokenArray = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Logits = nb::ndarray<nb::numpy, float, nb::ndim<2>, nb::c_contig>;

template <class Enum>
Enum named(const std::string& value, const char* what, std::initializer_list<std::pair<const char*, Enum>> names) {
  std::string valid;
  for (const auto& [name, result] : names) {
    if (value == name) return result;
    valid += (valid.empty() ? "" : ", ") + std::string(name);
  }
  throw EngineFault("Unknown " + std::string(what) + " '" + value + "'. Valid: " + valid + ".");
}

Activation activation_of(const std::string& name) {
  return named<Activation>(name, "activation",
                           {{"f32", Activation::kF32}, {"bf16", Activation::kBf16}, {"int8-g32", Activation::kInt8}});
}

Dtype dtype_of(const std::string& name) {
  return named<Dtype>(name, "dtype", {{"f32", kF32}, {"f16", kF16}, {"bf16", kBf16}});
}

template <class T>
T field(const nb::dict& record, const char* key) {
  if (!record.contains(key)) throw EngineFault("The config has no field '" + std::string(key) + "'.");
  try {
    return nb::cast<T>(record[key]);
  } catch (const nb::cast_error&) {
    throw EngineFault("The config's field '" + std::string(key) + "' has the wrong type.");
  }
}

std::optional<nb::dict> part(const nb::dict& record, const char* key) {
  const nb::object value = field<nb::object>(record, key);
  if (value.is_none()) return std::nullopt;
  return nb::cast<nb::dict>(value);
}

AttentionSpec read_attention(const nb::dict& d) {
  AttentionSpec a;
  a.heads = field<int>(d, "heads");
  a.kv_heads = field<int>(d, "kv_heads");
  a.head_dim = field<int>(d, "head_dim");
  a.scale = field<float>(d, "scale");
  a.window = field<std::optional<int>>(d, "window").value_or(0);
  a.qkv_bias = field<bool>(d, "qkv_bias");
  a.o_bias = field<bool>(d, "o_bias");
  a.qk_norm = field<bool>(d, "qk_norm");
  if (const auto rope = part(d, "rope"))
    a.rope = RopeSpec{field<std::vector<float>>(*rope, "inverse_frequencies"), field<float>(*rope, "attention_factor")};
  return a;
}

Nonlinearity read_nonlinearity(const nb::dict& d) {
  return named<Nonlinearity>(field<std::string>(d, "activation"), "ffn activation",
                             {{"silu", kSilu}, {"gelu", kGelu}, {"gelu_tanh", kGeluTanh}, {"relu", kRelu}});
}

FfnSpec read_dense(const nb::dict& d) {
  return {field<int>(d, "hidden"), read_nonlinearity(d), field<bool>(d, "gated"), field<bool>(d, "bias"),
          field<bool>(d, "down_bias")};
}

ExpertsSpec read_experts(const nb::dict& d) {
  ExpertsSpec e;
  e.count = field<int>(d, "count");
  e.active = field<int>(d, "active");
  e.hidden = field<int>(d, "hidden");
  e.activation = read_nonlinearity(d);
  e.router = named<RouterKind>(field<std::string>(d, "router"), "router",
                               {{"linear", RouterKind::kLinear}, {"glu", RouterKind::kGlu}});
  e.gates = named<GateKind>(
      field<std::string>(d, "gates"), "gates",
      {{"normalized", GateKind::kNormalized}, {"softmax", GateKind::kSoftmax}, {"one", GateKind::kOne}});
  e.shared_hidden = field<int>(d, "shared_hidden");
  e.down_bias = field<bool>(d, "down_bias");
  return e;
}

LayerConfig read_layer(const nb::dict& d) {
  LayerConfig layer;
  if (const auto attention = part(d, "attention")) layer.attention = read_attention(*attention);
  if (const auto ffn = part(d, "ffn")) {
    enum class Kind { kDense, kExperts };
    const auto kind = named<Kind>(field<std::string>(*ffn, "kind"), "ffn kind",
                                  {{"dense", Kind::kDense}, {"experts", Kind::kExperts}});
    if (kind == Kind::kDense)
      layer.ffn = read_dense(*ffn);
    else
      layer.experts = read_experts(*ffn);
  }
  layer.parallel = field<bool>(d, "parallel");
  layer.post_norms = field<bool>(d, "post_norms");
  layer.low_rank = field<int>(d, "low_rank");
  return layer;
}

// `d` is DecoderConfig.model_dump().
DecoderConfig read_config(const nb::dict& d) {
  DecoderConfig c;
  c.dim = field<int>(d, "dim");
  c.vocab_size = field<int>(d, "vocab_size");
  c.max_context = field<int>(d, "max_context");
  c.norm_eps = field<float>(d, "norm_eps");
  c.tied = field<bool>(d, "tied");
  c.norm =
      named<NormKind>(field<std::string>(d, "norm"), "norm", {{"rms", NormKind::kRms}, {"layer", NormKind::kLayer}});
  c.norm_bias = field<bool>(d, "norm_bias");
  c.embedding_scale = field<float>(d, "embedding_scale");
  c.learned_positions = field<bool>(d, "learned_positions");
  for (const nb::handle layer : field<nb::sequence>(d, "layers"))
    c.layers.push_back(read_layer(nb::cast<nb::dict>(layer)));
  return c;
}

Bytes bytes_of(const ByteArray& array) { return {array.data(), array.size()}; }

// Called without the GIL; true when a signal handler raised (Ctrl-C).
bool signal_raised() {
  const nb::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

KvMode kv_mode_of(const std::string& name) {
  return named<KvMode>(
      name, "kv_cache",
      {{"none", KvMode::kNone}, {"f32", KvMode::kF32}, {"bf16", KvMode::kBf16}, {"int8", KvMode::kInt8}, {"int4", KvMode::kInt4}});
}

// A context is used by one thread at a time; a second one is told so instead of corrupting the cache.
class PyContext {
  template <class Work>
  auto exclusively(const Work& work) {
    if (busy_.exchange(true))
      throw EngineFault("This engine is already at work in another thread. Open one engine a thread.");
    struct Free {
      std::atomic<bool>& busy;
      ~Free() { busy = false; }
    } const free{busy_};
    try {
      const nb::gil_scoped_release unlocked;
      return work();
    } catch (const Interrupted&) {
      throw nb::python_error();
    }
  }

 public:
  PyContext(std::shared_ptr<const Model> model, int threads, const std::string& isa, const std::string& kv_cache,
            int max_context, int max_sequences, int chunk, int kv_positions, bool share_prefixes)
      : context_(std::move(model), {threads, isa, kv_mode_of(kv_cache), max_context, max_sequences, chunk, kv_positions,
                                    share_prefixes}) {}

  Logits forward(const std::vector<std::tuple<int, TokenArray, std::string>>& steps) {
    std::vector<Slice> slices;
    for (const auto& [sequence, tokens, logits] : steps)
      slices.push_back(
          {sequence,
           {tokens.data(), tokens.size()},
           named<LogitsMode>(logits, "logits mode",
                             {{"none", LogitsMode::kNone}, {"last", LogitsMode::kLast}, {"all", LogitsMode::kAll}})});
    const std::size_t rows = Context::logits_rows(slices), vocab = std::size_t(context_.model().config().vocab_size);
    auto values = std::make_unique_for_overwrite<float[]>(rows * vocab);
    exclusively([&] { context_.forward(slices, values.get(), signal_raised); });
    float* data = values.release();
    const nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    return Logits(data, {rows, vocab}, owner);
  }

  nb::tuple generate(std::vector<std::int32_t> prompt, int max_tokens, double temperature, int top_k, double top_p,
                     double min_p, double repetition_penalty, std::uint64_t seed, std::vector<std::int32_t> stops,
                     const nb::object& on_token) {
    const GenerateRequest request{
        std::move(prompt), max_tokens, {temperature, top_k, top_p, min_p, repetition_penalty, seed}, std::move(stops)};
    const auto callback = [&](std::int32_t token) {
      const nb::gil_scoped_acquire gil;
      if (PyErr_CheckSignals() != 0) throw nb::python_error();
      if (on_token.is_none()) return true;
      const nb::object answer = on_token(token);
      return !(nb::isinstance<nb::bool_>(answer) && !nb::cast<bool>(answer));
    };
    GenerateResult result;
    exclusively([&] { result = trilemma::generate(context_, request, callback, signal_raised); });
    static const char* const reasons[] = {"length", "stop", "context", "interrupted"};
    return nb::make_tuple(result.tokens, result.times_s, reasons[int(result.reason)], result.shared);
  }

  int create() {
    return exclusively([&] { return context_.sequences().create(); });
  }
  // (sequence, how many of the tokens it holds already)
  std::pair<int, int> begin(const TokenArray& tokens) {
    return exclusively([&] { return context_.sequences().create(std::span(tokens.data(), tokens.size())); });
  }
  int fork(int sequence) {
    return exclusively([&] { return context_.sequences().fork(sequence); });
  }
  void truncate(int sequence, int length) {
    exclusively([&] { context_.sequences().truncate(sequence, length); });
  }
  void release(int sequence) {
    exclusively([&] { context_.sequences().release(sequence); });
  }
  nb::bytes save(int sequence) {
    const auto saved = exclusively([&] { return context_.sequences().save(sequence, context_.fingerprint()); });
    return nb::bytes(saved.data(), saved.size());
  }
  int restore(const nb::bytes& saved) {
    const std::span bytes(static_cast<const std::uint8_t*>(saved.data()), saved.size());
    return exclusively([&] { return context_.sequences().restore(bytes, context_.fingerprint()); });
  }
  // (all, held by sequences, kept for those to come)
  std::tuple<int, int, int> pages() {
    const auto use = exclusively([&] { return context_.sequences().pages(); });
    return {use.total, use.held, use.kept};
  }
  int length(int sequence) { return context_.sequences().length(sequence); }
  nb::tuple memory() const {
    const MemoryUse use = context_.memory();
    return nb::make_tuple(use.weights, use.kv, use.scratch);
  }
  const char* isa() const { return context_.isa(); }
  int threads() const { return context_.threads(); }
  int max_context() const { return context_.max_context(); }

 private:
  Context context_;
  std::atomic<bool> busy_{false};
};

// glibc keeps up to 64 MB of what tensors were read into; other allocators have nothing to be told.
void release_free_memory() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

// (KV cache, scratch) in bytes; `products` are (activation, bits, symmetric, group, codebook) of the matrices, bits 0 for
// those in rows; the group is the smallest that has a scale or a factor.
nb::tuple plan(const nb::dict& config, const std::vector<std::tuple<std::string, int, bool, int, bool>>& products,
               const std::string& isa, const std::string& kv_cache, int max_context, int max_sequences,
               int kv_positions) {
  InputForms forms;
  for (const auto& [activation, bits, symmetric, group, codebook] : products) {
    const auto layout = bits == 0    ? Matrix::Layout::kRows
                        : bits == 16 ? Matrix::Layout::kPairs
                                     : Matrix::Layout::kPanels;
    forms.add(activation_of(activation), layout, {bits, symmetric, group, 0, codebook});
  }
  const MemoryUse use =
      plan_memory(read_config(config), forms,
                                    {1, isa, kv_mode_of(kv_cache), max_context, max_sequences, 0, kv_positions});
  return nb::make_tuple(use.kv, use.scratch);
}

void bind_model(nb::module_& m) {
  nb::class_<Model>(m, "Model", "The immutable weights; filled tensor by tensor, then finalized.")
      .def(
          "__init__", [](Model* self, const nb::dict& config) { new (self) Model(read_config(config)); }, "config"_a)
      .def(
          "add_plain",
          [](Model& self, const std::string& name, const std::string& dtype, int rows, int cols, const ByteArray& data,
             const std::string& activation) {
            self.add_matrix(name, Matrix::plain(self.arena(), name, dtype_of(dtype), rows, cols, bytes_of(data),
                                                activation_of(activation)));
          },
          "name"_a, "dtype"_a, "rows"_a, "cols"_a, "data"_a, "activation"_a = "f32")
      .def(
          "add_packed",
          [](Model& self, const std::string& name, int bits, bool symmetric, int group, int rows, int cols,
             const std::string& activation, const ByteArray& codes, const ByteArray& scales,
             const std::optional<ByteArray>& minima, int sub_group, const std::optional<ByteArray>& sub_scales,
             const std::optional<ByteArray>& sub_minima, bool codebook) {
            const auto given = [](const std::optional<ByteArray>& part) { return part ? bytes_of(*part) : Bytes{}; };
            self.add_matrix(name, Matrix::packed(self.arena(), name, {bits, symmetric, group, sub_group, codebook},
                                                 rows, cols, activation_of(activation),
                                                 {bytes_of(codes), bytes_of(scales), given(minima), given(sub_scales),
                                                  given(sub_minima)}));
          },
          "name"_a, "bits"_a, "symmetric"_a, "group"_a, "rows"_a, "cols"_a, "activation"_a, "codes"_a, "scales"_a,
          "minima"_a.none() = nb::none(), "sub_group"_a = 0, "sub_scales"_a.none() = nb::none(),
          "sub_minima"_a.none() = nb::none(), "codebook"_a = false)
      .def(
          "add_vector",
          [](Model& self, const std::string& name, const FloatArray& values) {
            self.add_vector(name, values.data(), values.size());
          },
          "name"_a, "values"_a)
      .def("finalize", &Model::finalize)
      .def(
          "settle",
          [](const Model& self, int threads) {
            const nb::gil_scoped_release unlocked;
            const LaterHugePages& pages = self.huge_pages();
            ThreadPool::instance().run(threads, int(pages.count()), [&](int) { pages.move_one(); });
          },
          "threads"_a)
      .def_prop_ro("weights_bytes", &Model::weights_bytes);
}

Piece piece_of(const std::tuple<std::uint64_t, std::uint64_t, std::int64_t>& piece) {
  return {std::get<0>(piece), std::get<1>(piece), std::get<2>(piece)};
}

void run_loader(Loader& loader, int threads) {
  try {
    const nb::gil_scoped_release unlocked;
    loader.run(threads, signal_raised);
  } catch (const Interrupted&) {
    throw nb::python_error();
  }
}

void bind_loader(nb::module_& m) {
  using PieceTuple = std::tuple<std::uint64_t, std::uint64_t, std::int64_t>;
  using Order = std::vector<std::int32_t>;
  nb::class_<Loader>(m, "Loader", "Fills a model from files: tensors are announced, then read together.")
      .def(
          "__init__",
          [](Loader* self, std::shared_ptr<Model> model, bool map, bool verify) {
            new (self) Loader(std::move(model), {map, verify});
          },
          "model"_a, nb::kw_only(), "map"_a, "verify"_a)
      .def("add_file", &Loader::add_file, "path"_a, "bytes"_a)
      .def(
          "add_panels",
          [](Loader& self, const std::string& name, int bits, bool symmetric, int group, int sub_group, int rows,
             int cols, const std::string& activation, int file, const std::vector<PieceTuple>& pieces, bool codebook) {
            std::vector<Piece> found;
            for (const auto& piece : pieces) found.push_back(piece_of(piece));
            self.add_panels(name, {bits, symmetric, group, sub_group, codebook}, rows, cols, activation_of(activation),
                            file, found);
          },
          "name"_a, "bits"_a, "symmetric"_a, "group"_a, "sub_group"_a, "rows"_a, "cols"_a, "activation"_a, "file"_a,
          "pieces"_a, "codebook"_a = false)
      .def(
          "add_rows",
          [](Loader& self, const std::string& name, const std::string& label, const std::string& dtype, int rows,
             int cols, const std::string& activation, int file, const PieceTuple& piece, Order order) {
            self.add_rows(name, label, dtype_of(dtype), rows, cols, activation_of(activation), file, piece_of(piece),
                          std::move(order));
          },
          "name"_a, "label"_a, "dtype"_a, "rows"_a, "cols"_a, "activation"_a, "file"_a, "piece"_a, "order"_a)
      .def(
          "add_blocks",
          [](Loader& self, const std::string& name, const std::string& label, const std::string& type, int rows,
             int cols, const std::string& activation, int file, const PieceTuple& piece, Order order) {
            self.add_blocks(name, label, type, rows, cols, activation_of(activation), file, piece_of(piece),
                            std::move(order));
          },
          "name"_a, "label"_a, "type"_a, "rows"_a, "cols"_a, "activation"_a, "file"_a, "piece"_a, "order"_a)
      .def("run", run_loader, "threads"_a);
}

void bind_context(nb::module_& m) {
  nb::class_<PyContext>(m, "Context", "One way of running a model: threads, kernels, KV cache, scratch.")
      .def(nb::init<std::shared_ptr<const Model>, int, const std::string&, const std::string&, int, int, int, int,
                    bool>(),
           "model"_a, nb::kw_only(), "threads"_a, "isa"_a, "kv_cache"_a, "max_context"_a, "max_sequences"_a = 1,
           "chunk"_a = 0, "kv_positions"_a = 0, "share_prefixes"_a = false)
      .def("forward", &PyContext::forward, "steps"_a)
      .def("generate", &PyContext::generate, "prompt"_a, nb::kw_only(), "max_tokens"_a, "temperature"_a, "top_k"_a,
           "top_p"_a, "min_p"_a, "repetition_penalty"_a, "seed"_a, "stop_tokens"_a, "on_token"_a.none() = nb::none())
      .def("create", &PyContext::create)
      .def("begin", &PyContext::begin, "tokens"_a)
      .def("fork", &PyContext::fork, "sequence"_a)
      .def("truncate", &PyContext::truncate, "sequence"_a, "length"_a)
      .def("release", &PyContext::release, "sequence"_a)
      .def("length", &PyContext::length, "sequence"_a)
      .def("save", &PyContext::save, "sequence"_a)
      .def("restore", &PyContext::restore, "saved"_a)
      .def("pages", &PyContext::pages)
      .def("memory", &PyContext::memory)
      .def_prop_ro("isa", &PyContext::isa)
      .def_prop_ro("threads", &PyContext::threads)
      .def_prop_ro("max_context", &PyContext::max_context);
}

}  // namespace
}  // namespace trilemma

NB_MODULE(_native, m) {
  m.doc() = "Trilemma's native engine: a decoder step on the CPU.";
  nb::exception<trilemma::EngineFault>(m, "NativeError", PyExc_ValueError);
  m.def("supported_isas", &trilemma::supported_isas);
  m.def("time_products", &trilemma::time_products, "model"_a, "jobs"_a, nb::kw_only(), "tokens"_a, "threads"_a,
        "isa"_a = "", "passes"_a = 1, nb::call_guard<nb::gil_scoped_release>());
  m.def("release_free_memory", &trilemma::release_free_memory);
  m.def("plan_memory", &trilemma::plan, "config"_a, "products"_a, nb::kw_only(), "isa"_a, "kv_cache"_a, "max_context"_a,
        "max_sequences"_a = 1, "kv_positions"_a = 0);
  m.def(
      "crc32", [](const trilemma::ByteArray& data) { return trilemma::crc32(data.data(), data.size()); }, "data"_a);
  trilemma::bind_model(m);
  trilemma::bind_loader(m);
  trilemma::bind_context(m);
}
