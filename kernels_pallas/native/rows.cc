// The inner loops of every CPU kernel, in registers, compiled once for each instruction set.

#include "native/rows.h"

#include <algorithm>

#include "native/isa.h"

namespace popjax {
namespace {

constexpr int kVectors = 4;  // vectors worked at once
// Rows worked at once, where they are scattered or several vectors share them; the next ones are
// asked for meanwhile, since hardware does not foresee a jump. For one vector, rows that follow
// each other are worked one by one: a single stream of memory is what hardware fetches ahead best.
constexpr int kRows = 4;
// Bytes of rows between those worked and those asked for: where rows are short, four are too few to
// keep memory busy (measured: rows of 1,152 bytes are read 1.13 times faster at three groups).
constexpr int64_t kAheadBytes = 16384, kMostGroups = 4;
// Columns of the sums worked at once for several vectors: those of sixteen fit the first cache.
constexpr int64_t kTile = 256;

// Whether other rows are asked of memory meanwhile. They go to the second cache only, which has
// room for more requests under way than the first (measured: scattered rows are read 1.4 times
// faster, and 1.7 times over a pool that no cache holds).
enum class Ahead { kNone, kRows };

template <Ahead A>
POPJAX_INLINE void ask_for(const void* place) {
  if (A == Ahead::kRows) __builtin_prefetch(place, 0, 2);
}

// out[r * row_stride + v * vector_stride] = row rows[r] . x[v], for R rows and V vectors.
template <int N, int R, int V, Ahead A, typename W>
POPJAX_INLINE void dot_block(const W& w, const int64_t* rows, const int64_t* next, const float* x,
                             float* out, int64_t row_stride, int64_t vector_stride) {
  Lanes<N> sums[R][V];
  POPJAX_UNROLL
  for (int r = 0; r < R; ++r) {
    POPJAX_UNROLL
    for (int v = 0; v < V; ++v) sums[r][v] = Lanes<N>::zero();
  }
  const int64_t whole = w.width / kLanes * kLanes;
  for (int64_t d = 0; d < whole; d += kLanes) {
    Lanes<N> weights[R];
    POPJAX_UNROLL
    for (int r = 0; r < R; ++r) {
      if (A != Ahead::kNone) ask_for<A>(w.place(next[r], d));
      weights[r] = w.template lanes<N>(rows[r], d);
    }
    POPJAX_UNROLL
    for (int v = 0; v < V; ++v) {
      const auto xs = Lanes<N>::load(x + v * w.width + d);
      POPJAX_UNROLL
      for (int r = 0; r < R; ++r) sums[r][v].add_product(weights[r], xs);
    }
  }
  float totals[R * V];
  constexpr int kAtOnce = R * V < N ? R * V : N;
  POPJAX_UNROLL
  for (int i = 0; i < R * V; i += kAtOnce) {
    Vector<float, N> parts[kAtOnce];
    POPJAX_UNROLL
    for (int j = 0; j < kAtOnce; ++j) parts[j] = sums[(i + j) / V][(i + j) % V].folded();
    const Vector<float, N> together = sums_of<N, kAtOnce>(parts);
    std::memcpy(totals + i, &together, kAtOnce * sizeof(float));
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      float rest = 0;
      for (int64_t d = whole; d < w.width; ++d) rest += w.one(rows[r], d) * x[v * w.width + d];
      out[r * row_stride + v * vector_stride] = totals[r * V + v] + rest;
    }
  }
}

// The same for any number of vectors; the first ones ask for the rows after these.
template <int N, int R, Ahead A, typename W>
POPJAX_INLINE void dot_vectors(const W& w, const int64_t* rows, const int64_t* next, const float* x,
                               int64_t vectors, float* out, int64_t row_stride,
                               int64_t vector_stride) {
  int64_t v = 0;
  for (; v + kVectors <= vectors; v += kVectors) {
    dot_block<N, R, kVectors, A>(w, rows, next, x + v * w.width, out + v * vector_stride,
                                 row_stride, vector_stride);
  }
  for (; v < vectors; ++v) {
    dot_block<N, R, 1, A>(w, rows, next, x + v * w.width, out + v * vector_stride, row_stride,
                          vector_stride);
  }
}

// Columns first .. end - 1 of the sums.
struct Columns {
  int64_t first, end;
};

// y[v] += sum over R rows of h[r * row_stride + v * vector_stride] * row rows[r].
template <int N, int R, int V, Ahead A, typename W>
POPJAX_INLINE void add_block(const W& w, const int64_t* rows, const int64_t* next, const float* h,
                             int64_t row_stride, int64_t vector_stride, Columns columns, float* y) {
  const int64_t whole = columns.end / kLanes * kLanes;
  for (int64_t d = columns.first; d < whole; d += kLanes) {
    Lanes<N> weights[R];
    POPJAX_UNROLL
    for (int r = 0; r < R; ++r) {
      if (A != Ahead::kNone) ask_for<A>(w.place(next[r], d));
      weights[r] = w.template lanes<N>(rows[r], d);
    }
    POPJAX_UNROLL
    for (int v = 0; v < V; ++v) {
      auto sums = Lanes<N>::load(y + v * w.width + d);
      POPJAX_UNROLL
      for (int r = 0; r < R; ++r) {
        sums.add_product(weights[r], h[r * row_stride + v * vector_stride]);
      }
      sums.store(y + v * w.width + d);
    }
  }
  for (int64_t d = whole; d < columns.end; ++d) {
    for (int v = 0; v < V; ++v) {
      for (int r = 0; r < R; ++r) {
        y[v * w.width + d] += w.one(rows[r], d) * h[r * row_stride + v * vector_stride];
      }
    }
  }
}

template <int N, int R, Ahead A, typename W>
POPJAX_INLINE void add_vectors(const W& w, const int64_t* rows, const int64_t* next, const float* h,
                               int64_t row_stride, int64_t vector_stride, int64_t vectors,
                               Columns columns, float* y) {
  int64_t v = 0;
  for (; v + kVectors <= vectors; v += kVectors) {
    add_block<N, R, kVectors, A>(w, rows, next, h + v * vector_stride, row_stride, vector_stride,
                                 columns, y + v * w.width);
  }
  for (; v < vectors; ++v) {
    add_block<N, R, 1, A>(w, rows, next, h + v * vector_stride, row_stride, vector_stride, columns,
                          y + v * w.width);
  }
}

// Cuts a list of rows into groups: body.together(i, next) works kRows of them from i on, asking for
// the rows at `next`: those of `ahead` if given; body.single(i) works one, and body.first(count)
// asks for the first ones, all at once.
template <typename Body>
POPJAX_INLINE void in_groups(const int64_t* rows, const int64_t* ahead, int64_t count,
                             int64_t vectors, const Body& body) {
  const int64_t last = count - kRows, distance = body.groups_ahead() * kRows;
  const bool stream = vectors == 1 && count > 0 && rows[count - 1] - rows[0] == count - 1;
  int64_t i = 0;
  if (last >= 0 && !stream && ahead == nullptr) body.first(std::min(distance, count));
  for (; i <= last && !stream; i += kRows) {
    body.together(i, ahead != nullptr ? ahead + i : rows + std::min(i + distance, last));
  }
  for (; i < count; ++i) body.single(i);
}

// Groups of kRows between the rows worked and those asked for.
template <typename W>
POPJAX_INLINE int64_t groups_ahead(const W& w) {
  const int64_t bytes =
      static_cast<const char*>(w.place(1, 0)) - static_cast<const char*>(w.place(0, 0));
  return std::clamp<int64_t>(kAheadBytes / (kRows * std::max<int64_t>(bytes, 1)), 1, kMostGroups);
}

// Asks for columns of the first `count` rows of a list, on their way all at once.
template <typename W>
POPJAX_INLINE void ask_for_first(const W& w, const int64_t* rows, int64_t count, Columns columns) {
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t d = columns.first; d < columns.end; d += kLanes) {
      ask_for<Ahead::kRows>(w.place(rows[r], d));
    }
  }
}

template <int N, typename W>
struct Dots {
  const W& w;
  const int64_t* rows;
  const float* x;
  int64_t vectors;
  float* out;
  int64_t row_stride, vector_stride;

  POPJAX_INLINE int64_t groups_ahead() const { return popjax::groups_ahead(w); }
  POPJAX_INLINE void first(int64_t count) const { ask_for_first(w, rows, count, {0, w.width}); }
  POPJAX_INLINE void together(int64_t i, const int64_t* next) const {
    dot_vectors<N, kRows, Ahead::kRows>(w, rows + i, next, x, vectors, out + i * row_stride,
                                        row_stride, vector_stride);
  }
  POPJAX_INLINE void single(int64_t i) const {
    dot_vectors<N, 1, Ahead::kNone>(w, rows + i, nullptr, x, vectors, out + i * row_stride,
                                    row_stride, vector_stride);
  }
};

template <int N, typename W>
struct Sums {
  const W& w;
  const int64_t* rows;
  const float* h;
  int64_t row_stride, vector_stride, vectors;
  Columns columns;
  float* y;

  POPJAX_INLINE int64_t groups_ahead() const { return popjax::groups_ahead(w); }
  POPJAX_INLINE void first(int64_t count) const { ask_for_first(w, rows, count, columns); }
  POPJAX_INLINE void together(int64_t i, const int64_t* next) const {
    add_vectors<N, kRows, Ahead::kRows>(w, rows + i, next, h + i * row_stride, row_stride,
                                        vector_stride, vectors, columns, y);
  }
  POPJAX_INLINE void single(int64_t i) const {
    add_vectors<N, 1, Ahead::kNone>(w, rows + i, nullptr, h + i * row_stride, row_stride,
                                    vector_stride, vectors, columns, y);
  }
};

}  // namespace

template <typename W>
void dot_rows(const W& w, const int64_t* rows, int64_t count, const float* x, int64_t vectors,
              float* out, int64_t row_stride, int64_t vector_stride, const int64_t* ahead) {
  versioned([&](auto n) __attribute__((always_inline)) {
    const Dots<n, W> body{w, rows, x, vectors, out, row_stride, vector_stride};
    in_groups(rows, ahead, count, vectors, body);
  });
}

template <typename W>
void add_rows(const W& w, const int64_t* rows, int64_t count, const float* h, int64_t row_stride,
              int64_t vector_stride, int64_t vectors, float* y, const int64_t* ahead) {
  versioned([&](auto n) __attribute__((always_inline)) {
    const int64_t tile = vectors > 1 ? kTile : w.width;
    for (int64_t first = 0; first < w.width; first += tile) {
      const Columns columns{first, std::min(first + tile, w.width)};
      const Sums<n, W> body{w, rows, h, row_stride, vector_stride, vectors, columns, y};
      in_groups(rows, ahead, count, vectors, body);
    }
  });
}

float sum_of(const float* data, int64_t size) {
  float total = 0;
  versioned([&](auto n) __attribute__((always_inline)) {
    constexpr int64_t kChains = 4, kStep = kChains * kLanes;
    Lanes<n> sums[kChains];
    for (auto& sum : sums) sum = Lanes<n>::zero();
    const int64_t whole = size / kStep * kStep;
    for (int64_t i = 0; i < whole; i += kStep) {
      POPJAX_UNROLL
      for (int c = 0; c < kChains; ++c) {
        sums[c].add_product(Lanes<n>::load(data + i + c * kLanes), 1.0f);
      }
    }
    for (const auto& sum : sums) total += sum.sum();
    for (int64_t i = whole; i < size; ++i) total += data[i];
  });
  return total;
}

#define POPJAX_ROWS(W)                                                                      \
  template void dot_rows(const W&, const int64_t*, int64_t, const float*, int64_t, float*,  \
                         int64_t, int64_t, const int64_t*);                                 \
  template void add_rows(const W&, const int64_t*, int64_t, const float*, int64_t, int64_t, \
                         int64_t, float*, const int64_t*);
POPJAX_ROWS(F32Rows)
POPJAX_ROWS(Bf16Rows)
POPJAX_ROWS(Int8Rows)
POPJAX_ROWS(Int6Rows)
POPJAX_ROWS(Int4Rows)

}  // namespace popjax

extern "C" const char* popjax_instruction_set() {
  switch (popjax::isa()) {
    case popjax::Isa::kVnni:
      return "AVX-512 with VNNI";
    case popjax::Isa::kAvx512:
      return "AVX-512";
    case popjax::Isa::kAvx2:
      return "AVX2";
    default:
      return "the compiler's baseline";
  }
}
