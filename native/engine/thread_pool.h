// The one pool of worker threads of the process.
//
// Work is a number of items behind an atomic cursor: whoever is awake takes the next one. The caller works too and
// waits only for workers that have joined, so a worker that is asleep or preempted never delays a small job.
// Workers spin for about 100 us after a job, then sleep. After fork the child starts a pool of its own.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace trilemma {

class ThreadPool {
 public:
  // Floats of row-wise work below which one thread is faster.
  static constexpr double kSerialFloats = 8e3;

  static ThreadPool& instance();

  // Calls task(item) for each item in [0, items), on the caller and at most threads - 1 workers. Does not throw.
  template <class Task>
  void run(int threads, int items, const Task& task) {
    if (threads <= 1 || items <= 1) {
      for (int i = 0; i < items; ++i) task(i);
      return;
    }
    run_erased(threads, items, [](const void* t, int i) { (*static_cast<const Task*>(t))(i); }, &task);
  }

 private:
  using Call = void (*)(const void*, int);
  struct Job {
    Call call = nullptr;
    const void* task = nullptr;
    int items = 0, workers = 0;
  };

  void run_erased(int threads, int items, Call call, const void* task);
  void grow(int workers);
  void work(int index);
  void wait_for_job(std::uint64_t seen);
  void take_items(const Job& job);

  std::mutex owner_;  // one job at a time; a second caller works alone
  Job job_;
  std::atomic<std::uint64_t> epoch_{0};  // odd: a job is open
  std::atomic<int> cursor_{0};
  std::atomic<int> joined_{0};  // workers that may be reading job_
  std::atomic<int> asleep_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
  int started_ = 0;
};

}  // namespace trilemma
