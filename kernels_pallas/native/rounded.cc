// Rows of few bits times rounded vectors, once for each instruction set. See rounded.h.

#include "native/rounded.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

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

constexpr int64_t kBlock = RoundedVectors::kBlock;
constexpr float kLeast = 1e-30f;  // a block of smaller numbers is zeros
// What the offsets of vectors, which are those of four-bit rows, count for others: 2 to that power.
template <typename W>
constexpr int kOffsets = W::kZero == Int4Rows::kZero ? 0 : 2;
static_assert(Int6Rows::kZero == Int4Rows::kZero << kOffsets<Int6Rows>);

template <typename W>
constexpr bool kSix = std::is_same_v<W, Int6Rows>;

// A row of a call: its place in memory, and which scale a weight has.
template <typename W>
struct Stored {
  const uint8_t* data;
  const float* scales;
  int64_t width, shift;

  Stored() = default;
  Stored(const W& w, int64_t row)
      : data(w.data + row * w.width / kBlock * W::kBlockBytes),
        scales(w.scales + (row * w.width >> w.group_shift)),
        width(w.width),
        shift(w.group_shift) {}
  float scale(int64_t at) const { return scales[at >> shift]; }
  const uint8_t* block(int64_t at) const { return data + at / kBlock * W::kBlockBytes; }
};

// row . x in integers a block, with what every compiler has.
struct Plain {
  template <typename W>
  float operator()(const Stored<W>& row, const RoundedVectors::Vector& x) const {
    Vector<float, 4> sums{};
    for (int64_t at = 0; at < row.width; at += kBlock) {
      const uint8_t* block = row.block(at);
      // At most 32 * 127, four times: it fits sixteen bits.
      Vector<int16_t, 8> products{};
      for (int64_t byte = 0; byte < 16; byte += 8) {
        const auto pairs = wide(loaded<Vector<uint8_t, 8>>(block + byte));
        auto low = pairs & 15, high = pairs >> 4;
        if constexpr (kSix<W>) {
          const auto lower = wide(loaded<Vector<uint8_t, 8>>(block + 16)) >> (byte / 8 * 2);
          low = (low << 2) | (lower & 3), high = (high << 2) | ((lower >> 4) & 3);
        }
        products += (low - kZero<W>)*wide(loaded<Vector<int8_t, 8>>(x.low + at / 2 + byte));
        products += (high - kZero<W>)*wide(loaded<Vector<int8_t, 8>>(x.high + at / 2 + byte));
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
  template <typename W>
  static constexpr int16_t kZero = W::kZero;
  template <typename Bytes>
  static Vector<int16_t, 8> wide(const Bytes& bytes) {
    return __builtin_convertvector(bytes, Vector<int16_t, 8>);
  }
};

template <typename W, typename Dot>
POPJAX_INLINE void each(const Rounded<W>& w, const int64_t* rows, int64_t count, int64_t vectors,
                        float* out, int64_t row_stride, int64_t vector_stride, const Dot& dot) {
  for (int64_t i = 0; i < count; ++i) {
    const Stored<W> row(w.rows, rows[i]);
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

// The stored weights of two blocks, or of one where `both` is false: those that meet the low halves
// of a vector, and those that meet the high ones.
template <typename W>
POPJAX_AVX2 POPJAX_INLINE void weights_avx2(const uint8_t* from, bool both, __m256i* low,
                                            __m256i* high) {
  const __m256i nibble = _mm256_set1_epi8(15);
  const uint8_t* second = from + (both ? W::kBlockBytes : 0);
  const __m256i pairs = _mm256_loadu2_m128i(reinterpret_cast<const __m128i*>(second),
                                            reinterpret_cast<const __m128i*>(from));
  *low = _mm256_and_si256(pairs, nibble);
  *high = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), nibble);
  if constexpr (kSix<W>) {
    const __m256i two = _mm256_set1_epi8(3);
    const __m256i shifts = _mm256_setr_epi64x(0, 2, 0, 2);
    int64_t lower[2];
    std::memcpy(lower, from + 16, 8);
    std::memcpy(lower + 1, second + 16, 8);
    const __m256i held =
        _mm256_srlv_epi64(_mm256_setr_epi64x(lower[0], lower[0], lower[1], lower[1]), shifts);
    *low = _mm256_or_si256(_mm256_slli_epi16(*low, 2), _mm256_and_si256(held, two));
    *high = _mm256_or_si256(_mm256_slli_epi16(*high, 2),
                            _mm256_and_si256(_mm256_srli_epi16(held, 4), two));
  }
}

// Two blocks of a row at a time.
struct DotAvx2 {
  template <typename W>
  POPJAX_AVX2 float operator()(const Stored<W>& row, const RoundedVectors::Vector& x) const {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256 sums = _mm256_setzero_ps();
    for (int64_t at = 0; at < row.width; at += 2 * kBlock) {
      const bool both = at + kBlock < row.width;
      __m256i low, high;
      weights_avx2<W>(row.block(at), both, &low, &high);
      const auto* of_low = reinterpret_cast<const __m256i*>(x.low + at / 2);
      const auto* of_high = reinterpret_cast<const __m256i*>(x.high + at / 2);
      // At most 63 * 127, four times: it fits sixteen bits.
      const __m256i products =
          _mm256_add_epi16(_mm256_maddubs_epi16(low, _mm256_loadu_si256(of_low)),
                           _mm256_maddubs_epi16(high, _mm256_loadu_si256(of_high)));
      const auto* held = reinterpret_cast<const __m256i*>(x.offsets + at / 8);
      const __m256i offsets = _mm256_slli_epi32(_mm256_loadu_si256(held), kOffsets<W>);
      const __m256i whole = _mm256_add_epi32(_mm256_madd_epi16(products, ones), offsets);
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
};

constexpr int64_t kStep = RoundedVectors::kStep;

// Which of the scales of a step each lane has.
POPJAX_VNNI inline __m512i lane_scales(int64_t shift) {
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_srl_epi32(lanes, _mm_cvtsi64_si128(std::min<int64_t>(shift - 5, 2)));
}

// Rows between those worked and those asked for: short as they are, four would come too late.
constexpr int64_t kAhead = 16;

// `count` bytes of 64 from `from` on, zeros after them; with `Whole` all, which no mask tells.
template <bool Whole>
POPJAX_VNNI POPJAX_INLINE __m512i bytes_vnni(const uint8_t* from, int64_t count) {
  if (Whole) return _mm512_loadu_si512(from);
  const __mmask64 mask = count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
  return _mm512_maskz_loadu_epi8(mask, from);
}

// The stored weights of `blocks` blocks, at most four: those that meet the low halves of a vector,
// and those that meet the high ones.
template <typename W, bool Whole>
POPJAX_VNNI POPJAX_INLINE void weights_vnni(const uint8_t* from, int64_t blocks, __m512i* low,
                                            __m512i* high) {
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512i pairs = bytes_vnni<Whole>(from, blocks * W::kBlockBytes);
  if constexpr (kSix<W>) {
    const __m512i two = _mm512_set1_epi8(3), upper = _mm512_set1_epi8(60);
    const __m512i left = bytes_vnni<false>(
        from + 64, Whole ? 32 : std::max<int64_t>(blocks * W::kBlockBytes - 64, 0));
    const __m512i lower = _mm512_srlv_epi64(
        _mm512_permutex2var_epi64(pairs, _mm512_setr_epi64(2, 2, 5, 5, 8, 8, 11, 11), left),
        _mm512_setr_epi64(0, 2, 0, 2, 0, 2, 0, 2));
    pairs = _mm512_permutex2var_epi64(pairs, _mm512_setr_epi64(0, 1, 3, 4, 6, 7, 9, 10), left);
    *low = _mm512_or_si512(_mm512_and_si512(_mm512_slli_epi16(pairs, 2), upper),
                           _mm512_and_si512(lower, two));
    *high = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(pairs, 2), upper),
                            _mm512_and_si512(_mm512_srli_epi16(lower, 4), two));
  } else {
    *low = _mm512_and_si512(pairs, nibble);
    *high = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), nibble);
  }
}

// sums[r] += row r . x in the `here` numbers from `at` on: four blocks of a row, or fewer at its
// end, which masks tell. What lies kAhead rows further on is asked for meanwhile, since scouts are
// read whole: addresses of listed rows would need more registers than there are.
template <int R, bool Whole, typename W>
POPJAX_VNNI POPJAX_INLINE void step_vnni(const Stored<W>* rows, const RoundedVectors::Vector& x,
                                         int64_t at, int64_t here, __m512i places, __m512* sums) {
  const int64_t shift = rows[0].shift, groups = (here + (int64_t{1} << shift) - 1) >> shift;
  const int64_t group = at >> shift, ahead = kAhead * rows[0].width;
  const bool new_line = (at & ((16 << shift) - 1)) == 0;  // of scales
  const auto few = static_cast<__mmask8>((1 << groups) - 1);
  const __m512i of_low = _mm512_loadu_si512(x.low + at / 2);
  const __m512i of_high = _mm512_loadu_si512(x.high + at / 2);
  const __m512i offsets = _mm512_slli_epi32(_mm512_loadu_si512(x.offsets + at / 8), kOffsets<W>);
  const __m512 of_x = _mm512_loadu_ps(x.scales + at / 8);
  POPJAX_UNROLL
  for (int r = 0; r < R; ++r) {
    const uint8_t* data = rows[r].block(at);
    const float* scale = rows[r].scales + group;
    __builtin_prefetch(rows[r].block(at + ahead), 0, 2);
    if constexpr (kSix<W>) __builtin_prefetch(rows[r].block(at + ahead) + 64, 0, 2);
    if (new_line) __builtin_prefetch(scale + (ahead >> shift), 0, 2);
    __m512i low, high;
    weights_vnni<W, Whole>(data, here / kBlock, &low, &high);
    __m512i whole = _mm512_dpbusd_epi32(offsets, low, of_low);
    whole = _mm512_dpbusd_epi32(whole, high, of_high);
    const __m128 held = _mm_maskz_loadu_ps(few, scale);
    const __m512 scales = _mm512_permutexvar_ps(places, _mm512_castps128_ps512(held));
    sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), _mm512_mul_ps(scales, of_x), sums[r]);
  }
}

// out[r * row_stride + v * vector_stride] = row rows[r] . x[v], for R rows.
template <int R, typename W>
POPJAX_VNNI POPJAX_INLINE void rows_vnni(const Rounded<W>& w, const int64_t* rows, int64_t vectors,
                                         __m512i places, float* out, int64_t row_stride,
                                         int64_t vector_stride) {
  Stored<W> held[R];
  for (int r = 0; r < R; ++r) held[r] = Stored<W>(w.rows, rows[r]);
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

template <typename W>
POPJAX_VNNI void dots_vnni(const Rounded<W>& w, const int64_t* rows, int64_t count, int64_t vectors,
                           float* out, int64_t row_stride, int64_t vector_stride) {
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

template <typename W>
POPJAX_AVX2 void dots_avx2(const Rounded<W>& w, const int64_t* rows, int64_t count, int64_t vectors,
                           float* out, int64_t row_stride, int64_t vector_stride) {
  each(w, rows, count, vectors, out, row_stride, vector_stride, DotAvx2());
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
    offsets[i % 16 / 4] -= Int4Rows::kZero * rounded;
  }
  std::fill(scales, scales + 4, most * (1.0f / 127.0f) + none);
}

template <typename W>
void dot_rows(const Rounded<W>& w, const int64_t* rows, int64_t count, const float*,
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

#define POPJAX_ROUNDED(W)                                                                   \
  template void dot_rows(const Rounded<W>&, const int64_t*, int64_t, const float*, int64_t, \
                         float*, int64_t, int64_t);
POPJAX_ROUNDED(Int6Rows)
POPJAX_ROUNDED(Int4Rows)

}  // namespace popjax
