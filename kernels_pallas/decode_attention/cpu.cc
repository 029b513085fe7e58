// Attention of one new token a row over its cache, reading only the slots that it may see.
//
// The slots of a head are cut into blocks of fixed size, each with its own maximum and sums, merged
// in their order: the result does not depend on threads, nor on the batch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "native/buffers.h"
#include "native/rows.h"
#include "native/team.h"

namespace popjax {
namespace {

constexpr int64_t kBlock = 256;  // slots of one piece

struct Shape {
  int64_t batch, heads, groups, slots, size;  // B, K, G, S, H
  int64_t window;                             // 0: none
  float scale;
  const int32_t* query_positions;  // [B]
  const int32_t* key_positions;    // [B, S]

  bool sees(int64_t row, int64_t slot) const {
    const int64_t key = key_positions[row * slots + slot], query = query_positions[row];
    return key >= 0 && key <= query && (window == 0 || query - key < window);
  }
};

// What a block of slots adds to each query of its group: exp(score - top) summed, and times v.
struct Part {
  std::vector<float> top, total, values;  // [G], [G], [G, H]
};

template <typename W>
Part attend(const Shape& shape, const W& keys, const W& values, const float* q, int64_t row,
            int64_t first, int64_t end) {
  const int64_t g = shape.groups;
  Part part{std::vector<float>(g, -std::numeric_limits<float>::infinity()), std::vector<float>(g),
            std::vector<float>(g * shape.size)};
  std::vector<int64_t> slots;
  for (int64_t s = first; s < end; ++s) {
    if (shape.sees(row, s)) slots.push_back(s);
  }
  const auto count = static_cast<int64_t>(slots.size());
  std::vector<float> scores(count * g);
  dot_rows(keys, slots.data(), count, q, g, scores.data(), g, 1);
  for (int64_t i = 0; i < count * g; ++i) {
    scores[i] *= shape.scale;
    part.top[i % g] = std::max(part.top[i % g], scores[i]);
  }
  for (int64_t i = 0; i < count * g; ++i) {
    scores[i] = std::exp(scores[i] - part.top[i % g]);
    part.total[i % g] += scores[i];
  }
  add_rows(values, slots.data(), count, scores.data(), g, 1, g, part.values.data());
  return part;
}

// out [G, H] of the parts of one head. A query that sees nothing gets zeros.
void merge(const Shape& shape, const Part* parts, int64_t count, float* out) {
  for (int64_t g = 0; g < shape.groups; ++g) {
    float top = -std::numeric_limits<float>::infinity(), total = 0;
    for (int64_t i = 0; i < count; ++i) top = std::max(top, parts[i].top[g]);
    float* to = out + g * shape.size;
    std::fill(to, to + shape.size, 0.0f);
    for (int64_t i = 0; i < count; ++i) {
      if (parts[i].total[g] == 0.0f) continue;
      const float share = std::exp(parts[i].top[g] - top);
      total += share * parts[i].total[g];
      const float* from = parts[i].values.data() + g * shape.size;
      for (int64_t d = 0; d < shape.size; ++d) to[d] += share * from[d];
    }
    if (total != 0.0f) {
      for (int64_t d = 0; d < shape.size; ++d) to[d] /= total;
    }
  }
}

template <typename W>
void attention(const Shape& shape, const W& keys, const W& values, const float* q, float* out,
               Team& team) {
  const int64_t heads = shape.batch * shape.heads, g = shape.groups, size = shape.size;
  const int64_t blocks = (shape.slots + kBlock - 1) / kBlock;
  std::vector<Part> parts(heads * blocks);
  team.run(heads * blocks, [&](int64_t piece) {
    const int64_t head = piece / blocks, first = piece % blocks * kBlock;
    W k = keys, v = values;
    k.data += head * shape.slots * size;
    v.data += head * shape.slots * size;
    parts[piece] = attend(shape, k, v, q + head * g * size, head / shape.heads, first,
                          std::min(first + kBlock, shape.slots));
  });
  for (int64_t head = 0; head < heads; ++head) {
    merge(shape, parts.data() + head * blocks, blocks, out + head * g * size);
  }
}

ffi::Error decode_attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k,
                            ffi::AnyBuffer v, ffi::Buffer<ffi::S32> query_positions,
                            ffi::Buffer<ffi::S32> key_positions, ffi::Result<ffi::AnyBuffer> out,
                            int64_t window, float scale) {
  if (!is_activation(q) || k.element_type() != v.element_type()) {
    return invalid("attention needs float32 or bfloat16 queries, and keys and values alike");
  }
  const int64_t rows = dim(q, 0), cells = rows * dim(k, 1);
  if (rows == 0 || dim(k, 0) == 0 || dim(k, 0) % rows != 0 || dim(q, 1) % (dim(k, 0) / rows) != 0 ||
      dim(k, 2) != dim(q, 2) || v.element_count() != k.element_count() ||
      static_cast<int64_t>(query_positions.element_count()) != rows ||
      static_cast<int64_t>(key_positions.element_count()) != cells) {
    return invalid(
        "attention needs q [B,N,H], k and v [B*K,S,H] with N a multiple of K, and positions [B] "
        "and [B,S]");
  }
  Shape shape{};
  shape.batch = dim(q, 0), shape.heads = dim(k, 0) / shape.batch;
  shape.groups = dim(q, 1) / shape.heads, shape.slots = dim(k, 1), shape.size = dim(k, 2);
  shape.window = window, shape.scale = scale;
  shape.query_positions = query_positions.typed_data();
  shape.key_positions = key_positions.typed_data();
  const Activations in(q);
  Result result(*out);
  Team team(pool, dim(k, 0) * (shape.slots / kBlock + 1));
  const auto run = [&](auto keys, auto values) {
    attention(shape, keys, values, in.data(), result.data(), team);
    result.store();
    return ffi::Error::Success();
  };
  if (k.element_type() == ffi::F32) {
    return run(F32Rows{static_cast<const float*>(k.untyped_data()), shape.size},
               F32Rows{static_cast<const float*>(v.untyped_data()), shape.size});
  }
  if (k.element_type() == ffi::BF16 || k.element_type() == ffi::U16) {  // or its bits
    return run(Bf16Rows{static_cast<const uint16_t*>(k.untyped_data()), shape.size},
               Bf16Rows{static_cast<const uint16_t*>(v.untyped_data()), shape.size});
  }
  return invalid("keys and values are neither float32 nor bfloat16");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(popjax_decode_attention, decode_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale"));

}  // namespace popjax
