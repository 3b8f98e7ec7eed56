// The whole loop from prompt to last token, without leaving C++ but for the callback.
#pragma once

#include <functional>
#include <vector>

#include "context.h"
#include "sampler.h"

namespace trilemma {

struct GenerateRequest {
  std::vector<std::int32_t> prompt;
  int max_tokens = 0;
  SamplerSettings sampler;
  std::vector<std::int32_t> stop_tokens;  // end the output and are not part of it
};

enum class FinishReason { kLength, kStop, kContext, kInterrupted };

struct GenerateResult {
  std::vector<std::int32_t> tokens;
  std::vector<double> times_s;  // since the request
  FinishReason reason = FinishReason::kLength;
  int shared = 0;  // tokens of the prompt whose keys and values were in the cache
};

// `on_token` returns false to stop. Uses one free sequence of the context.
// Throws EngineFault for a prompt that is empty or fills the context.
GenerateResult generate(Context& context, const GenerateRequest& request,
                        const std::function<bool(std::int32_t)>& on_token, const InterruptCheck& interrupted);

}  // namespace trilemma
