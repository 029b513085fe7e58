// Several threads of XLA's own pool work through the numbered pieces of one call, phase by phase.
//
// The caller works too, and never waits for a helper that has not begun: a call made from a pool
// thread while all others are busy finishes alone. Which thread takes which piece changes nothing,
// since what a piece computes depends on its number only.
//
// A decode step makes many calls of a few hundred microseconds, and waking a thread costs up to a
// tenth of one. So a helper whose work is over looks out for the next call for a moment, and only
// then goes back to XLA.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace popjax {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waiting for another thread: on the spot at first, then by letting others have the core, since the
// one waited for may need it.
class Wait {
 public:
  void once() {
    constexpr int kPauses = 2000;
    if (++pauses_ < kPauses) return pause();
    std::this_thread::yield();
  }

 private:
  int pauses_ = 0;
};

class Team {
 public:
  Team(xla::ffi::ThreadPool& pool, int64_t most_pieces) : work_(std::make_shared<Work>()) {
    const int64_t helpers = std::min<int64_t>(pool.num_threads(), most_pieces) - 1;
    if (helpers <= 0) return;
    const int64_t missing = Lobby::get().announce(work_, helpers);
    for (int64_t i = 0; i < missing; ++i) {
      pool.Schedule([caller = std::this_thread::get_id()] { Lobby::get().serve(caller); });
    }
  }

  ~Team() { work_->ticket.store(kClosed, std::memory_order_release); }

  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // Runs piece(0) .. piece(count - 1), each once, and returns when all are done.
  void run(int64_t count, std::function<void(int64_t)> piece) {
    if (count <= 0) return;
    // What the caller has in its cache need not travel to a helper.
    if (count == 1) return piece(0);
    const uint64_t phase = ++phase_;
    Phase& slot = work_->phases[phase % kSlots];
    slot.piece = std::move(piece);
    slot.count = count;
    slot.done.store(0, std::memory_order_relaxed);
    work_->ticket.store(phase << 32, std::memory_order_release);
    while (take(*work_)) {
    }
    Wait wait;
    while (slot.done.load(std::memory_order_acquire) < count) wait.once();
  }

 private:
  static constexpr uint64_t kClosed = ~uint64_t{0};
  static constexpr uint64_t kSlots = 2;

  struct Phase {
    std::function<void(int64_t)> piece;
    std::atomic<int64_t> count{0};
    std::atomic<int64_t> done{0};
  };

  // ticket = phase number << 32 | next piece. A piece is taken by exchanging the whole ticket, so
  // nobody takes one of a phase that is over; the caller leaves a phase when all taken are done.
  struct Work {
    std::atomic<uint64_t> ticket{0};
    std::array<Phase, kSlots> phases;
  };

  // Where helpers find the latest call. A call that another one overtakes goes without them.
  class Lobby {
   public:
    static Lobby& get() {
      static Lobby* lobby = new Lobby;  // never destroyed: threads may outlive main()
      return *lobby;
    }

    // Shows `work` to the helpers there are; returns how many of `wanted` are missing, which the
    // caller then schedules. So no more are ever queued, however busy the pool is.
    int64_t announce(std::shared_ptr<Work> work, int64_t wanted) {
      const std::lock_guard<std::mutex> lock(mutex_);
      latest_ = std::move(work);
      calls_.fetch_add(1, std::memory_order_release);
      const int64_t missing = std::max<int64_t>(wanted - present_, 0);
      present_ += missing;
      return missing;
    }

    // What a helper does: the latest work, then the next, until there is none for a moment. A full
    // pool runs it in the caller itself, which must not wait for its own work.
    void serve(std::thread::id caller) {
      uint64_t seen = 0;
      do {
        std::shared_ptr<Work> work;
        {
          const std::lock_guard<std::mutex> lock(mutex_);
          work = latest_;
          seen = calls_.load(std::memory_order_relaxed);
        }
        if (std::this_thread::get_id() != caller) help(*work);
      } while (std::this_thread::get_id() != caller && called_since(seen));
      leave();
    }

   private:
    void leave() {
      const std::lock_guard<std::mutex> lock(mutex_);
      --present_;
    }

    // Whether there is a call after `seen`, for which this waits a moment.
    bool called_since(uint64_t seen) {
      constexpr std::chrono::microseconds kPatience(200);
      constexpr int kPausesBetweenLooks = 32;
      const auto until = std::chrono::steady_clock::now() + kPatience;
      do {
        for (int i = 0; i < kPausesBetweenLooks; ++i) {
          if (calls_.load(std::memory_order_acquire) != seen) return true;
          pause();
        }
      } while (std::chrono::steady_clock::now() < until);
      return false;
    }

    std::mutex mutex_;
    std::shared_ptr<Work> latest_;
    int64_t present_ = 0;
    std::atomic<uint64_t> calls_{0};
  };

  static bool take(Work& work) {
    uint64_t ticket = work.ticket.load(std::memory_order_acquire);
    while (ticket != kClosed && (ticket >> 32) != 0) {
      Phase& slot = work.phases[(ticket >> 32) % kSlots];
      const int64_t next = static_cast<int64_t>(ticket & 0xffffffff);
      if (next >= slot.count.load(std::memory_order_relaxed)) return false;
      if (work.ticket.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) {
        slot.piece(next);
        slot.done.fetch_add(1, std::memory_order_release);
        return true;
      }
    }
    return false;
  }

  static void help(Work& work) {
    Wait wait;
    while (work.ticket.load(std::memory_order_acquire) != kClosed) {
      if (take(work)) {
        wait = Wait();
      } else {
        wait.once();
      }
    }
  }

  std::shared_ptr<Work> work_;
  uint64_t phase_ = 0;
};

}  // namespace popjax
