// The activations of feed-forward layers.
#pragma once

#include <cmath>
#include <cstdint>

#include "native/rows.h"

namespace popjax {

// In the order of masked_mlp/native.py.
enum class Activation : int32_t { kSilu, kGeluTanh, kGelu, kRelu };

POPJAX_INLINE float activated(float g, Activation kind) {
  switch (kind) {
    case Activation::kSilu:
      return g / (1.0f + std::exp(-g));
    case Activation::kGeluTanh:
      return 0.5f * g * (1.0f + std::tanh(0.7978845608f * (g + 0.044715f * g * g * g)));
    case Activation::kGelu:
      return 0.5f * g * (1.0f + std::erf(g * 0.70710678118f));
    default:
      return g > 0.0f ? g : 0.0f;
  }
}

}  // namespace popjax
