// Threads that compute one step together. Between the phases of a step they wait actively: a step has some three
// hundred phases of a few microseconds, and waking a thread takes longer than that.
#pragma once

#include <immintrin.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace athanor {

class Team {
 public:
  explicit Team(int threads) : threads_(threads < 1 ? 1 : threads) {
    for (int index = 1; index < threads_; ++index) {
      workers_.emplace_back([this, index] { work(index); });
    }
  }

  ~Team() {
    stop_.store(true, std::memory_order_relaxed);
    begin_.fetch_add(1, std::memory_order_release);
    begin_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int threads() const { return threads_; }

  // Calls `body` with the index of each thread and returns when all are done.
  void run(const std::function<void(int)>& body) {
    body_ = &body;
    next_.store(0, std::memory_order_relaxed);
    begin_.fetch_add(1, std::memory_order_release);
    begin_.notify_all();
    body(0);
    barrier();
  }

  // Waits until all threads are here. The last one resets the counter of `take`.
  void barrier() {
    if (threads_ == 1) {
      next_.store(0, std::memory_order_relaxed);
      return;
    }
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      round_.notify_all();
      return;
    }
    wait(round_, round);
  }

  // The next piece of the work of this phase, by number; each number is given to one thread.
  int64_t take() { return next_.fetch_add(1, std::memory_order_relaxed); }

 private:
  // Waits for another value than `old`: actively, then by giving the core to whoever wants it, then asleep. With fewer free cores than
  // threads the one that is waited for gets the core sooner, and waiting does not use up a container's CPU limit.
  static void wait(const std::atomic<uint32_t>& value, uint32_t old) {
    for (int turn = 0; value.load(std::memory_order_acquire) == old; ++turn) {
      if (turn < 2000) {
        _mm_pause();
      } else if (turn < 2032) {
        sched_yield();
      } else {
        value.wait(old, std::memory_order_acquire);
      }
    }
  }

  void work(int index) {
    uint32_t seen = 0;
    for (;;) {
      // Steps follow each other closely while answers are in progress; without any the thread sleeps.
      int turn = 0;
      while (begin_.load(std::memory_order_acquire) == seen && turn < 4000) {
        _mm_pause();
        ++turn;
      }
      begin_.wait(seen, std::memory_order_acquire);
      seen = begin_.load(std::memory_order_acquire);
      if (stop_.load(std::memory_order_relaxed)) return;
      (*body_)(index);
      barrier();
    }
  }

  const int threads_;
  std::vector<std::thread> workers_;
  const std::function<void(int)>* body_ = nullptr;
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<uint32_t> begin_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int64_t> next_{0};
};

}  // namespace athanor
