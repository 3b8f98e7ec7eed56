#include "generate.h"

#include <algorithm>
#include <chrono>
#include <tuple>

namespace trilemma {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Holds a sequence and gives it back whatever happens.
class OwnedSequence {
 public:
  OwnedSequence(KvPool& pool, std::span<const std::int32_t> tokens) : pool_(pool) {
    std::tie(id_, shared_) = pool.create(tokens);
  }
  ~OwnedSequence() { pool_.release(id_); }
  OwnedSequence(const OwnedSequence&) = delete;
  int id() const { return id_; }
  int shared() const { return shared_; }  // tokens that it began with

 private:
  KvPool& pool_;
  int id_ = 0, shared_ = 0;
};

}  // namespace

GenerateResult generate(Context& context, const GenerateRequest& request,
                        const std::function<bool(std::int32_t)>& on_token, const InterruptCheck& interrupted) {
  const auto begun = Clock::now();
  const int room = context.max_context();
  if (request.prompt.empty()) throw EngineFault("The prompt has no tokens. Give at least one.");
  if (int(request.prompt.size()) >= room)
    throw EngineFault("The prompt's " + std::to_string(request.prompt.size()) + " tokens fill the context of " +
                      std::to_string(room) + "; shorten it.");
  GenerateResult result;
  if (request.max_tokens <= 0) return result;
  const OwnedSequence sequence(context.sequences(), request.prompt);
  result.shared = sequence.shared();
  Sampler sampler(request.sampler, context.model().config().vocab_size, context.threads());
  std::vector<float> logits(size_t(context.model().config().vocab_size));
  for (int i = 0; i < result.shared; ++i) sampler.saw(request.prompt[size_t(i)]);
  std::vector<std::int32_t> fed(request.prompt.begin() + result.shared, request.prompt.end());
  result.tokens.reserve(size_t(std::min(request.max_tokens, room)));
  result.times_s.reserve(result.tokens.capacity());
  for (int length = int(request.prompt.size());;) {
    const Slice slice{sequence.id(), fed, LogitsMode::kLast};
    context.forward({&slice, 1}, logits.data(), interrupted);
    for (const std::int32_t token : fed) sampler.saw(token);
    const std::int32_t token = sampler.choose(logits, std::uint64_t(length));
    const auto& stops = request.stop_tokens;
    result.reason = FinishReason::kStop;
    if (std::find(stops.begin(), stops.end(), token) != stops.end()) return result;
    result.tokens.push_back(token);
    result.times_s.push_back(seconds_since(begun));
    ++length;
    result.reason = FinishReason::kInterrupted;
    if (on_token && !on_token(token)) return result;
    result.reason = FinishReason::kLength;
    if (int(result.tokens.size()) >= request.max_tokens) return result;
    result.reason = FinishReason::kContext;
    if (length >= room) return result;
    fed.assign(1, token);
  }
}

}  // namespace trilemma
