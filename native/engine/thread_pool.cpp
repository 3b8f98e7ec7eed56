#include "thread_pool.h"

#include <chrono>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace trilemma {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kSpin = std::chrono::microseconds(100);

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Never destroyed: workers may outlive static destructors.
std::atomic<ThreadPool*> the_pool{nullptr};

void forget_pool() { the_pool.store(nullptr); }

}  // namespace

ThreadPool& ThreadPool::instance() {
  ThreadPool* pool = the_pool.load(std::memory_order_acquire);
  if (pool) return *pool;
#if defined(__unix__) || defined(__APPLE__)
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  (void)registered;
#endif
  auto* fresh = new ThreadPool;
  if (the_pool.compare_exchange_strong(pool, fresh)) return *fresh;
  delete fresh;
  return *pool;
}

void ThreadPool::grow(int workers) {
  for (; started_ < workers; ++started_) {
    try {
      std::thread(&ThreadPool::work, this, started_).detach();
    } catch (const std::system_error&) {
      return;  // fewer threads only cost time
    }
  }
}

void ThreadPool::run_erased(int threads, int items, Call call, const void* task) {
  if (!owner_.try_lock()) {
    for (int i = 0; i < items; ++i) call(task, i);
    return;
  }
  const std::lock_guard owned(owner_, std::adopt_lock);
  grow(threads - 1);
  job_ = {call, task, items, threads - 1};
  cursor_.store(0, std::memory_order_relaxed);
  epoch_.fetch_add(1);
  if (asleep_.load()) {
    {
      const std::lock_guard lock(sleep_);
    }
    wake_.notify_all();
  }
  take_items(job_);
  // A worker joins by raising joined_ and then looking at epoch_ again: after this store either it sees the job
  // closed, or we see it joined.
  epoch_.fetch_add(1);
  while (joined_.load() != 0) relax();
}

void ThreadPool::take_items(const Job& job) {
  for (int i; (i = cursor_.fetch_add(1, std::memory_order_relaxed)) < job.items;) job.call(job.task, i);
}

// Returns when an open job other than `seen` has been there: the caller must look again after joining.
void ThreadPool::wait_for_job(std::uint64_t seen) {
  const auto ready = [&] {
    const std::uint64_t now = epoch_.load();
    return now % 2 == 1 && now != seen;
  };
  for (auto until = Clock::now() + kSpin; Clock::now() < until;)
    for (int i = 0; i < 64; ++i) {
      if (ready()) return;
      relax();
    }
  std::unique_lock lock(sleep_);
  asleep_.fetch_add(1);
  wake_.wait(lock, ready);
  asleep_.fetch_sub(1);
}

void ThreadPool::work(int index) {
  for (std::uint64_t seen = 0;;) {
    wait_for_job(seen);
    joined_.fetch_add(1);
    const std::uint64_t now = epoch_.load();
    if (now % 2 == 1 && now != seen) {
      seen = now;
      if (index < job_.workers) take_items(job_);
    }
    joined_.fetch_sub(1);
  }
}

}  // namespace trilemma
