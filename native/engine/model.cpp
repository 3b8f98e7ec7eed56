#include "model.h"

#include <cstring>

namespace trilemma {
namespace {

std::string prefix_of(int layer) { return "layers." + std::to_string(layer) + "."; }

std::string shape_text(std::pair<int, int> shape) {
  if (shape.second == 0) return "(" + std::to_string(shape.first) + ",)";
  return "(" + std::to_string(shape.first) + ", " + std::to_string(shape.second) + ")";
}

}  // namespace

Model::Model(DecoderConfig config) : config_(std::move(config)) {
  config_.validate();
  expected_["embedding.weight"] = {config_.vocab_size, config_.dim};
  expected_["final_norm.weight"] = {config_.dim, 0};
  if (!config_.tied) expected_["head.weight"] = {config_.vocab_size, config_.dim};
  for (size_t i = 0; i < config_.layers.size(); ++i) expect_layer(int(i), config_.layers[i]);
}

void Model::expect_layer(int index, const LayerConfig& layer) {
  const std::string prefix = prefix_of(index);
  const auto expect = [&](const std::string& part, int rows, int cols, bool bias) {
    expected_[prefix + part + ".weight"] = {rows, cols};
    if (bias) expected_[prefix + part + ".bias"] = {rows, 0};
  };
  if (layer.attention) {
    const AttentionSpec& a = *layer.attention;
    expect("attention_norm", config_.dim, 0, false);
    expect("attention.q", a.q_dim(), config_.dim, a.qkv_bias);
    expect("attention.k", a.kv_dim(), config_.dim, a.qkv_bias);
    expect("attention.v", a.kv_dim(), config_.dim, a.qkv_bias);
    expect("attention.o", config_.dim, a.q_dim(), a.o_bias);
  }
  if (layer.ffn) {
    const FfnSpec& f = *layer.ffn;
    expect("ffn_norm", config_.dim, 0, false);
    if (f.gated) expect("ffn.gate", f.hidden, config_.dim, f.bias);
    expect("ffn.up", f.hidden, config_.dim, f.bias);
    expect("ffn.down", config_.dim, f.hidden, f.bias);
  }
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

const float* Model::vector(const std::string& name) const { return vectors_.at(name).as<float>(); }

Linear Model::linear(const std::string& prefix, bool bias) const {
  return {&matrices_.at(prefix + ".weight"), bias ? vector(prefix + ".bias") : nullptr};
}

void Model::finalize() {
  for (const auto& [name, shape] : expected_)
    if (!matrices_.contains(name) && !vectors_.contains(name))
      throw EngineFault("Tensor '" + name + "' of shape " + shape_text(shape) + " is missing.");
  layers_.clear();
  for (size_t i = 0; i < config_.layers.size(); ++i) {
    const std::string prefix = prefix_of(int(i));
    LayerWeights w;
    if (const auto& a = config_.layers[i].attention)
      w.attention = {vector(prefix + "attention_norm.weight"), linear(prefix + "attention.q", a->qkv_bias),
                     linear(prefix + "attention.k", a->qkv_bias), linear(prefix + "attention.v", a->qkv_bias),
                     linear(prefix + "attention.o", a->o_bias)};
    if (const auto& f = config_.layers[i].ffn)
      w.ffn = {vector(prefix + "ffn_norm.weight"), f->gated ? linear(prefix + "ffn.gate", f->bias) : Linear{},
               linear(prefix + "ffn.up", f->bias), linear(prefix + "ffn.down", f->bias)};
    layers_.push_back(w);
  }
  embedding_ = &matrices_.at("embedding.weight");
  final_norm_ = vector("final_norm.weight");
  head_ = linear(config_.tied ? "embedding" : "head", false);
  finalized_ = true;
}

std::size_t Model::weights_bytes() const {
  std::size_t total = 0;
  for (const auto& [name, matrix] : matrices_) total += matrix.bytes();
  for (const auto& [name, buffer] : vectors_) total += buffer.bytes();
  return total;
}

}  // namespace trilemma
