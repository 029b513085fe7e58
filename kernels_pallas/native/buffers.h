// Buffers of a call as plain pointers: activations become float32, weights become `Rows` by dtype.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "native/rows.h"
#include "xla/ffi/api/ffi.h"

namespace popjax {

namespace ffi = xla::ffi;

inline int64_t dim(const ffi::AnyBuffer& buffer, size_t axis) {
  return buffer.dimensions()[axis];
}

inline ffi::Error invalid(const std::string& message) {
  return ffi::Error::InvalidArgument("popjax: " + message);
}

// Activations in float32, whatever they came as.
class Activations {
 public:
  explicit Activations(const ffi::AnyBuffer& buffer) {
    if (buffer.element_type() == ffi::F32) {
      data_ = static_cast<const float*>(buffer.untyped_data());
      return;
    }
    const auto* half = static_cast<const uint16_t*>(buffer.untyped_data());
    copy_.resize(buffer.element_count());
    for (size_t i = 0; i < copy_.size(); ++i) copy_[i] = from_bf16(half[i]);
    data_ = copy_.data();
  }
  const float* data() const { return data_; }

 private:
  std::vector<float> copy_;
  const float* data_;
};

// A result computed in float32 and stored in its own dtype by `store`.
class Result {
 public:
  explicit Result(const ffi::AnyBuffer& buffer)
      : half_(buffer.element_type() == ffi::F32 ? nullptr : buffer.untyped_data()) {
    if (half_ != nullptr) copy_.resize(buffer.element_count());
    data_ = half_ != nullptr ? copy_.data() : static_cast<float*>(buffer.untyped_data());
  }
  float* data() { return data_; }
  void store() {
    auto* to = static_cast<uint16_t*>(half_);
    for (size_t i = 0; i < copy_.size(); ++i) to[i] = to_bf16(copy_[i]);
  }

 private:
  void* half_;
  std::vector<float> copy_;
  float* data_;
};

// Whether rows of type W have scales.
template <typename W, typename = void>
struct Scaled : std::false_type {};
template <typename W>
struct Scaled<W, std::void_t<decltype(W::scales)>> : std::true_type {};

template <typename W>
void set_scales(W& w, const ffi::AnyBuffer& scales) {
  if constexpr (Scaled<W>::value) w.scales = static_cast<const float*>(scales.untyped_data());
}

inline bool is_activation(const ffi::AnyBuffer& buffer) {
  return buffer.element_type() == ffi::F32 || buffer.element_type() == ffi::BF16;
}

constexpr char kGroups[] =
    "each group of weights needs a float32 scale; groups are a power of two from 32 on that "
    "divides the row length";

// log2 of the weights of one scale, for rows [rows, width]; -1 where the kernels cannot read that.
inline int64_t group_shift(const ffi::AnyBuffer& scales, int64_t rows, int64_t width) {
  const int64_t weights = rows * width, count = scales.element_count();
  int64_t shift = 5;
  while ((count << shift) < weights && (int64_t{1} << shift) < width) ++shift;
  const bool whole = count << shift == weights && width % (int64_t{1} << shift) == 0;
  return whole && scales.element_type() == ffi::F32 ? shift : -1;
}

// Weights of a row of `w`, by its dtype: U8 holds two of four bits each, U16 eight of six in three.
inline int64_t weights_a_row(const ffi::AnyBuffer& w) {
  switch (w.element_type()) {
    case ffi::U8:
      return dim(w, 1) * 2;
    case ffi::U16:
      return dim(w, 1) * 8 / 3;
    default:
      return dim(w, 1);
  }
}

// Calls body(rows) with the matrix `w` [F, width] as the type of its dtype; `scales` only counts
// for S8, U16 and U8.
template <typename Body>
ffi::Error with_rows(const ffi::AnyBuffer& w, const ffi::AnyBuffer& scales, int64_t width,
                     const Body& body) {
  const void* data = w.untyped_data();
  const auto* scale = static_cast<const float*>(scales.untyped_data());
  const int64_t stored = weights_a_row(w);
  if (stored != width) {
    return invalid("rows of " + std::to_string(stored) + " weights do not fit vectors of " +
                   std::to_string(width));
  }
  const int64_t shift = group_shift(scales, dim(w, 0), width);
  switch (w.element_type()) {
    case ffi::F32:
      return body(F32Rows{static_cast<const float*>(data), width});
    case ffi::BF16:
      return body(Bf16Rows{static_cast<const uint16_t*>(data), width});
    case ffi::S8:
      if (shift < 0) return invalid(kGroups);
      return body(Int8Rows{static_cast<const int8_t*>(data), scale, width, shift});
    case ffi::U16:
      if (shift < 0) return invalid(kGroups);
      return body(Int6Rows{static_cast<const uint8_t*>(data), scale, width, shift});
    case ffi::U8:
      if (shift < 0) return invalid(kGroups);
      return body(Int4Rows{static_cast<const uint8_t*>(data), scale, width, shift});
    default:
      return invalid("weights are neither float32, bfloat16, int8, 6-bit nor 4-bit");
  }
}

}  // namespace popjax
