// Attention of one new token a row over a range of a pool for each KV head, and over a tail.
//
// A pool row is a key and its value side by side, so a range is one stream of memory: the keys of a
// block of rows are read, then their values, which have come along.

#include <cstdint>
#include <string>

#include "native/attend.h"
#include "native/buffers.h"
#include "native/rows.h"
#include "native/team.h"

namespace popjax {
namespace {

enum Source { kPool, kTail };

struct Shape {
  int64_t batch, heads, groups, size;  // B, K, G, H
  int64_t entries, slots;              // E, M
  int64_t window;                      // 0: none
  Scoring scoring;
  const int32_t *starts, *lengths;  // [B, K]
  const int32_t* positions;         // [E]
  const int32_t* query_positions;   // [B]
  const int32_t* tail_positions;    // [B, M]

  int64_t cells() const { return batch * heads; }
  // Whether each range lies in the pool.
  bool fits() const {
    for (int64_t i = 0; i < cells(); ++i) {
      const int64_t start = starts[i], length = lengths[i];
      if (start < 0 || length < 0 || start + length > entries) return false;
    }
    return true;
  }
};

template <typename W>
void attention(const Shape& shape, const W& pool, const W& tail_k, const W& tail_v, const float* q,
               float* out, ffi::ThreadPool threads) {
  const int64_t size = shape.size, slots = shape.slots;
  Pieces pieces;
  for (int64_t i = 0; i < shape.cells(); ++i) {
    const int64_t start = shape.starts[i];
    pieces.add(i, kPool, start, start + shape.lengths[i]);
    pieces.add(i, kTail, 0, slots);
  }
  const Queries queries(q, shape.cells(), shape.groups, size);
  const auto query_of = [&](int64_t head) {
    const int64_t position = shape.query_positions[head / shape.heads];
    return queries.of(head, position, shape.window, shape.scoring);
  };
  // The pool as rows of H numbers: keys at even rows, values after them.
  Slots<W> held{pool, pool, shape.positions, 2};
  held.values.data += size;
  const auto work = [&](const Query& query, const Pieces::Piece& piece, Part part) {
    if (piece.source == kPool) return attend(query, held, piece.first, piece.end, part);
    Slots<W> tail{tail_k, tail_v, shape.tail_positions + piece.head / shape.heads * slots, 1};
    tail.keys.data += piece.head * slots * size;
    tail.values.data += piece.head * slots * size;
    attend(query, tail, piece.first, piece.end, part);
  };
  Team team(threads, pieces.count());
  pieces.run(queries, query_of, work, out, team);
}

template <typename W, typename T>
W rows_of(const ffi::AnyBuffer& buffer, int64_t width) {
  return W{static_cast<const T*>(buffer.untyped_data()), width};
}

bool is_half(const ffi::AnyBuffer& buffer) {  // or its bits
  return buffer.element_type() == ffi::BF16 || buffer.element_type() == ffi::U16;
}

bool is_float(const ffi::AnyBuffer& buffer) {
  return buffer.element_type() == ffi::F32;
}

using Whole = ffi::Buffer<ffi::S32>;

bool agree(const ffi::AnyBuffer& q, const ffi::AnyBuffer& entries, const Whole& positions,
           const Whole& starts, const Whole& lengths, const ffi::AnyBuffer& tail_k,
           const Whole& query_positions, const Whole& tail_positions) {
  const int64_t batch = dim(q, 0), size = dim(q, 2), cells = starts.element_count();
  const int64_t slots = tail_positions.dimensions()[1];
  return is_activation(q) && cells > 0 && starts.dimensions()[0] == batch &&
         dim(q, 1) % (cells / batch) == 0 && lengths.dimensions() == starts.dimensions() &&
         dim(entries, 1) == 2 * size && positions.dimensions()[0] == dim(entries, 0) &&
         dim(tail_k, 0) == cells && dim(tail_k, 1) == slots && dim(tail_k, 2) == size &&
         query_positions.dimensions()[0] == batch && tail_positions.dimensions()[0] == batch;
}

ffi::Error ragged_decode(ffi::ThreadPool threads, ffi::AnyBuffer q, ffi::AnyBuffer entries,
                         Whole positions, Whole starts, Whole lengths, ffi::AnyBuffer tail_k,
                         ffi::AnyBuffer tail_v, Whole query_positions, Whole tail_positions,
                         ffi::Result<ffi::AnyBuffer> out, int64_t window, float softcap,
                         float scale) {
  const bool alike =
      agree(q, entries, positions, starts, lengths, tail_k, query_positions, tail_positions);
  if (!alike || tail_v.element_count() != tail_k.element_count()) {
    return invalid(
        "ragged attention needs q [B,N,H], entries [E,2H], positions [E], starts and lengths "
        "[B,K], tails [B*K,M,H] with N a multiple of K, and positions [B] and [B,M]");
  }
  Shape shape{};
  shape.batch = starts.dimensions()[0], shape.heads = starts.dimensions()[1];
  shape.groups = dim(q, 1) / shape.heads, shape.size = dim(q, 2);
  shape.entries = dim(entries, 0), shape.slots = tail_positions.dimensions()[1];
  shape.window = window, shape.scoring = {scale, softcap};
  shape.starts = starts.typed_data(), shape.lengths = lengths.typed_data();
  shape.positions = positions.typed_data();
  shape.query_positions = query_positions.typed_data();
  shape.tail_positions = tail_positions.typed_data();
  if (!shape.fits()) {
    return invalid("a range of ragged attention leaves its pool of " +
                   std::to_string(shape.entries) + " entries");
  }
  const Activations in(q);
  Result result(*out);
  const int64_t size = shape.size;
  if (is_float(entries) && is_float(tail_k) && is_float(tail_v)) {
    attention(shape, rows_of<F32Rows, float>(entries, size), rows_of<F32Rows, float>(tail_k, size),
              rows_of<F32Rows, float>(tail_v, size), in.data(), result.data(), threads);
  } else if (is_half(entries) && is_half(tail_k) && is_half(tail_v)) {
    attention(shape, rows_of<Bf16Rows, uint16_t>(entries, size),
              rows_of<Bf16Rows, uint16_t>(tail_k, size), rows_of<Bf16Rows, uint16_t>(tail_v, size),
              in.data(), result.data(), threads);
  } else {
    return invalid("ragged attention needs entries and tail all float32 or all bfloat16");
  }
  result.store();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(popjax_ragged_decode, ragged_decode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("window")
                                  .Attr<float>("softcap")
                                  .Attr<float>("scale"));

}  // namespace popjax
