// expand: y[n, i] = x[n] . w[rows[i]]        contract: y[n] = sum over i of h[n, i] w[rows[i]]
//
// Rows that nobody named are not read. Without a list the rows are all, in their order.

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "native/buffers.h"
#include "native/rows.h"
#include "native/sums.h"
#include "native/team.h"

namespace popjax {
namespace {

// Which rows each vector uses: lists [1 or N, capacity] of which the first counts[.] are valid.
struct RowSets {
  int64_t sets, capacity;
  std::vector<int64_t> counts;
  std::vector<int64_t> rows;  // [sets, capacity]

  const int64_t* of(int64_t set) const { return rows.data() + set * capacity; }
};

ffi::Error read_sets(const ffi::AnyBuffer& rows, const ffi::AnyBuffer& counts, int64_t size,
                     RowSets& out) {
  if (dim(rows, 0) == 0) {
    out = {1, size, {size}, std::vector<int64_t>(size)};
    for (int64_t i = 0; i < size; ++i) out.rows[i] = i;
    return ffi::Error::Success();
  }
  if (dim(counts, 0) != dim(rows, 0)) return invalid("each list of rows needs a count");
  const auto* index = static_cast<const int32_t*>(rows.untyped_data());
  const auto* count = static_cast<const int32_t*>(counts.untyped_data());
  out.sets = dim(rows, 0);
  out.capacity = dim(rows, 1);
  out.rows.assign(out.sets * out.capacity, 0);
  std::vector<uint8_t> seen(size);
  for (int64_t s = 0; s < out.sets; ++s) {
    if (count[s] < 0 || count[s] > out.capacity) {
      return invalid("count " + std::to_string(count[s]) + " is outside 0.." +
                     std::to_string(out.capacity));
    }
    out.counts.push_back(count[s]);
    for (int64_t i = 0; i < count[s]; ++i) {
      const int64_t row = index[s * out.capacity + i];
      if (row < 0 || row >= size) {
        return invalid("row " + std::to_string(row) + " is outside 0.." + std::to_string(size - 1));
      }
      if (seen[row]++) return invalid("row " + std::to_string(row) + " is named twice");
      out.rows[s * out.capacity + i] = row;
    }
    // Only what was marked: a matrix may have far more rows than a list names.
    for (int64_t i = 0; i < count[s]; ++i) seen[out.rows[s * out.capacity + i]] = 0;
  }
  return ffi::Error::Success();
}

template <typename W>
void expand_into(const W& w, const RowSets& sets, const float* x, int64_t vectors, float* y,
                 Team& team) {
  const int64_t step = rows_a_piece(sets.capacity, w.width);
  const int64_t pieces = (sets.capacity + step - 1) / step;
  const int64_t together = vectors / sets.sets;  // vectors that share a list
  team.run(pieces * sets.sets, [&](int64_t piece) {
    const int64_t set = piece / pieces, first = piece % pieces * step;
    const int64_t end = std::min(first + step, sets.capacity);
    const int64_t valid = std::max(first, std::min(end, sets.counts[set]));
    float* out = y + set * together * sets.capacity;
    dot_rows(w, sets.of(set) + first, valid - first, x + set * together * w.width, together,
             out + first, 1, sets.capacity);
    for (int64_t v = 0; v < together; ++v) {
      std::fill(out + v * sets.capacity + valid, out + v * sets.capacity + end, 0.0f);
    }
  });
}

template <typename W>
void contract_into(const W& w, const RowSets& sets, const float* h, int64_t vectors, float* y,
                   Team& team) {
  const int64_t together = vectors / sets.sets;
  const PartialSums partial(sets.capacity, vectors, w.width);
  team.run(partial.pieces() * sets.sets, [&](int64_t piece) {
    const int64_t set = piece / partial.pieces(), part = piece % partial.pieces();
    const int64_t first = partial.begin(part);
    const int64_t end = std::min(partial.begin(part + 1), sets.counts[set]);
    float* out = partial.cleared(part, set * together, together);
    if (first >= end) return;
    add_rows(w, sets.of(set) + first, end - first, h + set * together * sets.capacity + first, 1,
             sets.capacity, together, out);
  });
  partial.add_up(y, team);
}

ffi::Error check(const ffi::AnyBuffer& x, const ffi::AnyBuffer& y, int64_t vectors,
                 const RowSets& sets) {
  if (!is_activation(x) || !is_activation(y)) return invalid("vectors are not float32 or bfloat16");
  if (vectors % sets.sets != 0) return invalid("give one list of rows, or one a vector");
  return ffi::Error::Success();
}

ffi::Error expand(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::AnyBuffer scales,
                  ffi::AnyBuffer rows, ffi::AnyBuffer counts, ffi::Result<ffi::AnyBuffer> y) {
  RowSets sets;
  if (auto error = read_sets(rows, counts, dim(w, 0), sets); error.failure()) return error;
  if (auto error = check(x, *y, dim(x, 0), sets); error.failure()) return error;
  const Activations in(x);
  Result out(*y);
  return with_rows(w, scales, dim(x, 1), [&](auto matrix) {
    Team team(pool, kPieces * sets.sets);
    expand_into(matrix, sets, in.data(), dim(x, 0), out.data(), team);
    out.store();
    return ffi::Error::Success();
  });
}

ffi::Error contract(ffi::ThreadPool pool, ffi::AnyBuffer h, ffi::AnyBuffer w, ffi::AnyBuffer scales,
                    ffi::AnyBuffer rows, ffi::AnyBuffer counts, ffi::Result<ffi::AnyBuffer> y) {
  RowSets sets;
  if (auto error = read_sets(rows, counts, dim(w, 0), sets); error.failure()) return error;
  if (auto error = check(h, *y, dim(h, 0), sets); error.failure()) return error;
  if (dim(h, 1) != sets.capacity) {
    return invalid("vectors of " + std::to_string(dim(h, 1)) + " do not fit lists of " +
                   std::to_string(sets.capacity) + " rows");
  }
  const Activations in(h);
  Result out(*y);
  return with_rows(w, scales, dim(*y, 1), [&](auto matrix) {
    Team team(pool, kPieces * sets.sets);
    contract_into(matrix, sets, in.data(), dim(h, 0), out.data(), team);
    out.store();
    return ffi::Error::Success();
  });
}

// Several matrices against the same vectors in one call: a query, key and value projection.
ffi::Error expand_many(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs weights,
                       ffi::RemainingRets results) {
  const Activations in(x);
  Team team(pool, pool.num_threads());
  for (size_t i = 0; i < weights.size(); ++i) {
    auto w = weights.get<ffi::AnyBuffer>(i);
    auto y = results.get<ffi::AnyBuffer>(i);
    if (w.has_error()) return w.error();
    if (y.has_error()) return y.error();
    if (!is_activation(x) || !is_activation(**y)) {
      return invalid("vectors are not float32 or bfloat16");
    }
    Result out(**y);
    const int64_t vectors = dim(x, 0), rows = dim(*w, 0);
    const auto done = with_rows(*w, *w, dim(x, 1), [&](auto matrix) {
      const int64_t step = rows_a_piece(rows, matrix.width);
      team.run((rows + step - 1) / step, [&](int64_t piece) {
        const int64_t first = piece * step, count = std::min(step, rows - first);
        std::vector<int64_t> index(count);
        for (int64_t k = 0; k < count; ++k) index[k] = first + k;
        dot_rows(matrix, index.data(), count, in.data(), vectors, out.data() + first, 1, rows);
      });
      out.store();
      return ffi::Error::Success();
    });
    if (done.failure()) return done;
  }
  return ffi::Error::Success();
}

// The sum of the named rows of a matrix, or of all: what reading costs when nothing else is done.
ffi::Error read(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> data, ffi::BufferR1<ffi::S32> rows,
                ffi::Result<ffi::Buffer<ffi::F32>> total) {
  const int64_t all = data.dimensions()[0], width = data.dimensions()[1], pieces = 4 * kPieces;
  const int64_t named = rows.element_count();
  const float* from = data.typed_data();
  const int32_t* index = rows.typed_data();
  for (int64_t i = 0; i < named; ++i) {
    if (index[i] < 0 || index[i] >= all) {
      return invalid("row " + std::to_string(index[i]) + " is outside 0.." +
                     std::to_string(all - 1));
    }
  }
  std::vector<float> sums(pieces);
  Team team(pool, pieces);
  team.run(pieces, [&](int64_t piece) {
    const int64_t size = named > 0 ? named : all;
    const int64_t first = size * piece / pieces, end = size * (piece + 1) / pieces;
    if (named == 0) sums[piece] = sum_of(from + first * width, (end - first) * width);
    for (int64_t i = first; named > 0 && i < end; ++i) {
      sums[piece] += sum_of(from + index[i] * width, width);
    }
  });
  float sum = 0;
  for (const float part : sums) sum += part;
  total->typed_data()[0] = sum;
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(popjax_expand, expand,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(popjax_contract, contract,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    popjax_expand_many, expand_many,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().RemainingArgs().RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(popjax_read, read,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

}  // namespace popjax
