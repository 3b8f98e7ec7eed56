// The one pool of worker threads of the process.
//
// Work is a number of items behind an atomic cursor: whoever is awake takes the next one. The caller works too and
// waits only for items that a worker has taken, so a worker that is asleep or late never delays a small job.
// Workers spin for about 100 us after a job, then sleep; once called they spin again, for the job that called may be
// done before they are awake. After fork the child starts a pool of its own.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace trilemma {

// What a thread will read in the job after this one, as far as anybody knows: it brings that nearer while it waits.
class NextRead {
 public:
  NextRead() = default;
  // `bytes` of codes, and beside them their scales.
  NextRead(const std::byte* codes, std::size_t bytes, const std::byte* scales, std::size_t scale_bytes);
  // Asks memory for the next lines; false where none are left.
  bool fetch();

 private:
  const std::byte *codes_ = nullptr, *end_ = nullptr, *scales_ = nullptr;
  std::size_t scales_step_ = 0;
};
// Of the caller and the first workers; others do without.
using NextReads = std::array<NextRead, 8>;

class ThreadPool {
 public:
  // Floats of row-wise work below which one thread is faster.
  static constexpr double kSerialFloats = 8e3;
  // Rows that one thread takes at a time: a tile of quantized inputs, whose rows share cache lines.
  static constexpr int kRowBlock = 16;
  static constexpr int kMostThreads = 1024, kMostItems = (1 << 26) - kMostThreads;

  static ThreadPool& instance();

  // Calls task(item) for each item in [0, items), on the caller and at most threads - 1 workers. Does not throw.
  template <class Task>
  void run(int threads, int items, const Task& task, const NextReads* next = nullptr) {
    if (threads <= 1 || items <= 1) {
      for (int i = 0; i < items; ++i) task(i);
      return;
    }
    run_erased(threads, items, [](const void* t, int i) { (*static_cast<const Task*>(t))(i); }, &task, next);
  }

  // Calls task(row) for each row in [0, rows), of about `floats` of work each.
  template <class Task>
  void run_rows(int threads, int rows, double floats, const Task& task) {
    const int used = rows * floats < kSerialFloats ? 1 : threads;
    const int block = std::clamp((rows + used - 1) / used, 1, kRowBlock);
    run(used, (rows + block - 1) / block, [&](int item) {
      for (int row = item * block, end = std::min(rows, row + block); row < end; ++row) task(row);
    });
  }

 private:
  using Call = void (*)(const void*, int);
  // An open job in one word, so that taking an item tells all about it: how many workers may join, how many items
  // there are and which is next. Takers that come late overshoot `next`, each once a job.
  struct Ticket {
    std::uint64_t word;

    static Ticket of(int workers, int items, int next) {
      return {std::uint64_t(workers) << 52 | std::uint64_t(items) << 26 | std::uint64_t(next)};
    }
    int workers() const { return int(word >> 52); }
    int items() const { return int(word >> 26 & kField); }
    int next() const { return int(word & kField); }
    bool open() const { return next() < items(); }

   private:
    static constexpr std::uint64_t kField = (1 << 26) - 1;
  };

  void run_erased(int threads, int items, Call call, const void* task, const NextReads* next);
  void grow(int workers);
  void work(int index);
  void wait_for_job(int index);
  bool joinable(int index) const;
  int take_items(Ticket ticket);

  std::mutex owner_;  // one job at a time; a second caller works alone
  int started_ = 0;
  // What the caller writes to open a job, and workers watch. Stays as it is until all items are done.
  alignas(64) std::atomic<std::uint64_t> ticket_{0};
  Call call_ = nullptr;
  const void* task_ = nullptr;
  const NextReads* next_ = nullptr;
  alignas(64) std::atomic<int> done_{0};  // items that workers have finished
  alignas(64) std::atomic<int> asleep_{0};
  std::mutex sleep_;
  std::uint64_t calls_ = 0;  // how often sleepers were called, and how many of them last; guarded by sleep_
  int called_ = 0;
  std::condition_variable wake_;
};

}  // namespace trilemma
