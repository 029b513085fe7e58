// Matrices by rows, in the dtypes that weights are stored in, and the two products of chosen rows
// with a few vectors. The loops are in rows.cc.
//
// For one row and one vector the order of additions is fixed: it depends neither on how many rows
// or vectors are worked at once nor on threads. So a batch equals its rows bit for bit.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#define POPJAX_INLINE inline __attribute__((always_inline))
// Blocks of rows and vectors are unrolled whole, so that their sums stay in registers.
#if defined(__clang__)
#define POPJAX_UNROLL _Pragma("unroll")
#else
#define POPJAX_UNROLL _Pragma("GCC unroll 16")
#endif

namespace popjax {

constexpr int64_t kLanes = 16;  // weights worked at once

template <typename T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <typename T, int N>
using Vector = typename VectorOf<T, N>::type;

template <typename V>
POPJAX_INLINE V loaded(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

// kLanes floats as vectors of N, the width of the instruction set: one of 16, two of 8, ...
template <int N>
struct Lanes {
  static constexpr int kParts = kLanes / N;
  Vector<float, N> part[kParts];

  POPJAX_INLINE static Lanes zero() {
    Lanes out;
    POPJAX_UNROLL
    for (int i = 0; i < kParts; ++i) out.part[i] = Vector<float, N>{};
    return out;
  }
  POPJAX_INLINE static Lanes load(const float* from) {
    Lanes out;
    POPJAX_UNROLL
    for (int i = 0; i < kParts; ++i) out.part[i] = loaded<Vector<float, N>>(from + i * N);
    return out;
  }
  POPJAX_INLINE void store(float* to) const {
    POPJAX_UNROLL
    for (int i = 0; i < kParts; ++i) std::memcpy(to + i * N, &part[i], sizeof(part[i]));
  }
  POPJAX_INLINE void add_product(const Lanes& a, const Lanes& b) {
    POPJAX_UNROLL
    for (int i = 0; i < kParts; ++i) part[i] += a.part[i] * b.part[i];
  }
  POPJAX_INLINE void add_product(const Lanes& a, float b) {
    POPJAX_UNROLL
    for (int i = 0; i < kParts; ++i) part[i] += a.part[i] * b;
  }
  // As one vector, whose sum is that of all.
  POPJAX_INLINE Vector<float, N> folded() const {
    Lanes out = *this;
    POPJAX_UNROLL
    for (int half = kParts / 2; half > 0; half /= 2) {
      POPJAX_UNROLL
      for (int i = 0; i < half; ++i) out.part[i] += out.part[i + half];
    }
    return out.part[0];
  }
  POPJAX_INLINE float sum() const;
};

// Each group of 2 * H floats folded to H: those of `a`, then those of `b`.
template <int H, typename V, int... I>
POPJAX_INLINE V folded(const V& a, const V& b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (I / H * 2 * H + I % H)...) +
         __builtin_shufflevector(a, b, (I / H * 2 * H + I % H + H)...);
#else
  using Places = Vector<int32_t, sizeof...(I)>;
  return __builtin_shuffle(a, b, Places{(I / H * 2 * H + I % H)...}) +
         __builtin_shuffle(a, b, Places{(I / H * 2 * H + I % H + H)...});
#endif
}

// The sums of C <= N vectors of N floats, in the first C places. Their halves are added first, then
// the halves of that: for each vector the same tree whatever C is.
template <int N, int C, int H = N / 2>
POPJAX_INLINE Vector<float, N> sums_of(const Vector<float, N>* vectors) {
  if constexpr (H == 0) {
    return vectors[0];
  } else {
    constexpr int kHalf = C > 1 ? C / 2 : 1, kNext = C > 1 ? 1 : 0;
    Vector<float, N> half[kHalf];
    POPJAX_UNROLL
    for (int i = 0; i < kHalf; ++i) {
      half[i] =
          folded<H>(vectors[2 * i], vectors[2 * i + kNext], std::make_integer_sequence<int, N>());
    }
    return sums_of<N, kHalf, H / 2>(half);
  }
}

template <int N>
POPJAX_INLINE float Lanes<N>::sum() const {
  const Vector<float, N> one = folded();
  return sums_of<N, 1>(&one)[0];
}

POPJAX_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

POPJAX_INLINE float from_bf16(uint16_t bits) {
  return bits_to_float(uint32_t{bits} << 16);
}

// Round to nearest, ties to even, as XLA does; NaN stays NaN.
POPJAX_INLINE uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The matrices: rows of `width` weights, read as float32, kLanes at a time or one.

struct F32Rows {
  const float* data;
  int64_t width;
  template <int N>
  POPJAX_INLINE Lanes<N> lanes(int64_t row, int64_t at) const {
    return Lanes<N>::load(data + row * width + at);
  }
  POPJAX_INLINE const void* place(int64_t row, int64_t at) const { return data + row * width + at; }
  POPJAX_INLINE float one(int64_t row, int64_t at) const { return data[row * width + at]; }
};

struct Bf16Rows {
  const uint16_t* data;
  int64_t width;
  template <int N>
  POPJAX_INLINE Lanes<N> lanes(int64_t row, int64_t at) const {
    Lanes<N> out;
    POPJAX_UNROLL
    for (int i = 0; i < Lanes<N>::kParts; ++i) {
      const auto half = loaded<Vector<uint16_t, N>>(data + row * width + at + i * N);
      const auto bits = __builtin_convertvector(half, Vector<uint32_t, N>) << 16;
      out.part[i] = (Vector<float, N>)bits;
    }
    return out;
  }
  POPJAX_INLINE const void* place(int64_t row, int64_t at) const { return data + row * width + at; }
  POPJAX_INLINE float one(int64_t row, int64_t at) const {
    return from_bf16(data[row * width + at]);
  }
};

// Through sixteen bits: widening four times at once is not vectorised by every compiler.
template <int N, typename Byte>
POPJAX_INLINE Vector<int32_t, N> widened(const Byte* from) {
  const auto half = __builtin_convertvector(loaded<Vector<Byte, N>>(from), Vector<int16_t, N>);
  return __builtin_convertvector(half, Vector<int32_t, N>);
}

// One float32 scale for each group of weights along a row; width is a multiple of the group, and
// the group a power of two from 32 on.
struct Int8Rows {
  const int8_t* data;
  const float* scales;
  int64_t width, group_shift;
  template <int N>
  POPJAX_INLINE Lanes<N> lanes(int64_t row, int64_t at) const {
    const int64_t flat = row * width + at;
    const float scale = scales[flat >> group_shift];
    Lanes<N> out;
    POPJAX_UNROLL
    for (int i = 0; i < Lanes<N>::kParts; ++i) {
      const auto whole = widened<N>(data + flat + i * N);
      out.part[i] = __builtin_convertvector(whole, Vector<float, N>) * scale;
    }
    return out;
  }
  POPJAX_INLINE const void* place(int64_t row, int64_t at) const { return data + row * width + at; }
  POPJAX_INLINE float one(int64_t row, int64_t at) const {
    const int64_t flat = row * width + at;
    return static_cast<float>(data[flat]) * scales[flat >> group_shift];
  }
};

// Two weights a byte, each its value + 8: of 32 weights the first half lies in the low bits.
struct Int4Rows {
  static constexpr int64_t kBlockBytes = 16;  // of 32 weights
  static constexpr int kZero = 8;             // what a stored weight is above its value
  const uint8_t* data;
  const float* scales;
  int64_t width, group_shift;
  template <int N>
  POPJAX_INLINE Lanes<N> lanes(int64_t row, int64_t at) const {
    const int64_t flat = row * width + at;
    const float scale = scales[flat >> group_shift];
    const int high = flat % 32 < 16 ? 0 : 4;
    Lanes<N> out;
    POPJAX_UNROLL
    for (int i = 0; i < Lanes<N>::kParts; ++i) {
      const auto pairs = widened<N>(data + flat / 32 * kBlockBytes + i * N);
      const auto whole = ((pairs >> high) & 15) - kZero;
      out.part[i] = __builtin_convertvector(whole, Vector<float, N>) * scale;
    }
    return out;
  }
  POPJAX_INLINE const void* place(int64_t row, int64_t at) const {
    return data + (row * width + at) / 2;
  }
  POPJAX_INLINE float one(int64_t row, int64_t at) const {
    const int64_t flat = row * width + at;
    const uint8_t byte = data[flat / 32 * kBlockBytes + flat % 16];
    const int value = flat % 32 < 16 ? byte & 15 : byte >> 4;
    return static_cast<float>(value - kZero) * scales[flat >> group_shift];
  }
};

// Of every 32 weights 24 bytes: each is its value + 32, whose upper four bits lie as those of
// Int4Rows; byte k of the last eight has the lower two of weights k, k + 8, k + 16 and k + 24.
struct Int6Rows {
  static constexpr int64_t kBlockBytes = 24;
  static constexpr int kZero = 32;
  const uint8_t* data;
  const float* scales;
  int64_t width, group_shift;
  template <int N>
  POPJAX_INLINE Lanes<N> lanes(int64_t row, int64_t at) const {
    const int64_t flat = row * width + at;
    const float scale = scales[flat >> group_shift];
    const uint8_t* block = data + flat / 32 * kBlockBytes;
    const int high = flat % 32 < 16 ? 0 : 4;
    uint8_t lower[kLanes];  // the lower bits of these weights, and of others
    for (int i = 0; i < kLanes; ++i) lower[i] = block[16 + i % 8] >> (high + i / 8 * 2);
    Lanes<N> out;
    POPJAX_UNROLL
    for (int i = 0; i < Lanes<N>::kParts; ++i) {
      const auto upper = (widened<N>(block + i * N) >> high) & 15;
      const auto whole = ((upper << 2) | (widened<N>(lower + i * N) & 3)) - kZero;
      out.part[i] = __builtin_convertvector(whole, Vector<float, N>) * scale;
    }
    return out;
  }
  POPJAX_INLINE const void* place(int64_t row, int64_t at) const {
    return data + (row * width + at) / 32 * kBlockBytes;
  }
  POPJAX_INLINE float one(int64_t row, int64_t at) const {
    const int64_t flat = row * width + at, i = flat % 32;
    const uint8_t* block = data + flat / 32 * kBlockBytes;
    const int upper = i < 16 ? block[i] & 15 : block[i - 16] >> 4;
    const int lower = (block[16 + i % 8] >> (i / 8 * 2)) & 3;
    return static_cast<float>((upper << 2 | lower) - kZero) * scales[flat >> group_shift];
  }
};

// Both may be told which `count` rows to ask memory for meanwhile; without, it is the next few.

// out[i * row_stride + v * vector_stride] = row rows[i] . x[v] of `count` rows.
template <typename W>
void dot_rows(const W& w, const int64_t* rows, int64_t count, const float* x, int64_t vectors,
              float* out, int64_t row_stride, int64_t vector_stride,
              const int64_t* ahead = nullptr);

// y[v] += sum over i of h[i * row_stride + v * vector_stride] * row rows[i], in the order of i.
template <typename W>
void add_rows(const W& w, const int64_t* rows, int64_t count, const float* h, int64_t row_stride,
              int64_t vector_stride, int64_t vectors, float* y, const int64_t* ahead = nullptr);

// The sum of `size` floats, as fast as they can be read.
float sum_of(const float* data, int64_t size);

}  // namespace popjax
