#include "model.h"

#include <cstring>

#include "fingerprint.h"

namespace trilemma {
namespace {

std::string prefix_of(int layer) { return "layers." + std::to_string(layer) + "."; }

std::string expert_prefix(const std::string& ffn, int expert) {
  return ffn + "experts." + std::to_string(expert) + ".";
}

// Of a product's name, that of its low-rank pair.
std::string low_rank_of(const std::string& product) { return product + "_low_rank"; }

std::string shape_text(std::pair<int, int> shape) {
  if (shape.second == 0) return "(" + std::to_string(shape.first) + ",)";
  return "(" + std::to_string(shape.first) + ", " + std::to_string(shape.second) + ")";
}

}  // namespace

Model::Model(DecoderConfig config) : config_(std::move(config)) {
  config_.validate();
  expected_["embedding.weight"] = {config_.vocab_size, config_.dim};
  if (config_.learned_positions) expected_["position.weight"] = {config_.max_context, config_.dim};
  expect_norm("final_norm");
  if (!config_.tied) expected_["head.weight"] = {config_.vocab_size, config_.dim};
  for (size_t i = 0; i < config_.layers.size(); ++i) expect_layer(prefix_of(int(i)), config_.layers[i]);
}

void Model::expect(const std::string& part, int rows, int cols, bool bias) {
  expected_[part + ".weight"] = {rows, cols};
  if (bias) expected_[part + ".bias"] = {rows, 0};
}

void Model::expect_corrected(const std::string& part, int rows, int cols, bool bias, int rank) {
  expect(part, rows, cols, bias);
  if (rank == 0) return;
  expect(low_rank_of(part) + ".a", rank, cols, false);
  expect(low_rank_of(part) + ".b", rows, rank, false);
}

void Model::expect_norm(const std::string& part) { expect(part, config_.dim, 0, config_.norm_bias); }

void Model::expect_attention(const std::string& prefix, const AttentionSpec& a, int rank) {
  expect_corrected(prefix + "q", a.q_dim(), config_.dim, a.qkv_bias, rank);
  expect_corrected(prefix + "k", a.kv_dim(), config_.dim, a.qkv_bias, rank);
  expect_corrected(prefix + "v", a.kv_dim(), config_.dim, a.qkv_bias, rank);
  expect_corrected(prefix + "o", config_.dim, a.q_dim(), a.o_bias, rank);
  if (!a.qk_norm) return;
  expect(prefix + "q_norm", a.head_dim, 0, false);
  expect(prefix + "k_norm", a.head_dim, 0, false);
}

void Model::expect_ffn(const std::string& prefix, const FfnSpec& f, int rank) {
  if (f.gated) expect_corrected(prefix + "gate", f.hidden, config_.dim, f.bias, rank);
  expect_corrected(prefix + "up", f.hidden, config_.dim, f.bias, rank);
  expect_corrected(prefix + "down", config_.dim, f.hidden, f.bias || f.down_bias, rank);
}

void Model::expect_experts(const std::string& prefix, const ExpertsSpec& e, int rank) {
  expect(prefix + "router", e.router_rows(), config_.dim, false);
  if (e.shared_hidden) expect_ffn(prefix + "shared.", e.shared(), rank);
  for (int i = 0; i < e.count; ++i) expect_ffn(expert_prefix(prefix, i), e.one(), rank);
  if (e.down_bias) expected_[prefix + "down.bias"] = {config_.dim, 0};
}

void Model::expect_layer(const std::string& prefix, const LayerConfig& layer) {
  if (layer.attention) {
    expect_norm(prefix + "attention_norm");
    if (layer.post_norms) expect_norm(prefix + "attention_post_norm");
    expect_attention(prefix + "attention.", *layer.attention, layer.low_rank);
  }
  if (!layer.ffn && !layer.experts) return;
  expect_norm(prefix + "ffn_norm");
  if (layer.post_norms) expect_norm(prefix + "ffn_post_norm");
  if (layer.ffn) expect_ffn(prefix + "ffn.", *layer.ffn, layer.low_rank);
  if (layer.experts) expect_experts(prefix + "ffn.", *layer.experts, layer.low_rank);
}

void Model::add_matrix(const std::string& name, Matrix matrix) {
  const auto found = expected_.find(name);
  if (finalized_) throw EngineFault("Tensor '" + name + "': the model is finalized.");
  if (found == expected_.end() || found->second.second == 0)
    throw EngineFault("The config has no matrix named '" + name + "'.");
  const std::pair<int, int> shape{matrix.rows(), matrix.cols()};
  if (shape != found->second)
    throw EngineFault("Tensor '" + name + "' has shape " + shape_text(shape) + "; the config says " +
                      shape_text(found->second) + ".");
  if (!matrices_.emplace(name, std::move(matrix)).second) throw EngineFault("Tensor '" + name + "' was given twice.");
}

void Model::add_vector(const std::string& name, const float* values, std::size_t count) {
  const auto found = expected_.find(name);
  if (finalized_) throw EngineFault("Tensor '" + name + "': the model is finalized.");
  if (found == expected_.end() || found->second.second != 0)
    throw EngineFault("The config has no vector named '" + name + "'.");
  if (count != size_t(found->second.first))
    throw EngineFault("Tensor '" + name + "' has " + std::to_string(count) + " values; the config says " +
                      shape_text(found->second) + ".");
  AlignedBuffer buffer(count * sizeof(float));
  std::memcpy(buffer.data(), values, count * sizeof(float));
  if (!vectors_.emplace(name, std::move(buffer)).second) throw EngineFault("Tensor '" + name + "' was given twice.");
}

const Matrix& Model::matrix(const std::string& name) const {
  const auto found = matrices_.find(name);
  if (found == matrices_.end()) throw EngineFault("The model has no matrix named '" + name + "'.");
  return found->second;
}

const float* Model::vector(const std::string& name) const { return vectors_.at(name).as<float>(); }

Linear Model::linear(const std::string& prefix, bool bias) const {
  const auto pair = low_ranks_.find(prefix);
  return {&matrices_.at(prefix + ".weight"), bias ? vector(prefix + ".bias") : nullptr,
          pair == low_ranks_.end() ? nullptr : &pair->second};
}

Norm Model::norm(const std::string& prefix) const {
  return {vector(prefix + ".weight"), config_.norm_bias ? vector(prefix + ".bias") : nullptr};
}

AttentionWeights Model::attention(const std::string& prefix, const AttentionSpec& a) const {
  return {linear(prefix + "q", a.qkv_bias),
          linear(prefix + "k", a.qkv_bias),
          linear(prefix + "v", a.qkv_bias),
          linear(prefix + "o", a.o_bias),
          a.qk_norm ? vector(prefix + "q_norm.weight") : nullptr,
          a.qk_norm ? vector(prefix + "k_norm.weight") : nullptr};
}

FfnWeights Model::ffn(const std::string& prefix, const FfnSpec& f) const {
  return {f.gated ? linear(prefix + "gate", f.bias) : Linear{}, linear(prefix + "up", f.bias),
          linear(prefix + "down", f.bias || f.down_bias)};
}

ExpertsWeights Model::experts(const std::string& prefix, const ExpertsSpec& e) const {
  ExpertsWeights w;
  w.router = linear(prefix + "router", false);
  if (e.shared_hidden) w.shared = ffn(prefix + "shared.", e.shared());
  for (int i = 0; i < e.count; ++i) w.experts.push_back(ffn(expert_prefix(prefix, i), e.one()));
  if (e.down_bias) w.bias = vector(prefix + "down.bias");
  return w;
}

LayerWeights Model::layer(const std::string& prefix, const LayerConfig& layer) const {
  LayerWeights w;
  if (layer.attention) {
    w.attention_norm = norm(prefix + "attention_norm");
    if (layer.post_norms) w.attention_post_norm = norm(prefix + "attention_post_norm");
    w.attention = attention(prefix + "attention.", *layer.attention);
  }
  if (!layer.ffn && !layer.experts) return w;
  w.ffn_norm = norm(prefix + "ffn_norm");
  if (layer.post_norms) w.ffn_post_norm = norm(prefix + "ffn_post_norm");
  if (layer.ffn) w.ffn = ffn(prefix + "ffn.", *layer.ffn);
  if (layer.experts) w.experts = experts(prefix + "ffn.", *layer.experts);
  return w;
}

void Model::finalize() {
  for (const auto& [name, shape] : expected_)
    if (!matrices_.contains(name) && !vectors_.contains(name))
      throw EngineFault("Tensor '" + name + "' of shape " + shape_text(shape) + " is missing.");
  const std::string inner = low_rank_of("") + ".a.weight";
  for (const auto& [name, shape] : expected_) {
    if (!name.ends_with(inner)) continue;
    const std::string product = name.substr(0, name.size() - inner.size());
    low_ranks_[product] = {linear(low_rank_of(product) + ".a", false), linear(low_rank_of(product) + ".b", false)};
  }
  layers_.clear();
  for (size_t i = 0; i < config_.layers.size(); ++i) layers_.push_back(layer(prefix_of(int(i)), config_.layers[i]));
  embedding_ = &matrices_.at("embedding.weight");
  if (config_.learned_positions) positions_ = &matrices_.at("position.weight");
  final_norm_ = norm("final_norm");
  head_ = linear(config_.tied ? "embedding" : "head", false);
  arena_.filled();
  finalized_ = true;
}

std::uint64_t Model::fingerprint() const {
  Fingerprint all;
  for (const auto& [name, shape] : expected_) {
    all.text(name);
    all.number(shape.first);
    all.number(shape.second);
  }
  all.number(config_.norm_eps);
  all.number(config_.embedding_scale);
  for (const LayerConfig& layer : config_.layers) {
    if (!layer.attention) continue;
    const AttentionSpec& a = *layer.attention;
    for (const float n : {float(a.heads), float(a.head_dim), float(a.window), a.scale}) all.number(n);
    if (!a.rope) continue;
    all.number(a.rope->attention_factor);
    all.add(a.rope->inverse_frequencies.data(), a.rope->inverse_frequencies.size() * sizeof(float));
  }
  for (const auto& [name, matrix] : matrices_) {
    all.number(int(matrix.layout()) * 256 + matrix.grid().bits);
    all.number(int(matrix.activation()));
    for (const Bytes& part : matrix.parts()) all.add(part.data, part.size);
  }
  for (const auto& [name, values] : vectors_) all.add(values.data(), values.bytes());
  return all.value();
}

std::size_t Model::weights_bytes() const {
  std::size_t total = 0;
  for (const auto& [name, matrix] : matrices_) total += matrix.bytes();
  for (const auto& [name, buffer] : vectors_) total += buffer.bytes();
  return total;
}

}  // namespace trilemma
