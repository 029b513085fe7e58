// The activations of feed-forward layers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "native/isa.h"
#include "native/rows.h"
#include "native/softmax.h"

namespace popjax {

// In the order of masked_mlp/native.py.
enum class Activation : int32_t { kSilu, kGeluTanh, kGelu, kRelu };

template <int N>
POPJAX_INLINE Vector<float, N> activated(const Vector<float, N>& g, Activation kind) {
  switch (kind) {
    case Activation::kSilu:
      return g / (Exponential<N>(-g).value() + 1.0f);
    case Activation::kGeluTanh:
      return g * 0.5f * (tanh_of<N>((g * g * g * 0.044715f + g) * 0.7978845608f) + 1.0f);
    case Activation::kGelu: {
      Vector<float, N> out;
      for (int i = 0; i < N; ++i) out[i] = 0.5f * g[i] * (1.0f + std::erf(g[i] * 0.70710678118f));
      return out;
    }
    default: {
      const Vector<float, N> zero{};
      return g > zero ? g : zero;
    }
  }
}

// g[i] = act(g[i]) * up[i], or act(g[i]) without `up`, for i below `count`: the same numbers
// wherever in the array they are.
inline void activate(Activation kind, int64_t count, const float* up, float* g) {
  versioned([&](auto n) __attribute__((always_inline)) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t here = std::min(count - i, kLanes);
      float tail[2][kLanes] = {};
      const bool whole = here == kLanes;
      if (!whole) {
        std::memcpy(tail[0], g + i, here * sizeof(float));
        if (up != nullptr) std::memcpy(tail[1], up + i, here * sizeof(float));
      }
      auto lanes = Lanes<n>::load(whole ? g + i : tail[0]);
      for (auto& part : lanes.part) part = activated<n>(part, kind);
      if (up != nullptr) {
        const auto other = Lanes<n>::load(whole ? up + i : tail[1]);
        for (int p = 0; p < Lanes<n>::kParts; ++p) lanes.part[p] *= other.part[p];
      }
      lanes.store(whole ? g + i : tail[0]);
      if (!whole) std::memcpy(g + i, tail[0], here * sizeof(float));
    }
  });
}

}  // namespace popjax
