// Attention of the queries of one token, cut into pieces of fixed size for each KV head.
//
// Each piece has its own maximum and sums; those of a head are merged in their order. So a head's
// result depends on its own keys alone: neither on threads, nor on other heads, nor on the batch.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "native/rows.h"
#include "native/softmax.h"
#include "native/team.h"

namespace popjax {

constexpr int64_t kPiece = 512;  // slots of one piece
// Slots whose keys are worked, then their values, while those of the next block are fetched: few
// enough that all of it stays in the caches of a core.
constexpr int64_t kBlock = 64;

// The queries of one KV head, and what they may see.
struct Query {
  const float* values;  // [G, H]
  int64_t groups, size;
  int64_t position, window;  // window 0: none
  Scoring scoring;

  bool sees(int64_t key) const {
    return key >= 0 && key <= position && (window == 0 || position - key < window);
  }
};

// Slots with a position each; the key of slot s is row s * stride of `keys`, its value of `values`.
template <typename W>
struct Slots {
  W keys, values;
  const int32_t* positions;
  int64_t stride;
};

// What slots add to each query: its largest score, exp(score - top) summed, and that times values.
struct Part {
  float *top, *total, *values;  // [G], [G], [G, H]

  static int64_t floats(const Query& query) { return query.groups * (query.size + 2); }

  Part(const Query& query, float* data)
      : top(data), total(top + query.groups), values(total + query.groups) {}

  void clear(const Query& query) {
    std::fill(top, total, -std::numeric_limits<float>::infinity());
    std::fill(total, values + query.groups * query.size, 0.0f);
  }
};

// Up to kBlock slots that are seen, as rows; the places after them repeat the last one.
struct Block {
  int64_t rows[kBlock];
  int64_t count = 0;

  // Takes from slot `first` on, and returns where it stopped.
  template <typename W>
  int64_t fill(const Query& query, const Slots<W>& slots, int64_t first, int64_t end) {
    for (count = 0; first < end && count < kBlock; ++first) {
      rows[count] = first * slots.stride;
      count += query.sees(slots.positions[first]);
    }
    for (int64_t i = std::max<int64_t>(count, 1); i < kBlock && count > 0; ++i) {
      rows[i] = rows[count - 1];
    }
    return first;
  }
};

// Adds a block of slots to `part`, asking memory for those of `next` meanwhile.
template <typename W>
void attend_block(const Query& query, const Slots<W>& slots, const Block& block, const Block& next,
                  float* scores, Part& part) {
  const int64_t size = query.size, count = block.count;
  const int64_t* ahead = next.count > 0 ? next.rows : nullptr;
  dot_rows(slots.keys, block.rows, count, query.values, query.groups, scores, 1, kBlock, ahead);
  for (int64_t g = 0; g < query.groups; ++g) {
    float* of_query = scores + g * kBlock;
    const float top = scale_scores(query.scoring, count, of_query);
    if (top > part.top[g]) {
      const float kept = std::exp(part.top[g] - top);
      part.top[g] = top;
      part.total[g] *= kept;
      for (int64_t d = 0; d < size; ++d) part.values[g * size + d] *= kept;
    }
    part.total[g] += weigh_scores(part.top[g], count, of_query);
  }
  add_rows(slots.values, block.rows, count, scores, 1, kBlock, query.groups, part.values, ahead);
}

// `part` of those of the slots first .. end - 1 that are seen.
template <typename W>
void attend(const Query& query, const Slots<W>& slots, int64_t first, int64_t end, Part part) {
  std::vector<float> scores(query.groups * kBlock);
  part.clear(query);
  Block blocks[2];
  first = blocks[0].fill(query, slots, first, end);
  for (int64_t i = 0; blocks[i % 2].count > 0; ++i) {
    Block& next = blocks[(i + 1) % 2];
    first = next.fill(query, slots, first, end);
    attend_block(query, slots, blocks[i % 2], next, scores.data(), part);
  }
}

// out [groups, H] of the `count` parts of one head, in their order, for its first `groups` queries.
// A query that sees nothing gets zeros.
inline void merge(const Query& query, float* parts, int64_t count, int64_t groups, float* out) {
  const int64_t size = query.size;
  for (int64_t g = 0; g < groups; ++g) {
    float top = -std::numeric_limits<float>::infinity(), total = 0;
    for (int64_t i = 0; i < count; ++i) {
      top = std::max(top, Part(query, parts + i * Part::floats(query)).top[g]);
    }
    float* to = out + g * size;
    std::fill(to, to + size, 0.0f);
    for (int64_t i = 0; i < count; ++i) {
      const Part part(query, parts + i * Part::floats(query));
      if (part.total[g] == 0.0f) continue;
      const float share = std::exp(part.top[g] - top);
      total += share * part.total[g];
      for (int64_t d = 0; d < size; ++d) to[d] += share * part.values[g * size + d];
    }
    if (total != 0.0f) {
      for (int64_t d = 0; d < size; ++d) to[d] /= total;
    }
  }
}

// The queries [heads, G, H] of a call, in groups of a size that is worked fast.
class Queries {
 public:
  Queries(const float* q, int64_t heads, int64_t groups, int64_t size)
      : data_(q),
        heads_(heads),
        groups_(groups),
        worked_(groups % 4 == 3 ? groups + 1 : groups),
        size_(size) {
    if (worked_ == groups) return;  // four are worked at once: a fourth costs less than two and one
    copy_.resize(heads * worked_ * size);
    for (int64_t head = 0; head < heads; ++head) {
      std::copy_n(q + head * groups * size, groups * size, copy_.data() + head * worked_ * size);
    }
    data_ = copy_.data();
  }

  int64_t heads() const { return heads_; }
  int64_t groups() const { return groups_; }
  int64_t size() const { return size_; }
  Query of(int64_t head, int64_t position, int64_t window, const Scoring& scoring) const {
    return {data_ + head * worked_ * size_, worked_, size_, position, window, scoring};
  }

 private:
  const float* data_;
  int64_t heads_, groups_, worked_, size_;
  std::vector<float> copy_;
};

// Slots of every head, cut into pieces of which those of a head follow each other.
class Pieces {
 public:
  struct Piece {
    int64_t head, source, first, end;
  };

  // Slots first .. end - 1 of a head, from the caller's source of that number; heads in order.
  void add(int64_t head, int64_t source, int64_t first, int64_t end) {
    for (; first < end; first += kPiece) {
      pieces_.push_back({head, source, first, std::min(first + kPiece, end)});
    }
  }
  int64_t count() const { return pieces_.size(); }

  // out [heads, G, H]: `work(query, piece, part)` for every piece, then each head's parts merged by
  // whoever finishes its last one. `query_of(head)` is that of a head.
  template <typename QueryOf, typename Work>
  void run(const Queries& queries, const QueryOf& query_of, const Work& work, float* out,
           Team& team) const {
    const int64_t heads = queries.heads();
    std::vector<int64_t> begin(heads + 1);
    for (const Piece& piece : pieces_) ++begin[piece.head + 1];
    for (int64_t head = 0; head < heads; ++head) begin[head + 1] += begin[head];
    const int64_t floats = heads > 0 ? Part::floats(query_of(0)) : 0;
    const std::unique_ptr<float[]> parts(new float[count() * floats]);
    const std::unique_ptr<std::atomic<int64_t>[]> done(new std::atomic<int64_t>[heads]());
    const auto merged = [&](int64_t head) {
      const int64_t groups = queries.groups(), pieces = begin[head + 1] - begin[head];
      merge(query_of(head), parts.get() + begin[head] * floats, pieces, groups,
            out + head * groups * queries.size());
    };
    team.run(count(), [&](int64_t i) {
      const Piece& piece = pieces_[i];
      const Query query = query_of(piece.head);
      work(query, piece, Part(query, parts.get() + i * floats));
      const int64_t all = begin[piece.head + 1] - begin[piece.head];
      if (done[piece.head].fetch_add(1, std::memory_order_acq_rel) + 1 == all) merged(piece.head);
    });
    for (int64_t head = 0; head < heads; ++head) {
      if (begin[head] == begin[head + 1]) merged(head);
    }
  }

 private:
  std::vector<Piece> pieces_;
};

}  // namespace popjax
