// What a pass over the model will read next. One token after another runs the same jobs in the same order, so each job of a
// pass notes where the threads begin to read, and whoever waits for others in the next pass fetches what follows.
#pragma once

#include <vector>

#include "model.h"
#include "thread_pool.h"

namespace trilemma {

class Foresight {
 public:
  // The first job of a pass is next.
  void restart();

  // The job at hand, known by its first matrix; `reads()` tells where each thread begins in it and is asked once. What
  // follows it, by the pass before: null where none was, at least until the next call.
  template <class Reads>
  const NextReads* after(const Linear* first, const Reads& reads) {
    if (at_ == jobs_.size()) jobs_.emplace_back();
    Job& job = jobs_[at_++];
    if (job.first != first) job = {first, reads()};
    return at_ < jobs_.size() ? &jobs_[at_].reads : whole_ ? &jobs_[0].reads : nullptr;
  }

 private:
  struct Job {
    const Linear* first = nullptr;
    NextReads reads;
  };
  std::vector<Job> jobs_;
  std::size_t at_ = 0;
  bool whole_ = false;  // `jobs_` are those of a whole pass
};

// The beginning of what a thread reads from a panel of a matrix on: at most so many bytes.
NextRead first_read(const Matrix& matrix, int panel, int panels, std::size_t most);

}  // namespace trilemma
