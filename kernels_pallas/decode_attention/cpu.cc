// Attention of one new token a row over its cache, reading only the slots that it may see.
//
// Keys and values lie apart, in slots of one number for all heads.

#include <cstdint>

#include "native/attend.h"
#include "native/buffers.h"
#include "native/rows.h"
#include "native/team.h"

namespace popjax {
namespace {

struct Shape {
  int64_t batch, heads, groups, slots, size;  // B, K, G, S, H
  int64_t window;                             // 0: none
  Scoring scoring;
  const int32_t* query_positions;  // [B]
  const int32_t* key_positions;    // [B, S]
};

template <typename W>
void attention(const Shape& shape, const W& keys, const W& values, const float* q, float* out,
               Team& team) {
  const int64_t heads = shape.batch * shape.heads, size = shape.size;
  Pieces pieces;
  for (int64_t head = 0; head < heads; ++head) pieces.add(head, 0, 0, shape.slots);
  const Queries queries(q, heads, shape.groups, size);
  const auto query_of = [&](int64_t head) {
    const int64_t position = shape.query_positions[head / shape.heads];
    return queries.of(head, position, shape.window, shape.scoring);
  };
  const auto work = [&](const Query& query, const Pieces::Piece& piece, Part part) {
    Slots<W> slots{keys, values, shape.key_positions + piece.head / shape.heads * shape.slots, 1};
    slots.keys.data += piece.head * shape.slots * size;
    slots.values.data += piece.head * shape.slots * size;
    attend(query, slots, piece.first, piece.end, part);
  };
  pieces.run(queries, query_of, work, out, team);
}

ffi::Error decode_attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k,
                            ffi::AnyBuffer v, ffi::Buffer<ffi::S32> query_positions,
                            ffi::Buffer<ffi::S32> key_positions, ffi::Result<ffi::AnyBuffer> out,
                            int64_t window, float softcap, float scale) {
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
  shape.window = window, shape.scoring = {scale, softcap};
  shape.query_positions = query_positions.typed_data();
  shape.key_positions = key_positions.typed_data();
  const Activations in(q);
  Result result(*out);
  Team team(pool, dim(k, 0) * (shape.slots / kPiece + 1));
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
                                  .Attr<float>("softcap")
                                  .Attr<float>("scale"));

}  // namespace popjax
