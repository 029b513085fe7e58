// How work is cut into pieces. For sums over rows the cuts depend on the number of rows alone, so
// the result depends neither on threads, nor on the batch, nor on which rows are left out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "native/isa.h"
#include "native/rows.h"
#include "native/team.h"

namespace popjax {

constexpr int64_t kPieces = 16;

// Rows of one piece of a product whose rows are independent: a sixteenth of them, so that uneven
// threads end together, but at most a megabyte of float32. A multiple of the rows worked at once.
inline int64_t rows_a_piece(int64_t rows, int64_t width) {
  const int64_t most = std::max<int64_t>((int64_t{1} << 18) / std::max<int64_t>(width, 1), 4);
  return std::clamp<int64_t>((rows / kPieces + 3) / 4 * 4, 4, most);
}

// A sum over rows as up to kPieces partial sums [vectors, width], added up in their order.
class PartialSums {
 public:
  static constexpr int64_t kLeastRows = 32;

  PartialSums(int64_t rows, int64_t vectors, int64_t width)
      : rows_(rows),
        pieces_(std::clamp<int64_t>(rows / kLeastRows, 1, kPieces)),
        vectors_(vectors),
        width_(width),
        sums_(new float[pieces_ * vectors * width]) {}

  int64_t pieces() const { return pieces_; }
  int64_t begin(int64_t piece) const { return rows_ * piece / pieces_; }

  // The sums [count, width] of one piece for vectors first .. first + count - 1, set to zero.
  float* cleared(int64_t piece, int64_t first, int64_t count) const {
    float* sums = sums_.get() + (piece * vectors_ + first) * width_;
    std::fill(sums, sums + count * width_, 0.0f);
    return sums;
  }

  void add_up(float* y, Team& team) const {
    constexpr int64_t kStep = 4096;
    const int64_t size = vectors_ * width_;
    team.run((size + kStep - 1) / kStep, [&](int64_t block) {
      const int64_t first = block * kStep, end = std::min(first + kStep, size);
      std::copy(sums_.get() + first, sums_.get() + end, y + first);
      for (int64_t piece = 1; piece < pieces_; ++piece) {
        add(sums_.get() + piece * size + first, y + first, end - first);
      }
    });
  }

 private:
  // y[i] += x[i] for i below `size`.
  static void add(const float* x, float* y, int64_t size) {
    versioned([&](auto n) __attribute__((always_inline)) {
      const int64_t whole = size / kLanes * kLanes;
      for (int64_t i = 0; i < whole; i += kLanes) {
        auto sums = Lanes<n>::load(y + i);
        sums.add_product(Lanes<n>::load(x + i), 1.0f);
        sums.store(y + i);
      }
      for (int64_t i = whole; i < size; ++i) y[i] += x[i];
    });
  }

  int64_t rows_, pieces_, vectors_, width_;
  std::unique_ptr<float[]> sums_;
};

}  // namespace popjax
