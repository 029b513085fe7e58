// Four-bit rows times rounded vectors, once for each instruction set. See rounded.h.

#include "native/rounded.h"

#include <algorithm>
#include <cmath>

#include "native/isa.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own headers start some results from undefined ones, and it warns of that where inlined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace popjax {
namespace {

constexpr int64_t kBlock = RoundedVectors::kBlock, kStep = RoundedVectors::kStep;
constexpr int64_t kEight = 8;     // what a stored weight is above its value
constexpr float kLeast = 1e-30f;  // a block of smaller numbers is zeros

// The rows of a call: places in memory, and which scale a weight has.
struct Stored {
  const uint8_t* data;
  const float* scales;
  int64_t width, shift;

  Stored() = default;
  Stored(const Int4Rows& w, int64_t row)
      : data(w.data + row * w.width / 2),
        scales(w.scales + (row * w.width >> w.group_shift)),
        width(w.width),
        shift(w.group_shift) {}
  float scale(int64_t at) const { return scales[at >> shift]; }
};

// row . x in integers a block, with what every compiler has.
struct Plain {
  float operator()(const Stored& row, const RoundedVectors::Vector& x) const {
    Vector<float, 4> sums{};
    for (int64_t at = 0; at < row.width; at += kBlock) {
      // At most 8 * 127, four times: it fits sixteen bits.
      Vector<int16_t, 8> products{};
      for (int64_t byte = at / 2; byte < at / 2 + 16; byte += 8) {
        const auto pairs = wide(loaded<Vector<uint8_t, 8>>(row.data + byte));
        products += ((pairs & 15) - kWideEight) * wide(loaded<Vector<int8_t, 8>>(x.low + byte));
        products += ((pairs >> 4) - kWideEight) * wide(loaded<Vector<int8_t, 8>>(x.high + byte));
      }
      Vector<int16_t, 4> halves[2];
      std::memcpy(halves, &products, sizeof(products));
      const auto whole = __builtin_convertvector(halves[0], Vector<int32_t, 4>) +
                         __builtin_convertvector(halves[1], Vector<int32_t, 4>);
      sums += __builtin_convertvector(whole, Vector<float, 4>) * (row.scale(at) * x.scales[at / 8]);
    }
    return sums_of<4, 1>(&sums)[0];
  }

 private:
  static constexpr int16_t kWideEight = kEight;
  template <typename Bytes>
  static Vector<int16_t, 8> wide(const Bytes& bytes) {
    return __builtin_convertvector(bytes, Vector<int16_t, 8>);
  }
};

template <typename Dot>
POPJAX_INLINE void each(const RoundedInt4Rows& w, const int64_t* rows, int64_t count,
                        int64_t vectors, float* out, int64_t row_stride, int64_t vector_stride,
                        const Dot& dot) {
  for (int64_t i = 0; i < count; ++i) {
    const Stored row(w.rows, rows[i]);
    for (int64_t v = 0; v < vectors; ++v) {
      out[i * row_stride + v * vector_stride] = dot(row, w.x->of(v));
    }
  }
}

#if defined(__x86_64__)

#define POPJAX_AVX2 __attribute__((target("avx2,fma")))
#define POPJAX_VNNI \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")))

// out[r * stride] = the sum of vector r of `R` with `N` floats each. No wide vector crosses a call:
// Clang refuses one between functions of different instruction sets.
template <int N, int R>
POPJAX_INLINE void add_up(const void* vectors, float* out, int64_t stride) {
  Vector<float, N> parts[R];
  std::memcpy(parts, vectors, sizeof(parts));
  const Vector<float, N> together = sums_of<N, R>(parts);
  for (int r = 0; r < R; ++r) out[r * stride] = together[r];
}

// Two blocks, 32 bytes of a row, at a time.
POPJAX_AVX2 float dot_avx2(const Stored& row, const RoundedVectors::Vector& x) {
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256 sums = _mm256_setzero_ps();
  for (int64_t at = 0; at < row.width; at += 2 * kBlock) {
    const bool both = at + kBlock < row.width;
    const auto* from = reinterpret_cast<const __m128i*>(row.data + at / 2);
    const __m256i pairs = both ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                               : _mm256_zextsi128_si256(_mm_loadu_si128(from));
    const auto* low = reinterpret_cast<const __m256i*>(x.low + at / 2);
    const auto* high = reinterpret_cast<const __m256i*>(x.high + at / 2);
    // At most 15 * 127, four times: it fits sixteen bits.
    const __m256i products = _mm256_add_epi16(
        _mm256_maddubs_epi16(_mm256_and_si256(pairs, nibble), _mm256_loadu_si256(low)),
        _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(pairs, 4), nibble),
                             _mm256_loadu_si256(high)));
    const auto* offsets = reinterpret_cast<const __m256i*>(x.offsets + at / 8);
    const __m256i whole =
        _mm256_add_epi32(_mm256_madd_epi16(products, ones), _mm256_loadu_si256(offsets));
    const float first = row.scale(at);
    const __m256 scales =
        _mm256_set_m128(_mm_set1_ps(both ? row.scale(at + kBlock) : first), _mm_set1_ps(first));
    sums = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole),
                           _mm256_mul_ps(scales, _mm256_loadu_ps(x.scales + at / 8)), sums);
  }
  float sum;
  add_up<8, 1>(&sums, &sum, 1);
  return sum;
}

// Which of the scales of a step each lane has.
POPJAX_VNNI inline __m512i lane_scales(int64_t shift) {
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_srl_epi32(lanes, _mm_cvtsi64_si128(std::min<int64_t>(shift - 5, 2)));
}

// Rows between those worked and those asked for: short as they are, four would come too late.
constexpr int64_t kAhead = 16;

// sums[r] += row r . x in the `here` numbers from `at` on: four blocks, 64 bytes of a row, or fewer
// at its end, which masks tell. What lies kAhead rows further on is asked for meanwhile, since
// scouts are read whole: addresses of listed rows would need more registers than there are.
template <int R, bool Whole>
POPJAX_VNNI POPJAX_INLINE void step_vnni(const Stored* rows, const RoundedVectors::Vector& x,
                                         int64_t at, int64_t here, __m512i places, __m512* sums) {
  const __m512i nibble = _mm512_set1_epi8(15);
  const __mmask64 bytes = ~uint64_t{0} >> (64 - here / 2);
  const int64_t shift = rows[0].shift, groups = (here + (int64_t{1} << shift) - 1) >> shift;
  const int64_t group = at >> shift, ahead = kAhead * rows[0].width;
  const bool new_line = (at & ((16 << shift) - 1)) == 0;  // of scales
  const auto few = static_cast<__mmask8>((1 << groups) - 1);
  const __m512i low = _mm512_loadu_si512(x.low + at / 2);
  const __m512i high = _mm512_loadu_si512(x.high + at / 2);
  const __m512i offsets = _mm512_loadu_si512(x.offsets + at / 8);
  const __m512 of_x = _mm512_loadu_ps(x.scales + at / 8);
  POPJAX_UNROLL
  for (int r = 0; r < R; ++r) {
    const uint8_t* data = rows[r].data + at / 2;
    const float* scale = rows[r].scales + group;
    __builtin_prefetch(data + ahead / 2, 0, 2);
    if (new_line) __builtin_prefetch(scale + (ahead >> shift), 0, 2);
    const __m512i pairs = Whole ? _mm512_loadu_si512(data) : _mm512_maskz_loadu_epi8(bytes, data);
    __m512i whole = _mm512_dpbusd_epi32(offsets, _mm512_and_si512(pairs, nibble), low);
    whole = _mm512_dpbusd_epi32(whole, _mm512_and_si512(_mm512_srli_epi16(pairs, 4), nibble), high);
    const __m128 held = _mm_maskz_loadu_ps(few, scale);
    const __m512 scales = _mm512_permutexvar_ps(places, _mm512_castps128_ps512(held));
    sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), _mm512_mul_ps(scales, of_x), sums[r]);
  }
}

// out[r * row_stride + v * vector_stride] = row rows[r] . x[v], for R rows.
template <int R>
POPJAX_VNNI POPJAX_INLINE void rows_vnni(const RoundedInt4Rows& w, const int64_t* rows,
                                         int64_t vectors, __m512i places, float* out,
                                         int64_t row_stride, int64_t vector_stride) {
  Stored held[R];
  for (int r = 0; r < R; ++r) held[r] = Stored(w.rows, rows[r]);
  for (int64_t v = 0; v < vectors; ++v) {
    const RoundedVectors::Vector x = w.x->of(v);
    __m512 sums[R];
    POPJAX_UNROLL
    for (int r = 0; r < R; ++r) sums[r] = _mm512_setzero_ps();
    int64_t at = 0;
    for (; at + kStep <= w.rows.width; at += kStep) {
      step_vnni<R, true>(held, x, at, kStep, places, sums);
    }
    if (at < w.rows.width) step_vnni<R, false>(held, x, at, w.rows.width - at, places, sums);
    // Stored once, so that they stay in registers until here.
    float parts[R * 16];
    POPJAX_UNROLL
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(parts + r * 16, sums[r]);
    add_up<16, R>(parts, out + v * vector_stride, row_stride);
  }
}

POPJAX_VNNI void dots_vnni(const RoundedInt4Rows& w, const int64_t* rows, int64_t count,
                           int64_t vectors, float* out, int64_t row_stride, int64_t vector_stride) {
  constexpr int kRows = 4;  // worked at once, so that their sums are folded together
  const __m512i places = lane_scales(w.rows.group_shift);
  int64_t i = 0;
  for (; i + kRows <= count; i += kRows) {
    rows_vnni<kRows>(w, rows + i, vectors, places, out + i * row_stride, row_stride, vector_stride);
  }
  for (; i < count; ++i) {
    rows_vnni<1>(w, rows + i, vectors, places, out + i * row_stride, row_stride, vector_stride);
  }
}

POPJAX_AVX2 void dots_avx2(const RoundedInt4Rows& w, const int64_t* rows, int64_t count,
                           int64_t vectors, float* out, int64_t row_stride, int64_t vector_stride) {
  each(w, rows, count, vectors, out, row_stride, vector_stride, dot_avx2);
}

#endif

}  // namespace

RoundedVectors::RoundedVectors(const float* x, int64_t count, int64_t width)
    : bytes_((width + kStep - 1) / kStep * kStep / 2), lanes_(bytes_ / 4) {
  low_.resize(count * bytes_);
  high_.resize(count * bytes_);
  offsets_.resize(count * lanes_);
  scales_.resize(count * lanes_);
  for (int64_t v = 0; v < count; ++v) {
    for (int64_t b = 0; b < width / kBlock; ++b) round_block(x + v * width + b * kBlock, v, b);
  }
}

void RoundedVectors::round_block(const float* x, int64_t v, int64_t block) {
  float most = 0, none = 0;  // none is NaN where a number is not finite, and so is the scale then
  for (int64_t i = 0; i < kBlock; ++i) {
    most = std::max(most, std::fabs(x[i]));
    none += x[i] * 0.0f;
  }
  const float steps = most >= kLeast ? 127.0f / most : 0.0f;
  const int64_t first = v * bytes_ + block * 16;
  int8_t* halves[2] = {low_.data() + first, high_.data() + first};
  int32_t* offsets = offsets_.data() + v * lanes_ + block * 4;
  float* scales = scales_.data() + v * lanes_ + block * 4;
  for (int64_t i = 0; i < kBlock; ++i) {
    const auto rounded = static_cast<int8_t>(std::lrintf(x[i] * steps));
    halves[i / 16][i % 16] = rounded;
    offsets[i % 16 / 4] -= kEight * rounded;
  }
  std::fill(scales, scales + 4, most * (1.0f / 127.0f) + none);
}

void dot_rows(const RoundedInt4Rows& w, const int64_t* rows, int64_t count, const float*,
              int64_t vectors, float* out, int64_t row_stride, int64_t vector_stride) {
#if defined(__x86_64__)
  if (isa() == Isa::kVnni) {
    return dots_vnni(w, rows, count, vectors, out, row_stride, vector_stride);
  }
  if (isa() != Isa::kPlain) {
    return dots_avx2(w, rows, count, vectors, out, row_stride, vector_stride);
  }
#endif
  each(w, rows, count, vectors, out, row_stride, vector_stride, Plain());
}

}  // namespace popjax
