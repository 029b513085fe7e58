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
    versioned([&](auto n) __attribute__((always_inline)) {
      using Keys = Vector<int32_t, n>;
      int64_t i = 0;
      for (; i + n <= size; i += n) {
        Keys keys = loaded<Keys>(keys_.data() + i) & 0x7fffffff;
        // What is not among them gets all bits, which is kNever.
        if (among != nullptr) keys |= widened<n>(among + i) == 0;
        std::memcpy(keys_.data() + i, &keys, sizeof(keys));
      }
      for (; i < size; ++i) {
        keys_[i] = among != nullptr && !among[i] ? kNever : keys_[i] & 0x7fffffff;
      }
    });
    if (among != nullptr) most_ = at_least(0);
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
    if (reached == keep) return mark(limit, chosen);
    int64_t room = keep - (limit < INT32_MAX ? at_least(limit + 1) : 0);
    for (int64_t i = 0; i < size_; ++i) {
      chosen[i] = keys_[i] > limit || (keys_[i] == limit && room-- > 0);
    }
  }

 private:
  static constexpr int32_t kNever = -1;

  // chosen[i] = 1 where a key is no less than `limit`.
  void mark(int32_t limit, uint8_t* chosen) const {
    versioned([&](auto n) __attribute__((always_inline)) {
      int64_t i = 0;
      for (; i + n <= size_; i += n) {
        const auto reaches = loaded<Vector<int32_t, n>>(keys_.data() + i) >= limit;
        const auto bytes = __builtin_convertvector(reaches & 1, Vector<uint8_t, n>);
        std::memcpy(chosen + i, &bytes, sizeof(bytes));
      }
      for (; i < size_; ++i) chosen[i] = keys_[i] >= limit;
    });
  }

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
