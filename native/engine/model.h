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

struct AttentionWeights {
  const float* norm = nullptr;
  Linear q, k, v, o;
};

struct FfnWeights {
  const float* norm = nullptr;
  Linear gate, up, down;
};

struct LayerWeights {
  AttentionWeights attention;
  FfnWeights ffn;
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
  const std::vector<LayerWeights>& layers() const { return layers_; }
  const Matrix& embedding() const { return *embedding_; }
  const float* final_norm() const { return final_norm_; }
  const Linear& head() const { return head_; }
  bool finalized() const { return finalized_; }
  std::size_t weights_bytes() const;

 private:
  const float* vector(const std::string& name) const;
  Linear linear(const std::string& prefix, bool bias) const;
  void expect_layer(int index, const LayerConfig& layer);

  DecoderConfig config_;
  Arena arena_;
  std::map<std::string, std::pair<int, int>> expected_;  // (rows, cols); cols 0: a vector
  std::map<std::string, Matrix> matrices_;
  std::map<std::string, AlignedBuffer> vectors_;
  std::vector<LayerWeights> layers_;
  const Matrix* embedding_ = nullptr;
  const float* final_norm_ = nullptr;
  Linear head_;
  bool finalized_ = false;
};

}  // namespace trilemma
