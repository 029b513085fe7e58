// Products of rows of four or six bits with vectors rounded to eight bits, in integers: what scouts
// foretell.
//
// Every 32 numbers of a vector are rounded by a scale of their own, as row_products/quantized.py
// has it, so a vector's result depends on no other one. The integers of a block are exact on every
// instruction set; what is added in float32 is blocks, in an order that is fixed for each.
#pragma once

#include <cstdint>
#include <vector>

#include "native/rows.h"

namespace popjax {

// Vectors [count, width] laid out as four-bit rows are: what meets the low half of a byte, and what
// meets the high half. Four bytes of a row, which are eight weights, add up in one lane. The upper
// bits of six-bit rows lie the same way.
class RoundedVectors {
 public:
  static constexpr int64_t kBlock = 32;  // numbers of one scale, 16 bytes of a row
  static constexpr int64_t kStep = 128;  // numbers worked at once at most; zeros fill the last step

  struct Vector {
    const int8_t *low, *high;  // [width / 2]
    const int32_t* offsets;    // [width / 8]: what the eights that four-bit weights are above cost
    const float* scales;       // [width / 8]
  };

  RoundedVectors(const float* x, int64_t count, int64_t width);

  Vector of(int64_t v) const {
    return {low_.data() + v * bytes_, high_.data() + v * bytes_, offsets_.data() + v * lanes_,
            scales_.data() + v * lanes_};
  }

 private:
  void round_block(const float* x, int64_t v, int64_t block);

  int64_t bytes_, lanes_;  // of a vector
  std::vector<int8_t> low_, high_;
  std::vector<int32_t> offsets_;
  std::vector<float> scales_;
};

// Rows of four or six bits that are multiplied with rounded vectors.
template <typename W>
struct Rounded {
  W rows;
  const RoundedVectors* x;
};

// As `dot_rows` of rows.h; the vectors are those of `w`. For Int4Rows and Int6Rows.
template <typename W>
void dot_rows(const Rounded<W>& w, const int64_t* rows, int64_t count, const float* unrounded,
              int64_t vectors, float* out, int64_t row_stride, int64_t vector_stride);

}  // namespace popjax
