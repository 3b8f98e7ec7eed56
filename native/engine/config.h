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

  int q_dim() const { return heads * head_dim; }
  int kv_dim() const { return kv_heads * head_dim; }
};

struct FfnSpec {
  int hidden = 0;
  Nonlinearity activation = kSilu;
  bool gated = true, bias = false;
};

struct LayerConfig {
  std::optional<AttentionSpec> attention;
  std::optional<FfnSpec> ffn;
};

struct DecoderConfig {
  int dim = 0, vocab_size = 0, max_context = 0;
  float norm_eps = 1e-5f;
  bool tied = false;
  std::vector<LayerConfig> layers;

  // Throws EngineFault naming the layer and the field that the engine can not run.
  void validate() const;
};

}  // namespace trilemma
