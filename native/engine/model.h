// The immutable model: a config and its tensors, shared by any number of contexts.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "config.h"
#include "matrix.h"

namespace trilemma {

struct Linear {
  const Matrix* weight = nullptr;
  const float* bias = nullptr;
};

struct Norm {
  const float* weight = nullptr;
  const float* bias = nullptr;
};

struct AttentionWeights {
  Linear q, k, v, o;
  const float *q_norm = nullptr, *k_norm = nullptr;
};

struct FfnWeights {
  Linear gate, up, down;
};

struct ExpertsWeights {
  Linear router;
  FfnWeights shared;
  std::vector<FfnWeights> experts;
  const float* bias = nullptr;
};

struct LayerWeights {
  Norm attention_norm, attention_post_norm, ffn_norm, ffn_post_norm;
  AttentionWeights attention;
  FfnWeights ffn;
  ExpertsWeights experts;
};

class Model {
 public:
  explicit Model(DecoderConfig config);
  Model(const Model&) = delete;

  Arena& arena() { return arena_; }
  // Filled tensor by tensor, by canonical name; an unknown name, a wrong shape or a second copy throws EngineFault.
  void add_matrix(const std::string& name, Matrix matrix);
  void add_vector(const std::string& name, const float* values, std::size_t count);
  // Throws EngineFault naming the first tensor that is missing. Contexts need a finalized model.
  void finalize();

  const DecoderConfig& config() const { return config_; }
  // (rows, cols) of every tensor of the config by name; cols 0: a vector.
  const std::map<std::string, std::pair<int, int>>& expected() const { return expected_; }
  const std::vector<LayerWeights>& layers() const { return layers_; }
  const Matrix& embedding() const { return *embedding_; }
  // Any matrix by canonical name; throws EngineFault when there is none.
  const Matrix& matrix(const std::string& name) const;
  // Null without learned positions.
  const Matrix* positions() const { return positions_; }
  const Norm& final_norm() const { return final_norm_; }
  const Linear& head() const { return head_; }
  bool finalized() const { return finalized_; }
  std::size_t weights_bytes() const;
  // Of config and weights; reads all of them.
  std::uint64_t fingerprint() const;

 private:
  void expect(const std::string& part, int rows, int cols, bool bias);
  void expect_norm(const std::string& part);
  void expect_attention(const std::string& prefix, const AttentionSpec& a);
  void expect_ffn(const std::string& prefix, const FfnSpec& f);
  void expect_experts(const std::string& prefix, const ExpertsSpec& e);
  void expect_layer(const std::string& prefix, const LayerConfig& layer);

  const float* vector(const std::string& name) const;
  Norm norm(const std::string& prefix) const;
  Linear linear(const std::string& prefix, bool bias) const;
  AttentionWeights attention(const std::string& prefix, const AttentionSpec& a) const;
  FfnWeights ffn(const std::string& prefix, const FfnSpec& f) const;
  ExpertsWeights experts(const std::string& prefix, const ExpertsSpec& e) const;
  LayerWeights layer(const std::string& prefix, const LayerConfig& layer) const;

  DecoderConfig config_;
  Arena arena_;
  std::map<std::string, std::pair<int, int>> expected_;
  std::map<std::string, Matrix> matrices_;
  std::map<std::string, AlignedBuffer> vectors_;
  std::vector<LayerWeights> layers_;
  const Matrix* embedding_ = nullptr;
  const Matrix* positions_ = nullptr;
  Norm final_norm_;
  Linear head_;
  bool finalized_ = false;
};

}  // namespace trilemma
