// Scores to softmax weights, a block at a time, in registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "native/isa.h"
#include "native/rows.h"

namespace popjax {

// exp(x) = grown * 2^n + 2^n with grown = exp(r) - 1 and |r| <= ln(2) / 2, where seven terms of the
// series leave out less than a float's rounding. NaN stays NaN; x beyond +-87 counts as that.
template <int N>
struct Exponential {
  Vector<float, N> grown, power;

  POPJAX_INLINE explicit Exponential(Vector<float, N> x) {
    const Vector<float, N> most = Vector<float, N>{} + 87.0f;
    x = x > most ? most : x;
    x = x < -most ? -most : x;
    // Adding 1.5 * 2^23 rounds to a whole number, which the low bits of the sum then hold.
    constexpr float kRound = 12582912.0f;
    const Vector<float, N> shifted = x * 1.44269504f + kRound;
    const Vector<float, N> n = shifted - kRound;
    // ln(2) in two parts, the first of so few bits that its product with n is exact.
    const Vector<float, N> r = x - n * 0.693359375f - n * -2.12194440e-4f;
    Vector<float, N> series = r * (1.0f / 5040) + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    grown = series * r * r + r;
    power = (Vector<float, N>)(((Vector<int32_t, N>)shifted - 0x4B400000 + 127) << 23);
  }
  POPJAX_INLINE Vector<float, N> value() const { return grown * power + power; }
  POPJAX_INLINE Vector<float, N> minus_one() const { return grown * power + (power - 1.0f); }
};

// exp(x) for x <= 0; exactly zero below -87.
template <int N>
POPJAX_INLINE Vector<float, N> weight_of(const Vector<float, N>& x) {
  const Vector<float, N> zero{}, value = Exponential<N>(x).value();
  return x < zero - 87.0f ? zero : value;
}

template <int N>
POPJAX_INLINE Vector<float, N> tanh_of(const Vector<float, N>& x) {
  const Vector<float, N> grown = Exponential<N>(x * 2.0f).minus_one();
  return grown / (grown + 2.0f);
}

// What becomes of a product of query and key before the softmax.
struct Scoring {
  float scale;
  float softcap;  // 0: none
};

// The largest of `count` > 0 scores, which become scaled and capped. Up to the next multiple of
// kLanes, -infinity follows them, which adds nothing.
inline float scale_scores(const Scoring& scoring, int64_t count, float* scores) {
  float top = -std::numeric_limits<float>::infinity();
  versioned([&](auto n) __attribute__((always_inline)) {
    const float cap = scoring.softcap;
    for (int64_t i = 0; i < count; i += kLanes) {
      auto lanes = Lanes<n>::load(scores + i);
      POPJAX_UNROLL
      for (auto& part : lanes.part) {
        part *= scoring.scale;
        if (cap != 0.0f) part = tanh_of<n>(part / cap) * cap;
      }
      lanes.store(scores + i);
    }
  });
  const int64_t whole = (count + kLanes - 1) / kLanes * kLanes;
  std::fill(scores + count, scores + whole, top);
  for (int64_t i = 0; i < count; ++i) top = std::max(top, scores[i]);
  return top;
}

// The sum of exp(score - top) of `count` scores, which become that.
inline float weigh_scores(float top, int64_t count, float* scores) {
  float total = 0;
  versioned([&](auto n) __attribute__((always_inline)) {
    auto sums = Lanes<n>::zero();
    for (int64_t i = 0; i < count; i += kLanes) {
      auto lanes = Lanes<n>::load(scores + i);
      for (auto& part : lanes.part) part = weight_of<n>(part - top);
      lanes.store(scores + i);
      sums.add_product(lanes, 1.0f);
    }
    total = sums.sum();
  });
  return total;
}

}  // namespace popjax
