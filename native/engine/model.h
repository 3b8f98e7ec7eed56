// The immutable model: a config and its tensors, shared by any number of contexts.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "config.h"
#include "matrix.h"

namespace trilemma {

struct LowRank;

struct Linear {
  const Matrix* weight = nullptr;
  const float* bias = nullptr;
  const LowRank* low_rank = nullptr;
};

// What is added to a product W x: b (a x), with a (rank, in) and b (out, rank).
struct LowRank {
  Linear a, b;

  int rank() const { return a.weight->rows(); }
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

  // visit(linear) for every product; those that the layer has not have no weight.
  template <class Visit>
  void each_linear(const Visit& visit) const {
    const auto block = [&](const FfnWeights& w) {
      for (const Linear* l : {&w.gate, &w.up, &w.down}) visit(*l);
    };
    for (const Linear* l : {&attention.q, &attention.k, &attention.v, &attention.o, &experts.router}) visit(*l);
    block(ffn);
    block(experts.shared);
    for (const FfnWeights& expert : experts.experts) block(expert);
  }
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
  // What of the weights still lies on small pages and may be moved.
  const LaterHugePages& huge_pages() const { return arena_.huge_pages(); }
  // Of config and weights; reads all of them.
  std::uint64_t fingerprint() const;

 private:
  void expect(const std::string& part, int rows, int cols, bool bias);
  // A matrix, and beside it a pair of that rank.
  void expect_corrected(const std::string& part, int rows, int cols, bool bias, int rank);
  void expect_norm(const std::string& part);
  void expect_attention(const std::string& prefix, const AttentionSpec& a, int rank);
  void expect_ffn(const std::string& prefix, const FfnSpec& f, int rank);
  void expect_experts(const std::string& prefix, const ExpertsSpec& e, int rank);
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
  std::map<std::string, LowRank> low_ranks_;  // by the name of their product
  std::vector<LayerWeights> layers_;
  const Matrix* embedding_ = nullptr;
  const Matrix* positions_ = nullptr;
  Norm final_norm_;
  Linear head_;
  bool finalized_ = false;
};

}  // namespace trilemma
