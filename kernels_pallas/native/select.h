// The k largest of many scores, by bisection on their bits: a float that is not negative orders as
// the integer of its bits does. The sign is dropped, so -0 is 0.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "native/isa.h"
#include "native/rows.h"

namespace popjax {

// Scores in the order of which the largest are taken, of equal ones the first.
class Ranking {
 public:
  // Of `size` scores, those where `among` is zero are never taken; all may be without it.
  Ranking(const float* scores, int64_t size, const uint8_t* among = nullptr)
      : size_(size), most_(size), keys_((size + kLanes - 1) / kLanes * kLanes, kNever) {
    std::memcpy(keys_.data(), scores, size * sizeof(float));
    for (int64_t i = 0; i < size; ++i) {
      keys_[i] = among != nullptr && !among[i] ? kNever : keys_[i] & 0x7fffffff;
      most_ -= keys_[i] == kNever;
    }
  }

  // chosen[i] = 1 for exactly `keep` of the scores, or for as many as there are.
  void top(int64_t keep, uint8_t* chosen) const {
    keep = std::min(keep, most_);
    if (keep <= 0) return std::fill(chosen, chosen + size_, uint8_t{0}), void();
    // The largest limit that `keep` keys reach, one bit after the other, or any that no more reach.
    int32_t limit = 0;
    int64_t reached = size_;
    for (int32_t bit = 1 << 30; bit > 0 && reached != keep; bit >>= 1) {
      const int64_t now = at_least(limit | bit);
      if (now >= keep) limit |= bit, reached = now;
    }
    int64_t room = keep - (limit < INT32_MAX ? at_least(limit + 1) : 0);
    for (int64_t i = 0; i < size_; ++i) {
      chosen[i] = keys_[i] > limit || (keys_[i] == limit && room-- > 0);
    }
  }

 private:
  static constexpr int32_t kNever = -1;

  // How many keys are no less than `limit`.
  int64_t at_least(int32_t limit) const {
    int64_t total = 0;
    versioned([&](auto n) __attribute__((always_inline)) {
      constexpr int kParts = kLanes / n;
      Vector<int32_t, n> counts[kParts] = {};
      for (size_t i = 0; i < keys_.size(); i += kLanes) {
        POPJAX_UNROLL
        for (int part = 0; part < kParts; ++part) {
          // True is -1.
          counts[part] -= loaded<Vector<int32_t, n>>(keys_.data() + i + part * n) >= limit;
        }
      }
      for (const auto& count : counts) {
        for (int lane = 0; lane < n; ++lane) total += count[lane];
      }
    });
    return total;
  }

  int64_t size_, most_;
  std::vector<int32_t> keys_;  // up to whole lanes
};

// chosen[i] = 1 for exactly `keep` of `size` scores, the largest; of equal ones the first.
inline void select_top(const float* scores, int64_t size, int64_t keep, uint8_t* chosen) {
  if (keep >= size) return std::fill(chosen, chosen + size, uint8_t{1});
  Ranking(scores, size).top(keep, chosen);
}

}  // namespace popjax
