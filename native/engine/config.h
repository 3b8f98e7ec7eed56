// A decoder described by data: the C++ side of trilemma.model.config.DecoderConfig.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels/table.h"

namespace trilemma {

// What the caller gave can not be used; the message names the value, what was expected and the fix.
struct EngineFault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct RopeSpec {
  std::vector<float> inverse_frequencies;
  float attention_factor = 1.0f;
  bool operator==(const RopeSpec&) const = default;
};

struct AttentionSpec {
  int heads = 0, kv_heads = 0, head_dim = 0;
  std::optional<RopeSpec> rope;
  float scale = 1.0f;
  int window = 0;  // 0: unlimited
  bool qkv_bias = false, o_bias = false;
  bool qk_norm = false;  // RMS norm of each head of q and k before the rotation

  int q_dim() const { return heads * head_dim; }
  int kv_dim() const { return kv_heads * head_dim; }
};

struct FfnSpec {
  int hidden = 0;
  Nonlinearity activation = kSilu;
  bool gated = true, bias = false;
  bool down_bias = false;  // a bias of the last matrix alone
};

enum class RouterKind { kLinear, kGlu };
enum class GateKind { kNormalized, kSoftmax, kOne };

struct ExpertsSpec {
  int count = 0, active = 0, hidden = 0;
  Nonlinearity activation = kSilu;
  RouterKind router = RouterKind::kLinear;
  GateKind gates = GateKind::kNormalized;
  int shared_hidden = 0;   // 0: no shared block
  bool down_bias = false;  // added once a token

  int router_rows() const { return router == RouterKind::kGlu ? 2 * count : count; }
  FfnSpec shared() const { return {shared_hidden, activation}; }
  FfnSpec one() const { return {hidden, activation}; }
};

struct LayerConfig {
  std::optional<AttentionSpec> attention;
  std::optional<FfnSpec> ffn;  // at most one of ffn and experts
  std::optional<ExpertsSpec> experts;
  bool parallel = false;    // both parts read the layer's input
  bool post_norms = false;  // a part's output is normed before it is added
  int low_rank = 0;         // of the pair beside each matrix but a router; 0: none
};

enum class NormKind { kRms, kLayer };

struct DecoderConfig {
  int dim = 0, vocab_size = 0, max_context = 0;
  float norm_eps = 1e-5f;
  bool tied = false;
  NormKind norm = NormKind::kRms;
  bool norm_bias = false;
  float embedding_scale = 1.0f;
  bool learned_positions = false;
  std::vector<LayerConfig> layers;

  // Throws EngineFault naming the layer and the field that the engine can not run.
  void validate() const;
};

}  // namespace trilemma
