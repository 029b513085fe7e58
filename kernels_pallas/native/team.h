// Several threads of XLA's own pool work through the numbered pieces of one call, phase by phase.
//
// The caller works too, and never waits for a helper that has not begun: a call made from a pool
// thread while all others are busy finishes alone. Which thread takes which piece changes nothing,
// since what a piece computes depends on its number only.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
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

class Team {
 public:
  Team(xla::ffi::ThreadPool& pool, int64_t most_pieces) : work_(std::make_shared<Work>()) {
    const int64_t helpers = std::min<int64_t>(pool.num_threads(), most_pieces) - 1;
    for (int64_t i = 0; i < helpers; ++i) {
      pool.Schedule([work = work_] { help(*work); });
    }
  }

  ~Team() { work_->ticket.store(kClosed, std::memory_order_release); }

  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // Runs piece(0) .. piece(count - 1), each once, and returns when all are done.
  void run(int64_t count, std::function<void(int64_t)> piece) {
    if (count <= 0) return;
    const uint64_t phase = ++phase_;
    Phase& slot = work_->phases[phase % kSlots];
    slot.piece = std::move(piece);
    slot.count = count;
    slot.done.store(0, std::memory_order_relaxed);
    work_->ticket.store(phase << 32, std::memory_order_release);
    while (take(*work_)) {
    }
    while (slot.done.load(std::memory_order_acquire) < count) pause();
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
    while (work.ticket.load(std::memory_order_acquire) != kClosed) {
      if (!take(work)) pause();
    }
  }

  std::shared_ptr<Work> work_;
  uint64_t phase_ = 0;
};

}  // namespace popjax
