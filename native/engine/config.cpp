#include "config.h"

namespace trilemma {
namespace {

void require(bool ok, const std::string& what) {
  if (!ok) throw EngineFault("The config can not be run: " + what);
}

void validate_attention(const AttentionSpec& a, const std::string& where) {
  require(a.heads > 0 && a.kv_heads > 0 && a.heads % a.kv_heads == 0,
          where + "heads=" + std::to_string(a.heads) +
              " must be a positive multiple of kv_heads=" + std::to_string(a.kv_heads) + ".");
  require(a.head_dim > 0 && a.head_dim <= kMaxHeadDim,
          where + "head_dim=" + std::to_string(a.head_dim) + " must be in 1.." + std::to_string(kMaxHeadDim) + ".");
  require(a.window >= 0, where + "window must not be negative.");
  if (a.rope)
    require(!a.rope->inverse_frequencies.empty() && 2 * a.rope->inverse_frequencies.size() <= size_t(a.head_dim),
            where + "rope has " + std::to_string(a.rope->inverse_frequencies.size()) +
                " inverse frequencies; 1 to head_dim/2 are possible.");
}

void validate_experts(const ExpertsSpec& e, const std::string& where) {
  require(e.count > 0 && e.hidden > 0, where + "experts need a positive count and hidden width.");
  require(e.active > 0 && e.active <= e.count, where + "active=" + std::to_string(e.active) + " must be in 1.." +
                                                   std::to_string(e.count) + ", the number of experts.");
  require(e.shared_hidden >= 0, where + "shared_hidden must not be negative.");
}

}  // namespace

void DecoderConfig::validate() const {
  require(dim > 0, "dim must be positive.");
  require(vocab_size > 0, "vocab_size must be positive.");
  require(max_context > 0, "max_context must be positive.");
  for (size_t i = 0; i < layers.size(); ++i) {
    const std::string where = "layer " + std::to_string(i) + ": ";
    if (layers[i].attention) validate_attention(*layers[i].attention, where);
    if (layers[i].ffn) require(layers[i].ffn->hidden > 0, where + "ffn.hidden must be positive.");
    if (layers[i].experts) validate_experts(*layers[i].experts, where);
    require(layers[i].low_rank >= 0, where + "low_rank must not be negative.");
    require(!(layers[i].ffn && layers[i].experts), where + "a layer has a dense block or experts, not both.");
  }
}

}  // namespace trilemma
