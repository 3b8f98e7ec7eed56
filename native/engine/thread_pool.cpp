#include "thread_pool.h"

#include <algorithm>
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
// Turns of waiting for a worker's last item before the processor is offered to others, perhaps to that worker.
constexpr int kPatience = 2000;

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

// Bytes of codes asked for between two looks at what a thread waits for.
constexpr std::size_t kFetchStep = 512, kLineBytes = 64;

}  // namespace

NextRead::NextRead(const std::byte* codes, std::size_t bytes, const std::byte* scales, std::size_t scale_bytes)
    : codes_(codes), end_(codes + bytes / kFetchStep * kFetchStep), scales_(scales),
      scales_step_(bytes ? scale_bytes * kFetchStep / bytes : 0) {}

bool NextRead::fetch() {
  if (codes_ == end_) return false;
  for (std::size_t line = 0; line < kFetchStep; line += kLineBytes) __builtin_prefetch(codes_ + line, 0, 2);
  for (std::size_t line = 0; line < scales_step_; line += kLineBytes) __builtin_prefetch(scales_ + line, 0, 2);
  codes_ += kFetchStep;
  scales_ += scales_step_;
  return true;
}

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

void ThreadPool::run_erased(int threads, int items, Call call, const void* task, const NextReads* next) {
  if (items > kMostItems || !owner_.try_lock()) {
    for (int i = 0; i < items; ++i) call(task, i);
    return;
  }
  const std::lock_guard owned(owner_, std::adopt_lock);
  threads = std::min(threads, kMostThreads);
  grow(threads - 1);
  call_ = call;
  task_ = task;
  next_ = next;
  done_.store(0, std::memory_order_relaxed);
  // The first item is the caller's.
  ticket_.store(Ticket::of(threads - 1, items, 1).word, std::memory_order_release);
  // A worker that falls asleep at this very moment may be missed: then it does not help with this job.
  if (asleep_.load(std::memory_order_relaxed)) {
    {
      const std::lock_guard lock(sleep_);
      ++calls_;
      called_ = threads - 1;
    }
    wake_.notify_all();
  }
  call(task, 0);
  const int own = 1 + take_items({ticket_.load(std::memory_order_relaxed)});
  NextRead own_next = next ? (*next)[0] : NextRead{};
  for (int spins = 0; done_.load(std::memory_order_acquire) != items - own; ++spins)
    if (!own_next.fetch()) spins < kPatience ? relax() : std::this_thread::yield();
}

// Takes items as long as there are any, of this job or of one that opened meanwhile; returns how many.
int ThreadPool::take_items(Ticket ticket) {
  int taken = 0;
  while (ticket.open()) {
    ticket.word = ticket_.fetch_add(1, std::memory_order_acq_rel);
    if (!ticket.open()) break;
    call_(task_, ticket.next());
    ++taken;
    ticket.word = ticket_.load(std::memory_order_relaxed);
  }
  return taken;
}

bool ThreadPool::joinable(int index) const {
  const Ticket ticket{ticket_.load(std::memory_order_relaxed)};
  return index < ticket.workers() && ticket.open();
}

void ThreadPool::wait_for_job(int index) {
  for (auto until = Clock::now() + kSpin; Clock::now() < until;)
    for (int i = 0; i < 64; ++i) {
      if (joinable(index)) return;
      relax();
    }
  std::unique_lock lock(sleep_);
  asleep_.fetch_add(1);
  const std::uint64_t before = calls_;
  wake_.wait(lock, [&] { return calls_ != before && index < called_; });
  asleep_.fetch_sub(1);
}

void ThreadPool::work(int index) {
  for (;;) {
    wait_for_job(index);
    const int taken = take_items({ticket_.load(std::memory_order_relaxed)});
    if (!taken) continue;
    // Once its items count as done, the next job may be opened.
    NextRead next = next_ && std::size_t(index) + 1 < next_->size() ? (*next_)[std::size_t(index) + 1] : NextRead{};
    done_.fetch_add(taken, std::memory_order_release);
    while (!joinable(index) && next.fetch());
  }
}

}  // namespace trilemma
