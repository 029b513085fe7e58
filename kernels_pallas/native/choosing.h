// Which channels of a feed-forward layer a decode step uses, and of these which are read exactly.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "native/activation.h"
#include "native/select.h"
#include "native/team.h"

namespace popjax {

// In the order of masked_mlp/native.py.
enum class Point : int32_t { kAll, kProduct, kGate, kGiven, kScout };

struct Call {
  int64_t vectors, channels, width;  // N, F, D
  Activation activation;
  Point point;
  bool shared;  // one mask for all vectors
  int64_t keep;
  // Of the chosen by a scout, so many from the weights; of those chosen by the gate, so many go on
  // to down. All where negative.
  int64_t exact;
  std::vector<int64_t> candidates;  // empty where they are all channels in their order
  int64_t size;                     // C
  const float* weight;              // [C] or null
  const float* expected;            // [C] or null: |up| as a score by the gate has it
  const float* threshold;           // [C] or null: chosen by score > threshold instead of by rank
  uint8_t* mask;                    // [1 or N, F], a result

  bool all() const { return candidates.empty(); }
  int64_t mask_rows() const { return shared ? 1 : vectors; }
  const uint8_t* mask_of(int64_t v) const { return mask + (shared ? 0 : v) * channels; }
};

// Whether index[i] = i for all i below `size`.
inline bool counts_up(const int32_t* index, int64_t size) {
  bool same = true;
  versioned([&](auto n) __attribute__((always_inline)) {
    Vector<int32_t, n> expected, other{};
    for (int lane = 0; lane < n; ++lane) expected[lane] = lane;
    int64_t i = 0;
    for (; i + n <= size; i += n, expected += int32_t{n}) {
      other |= loaded<Vector<int32_t, n>>(index + i) ^ expected;
    }
    for (int lane = 0; lane < n; ++lane) same = same && other[lane] == 0;
    for (; i < size; ++i) same = same && index[i] == i;
  });
  return same;
}

// Channels first .. end - 1 that some vector uses.
inline std::vector<int64_t> used_rows(const Call& call, int64_t first, int64_t end) {
  std::vector<int64_t> rows(end - first);
  int64_t count = 0;
  for (int64_t i = first; i < end; ++i) {
    uint8_t used = 0;
    for (int64_t m = 0; m < call.mask_rows(); ++m) used |= call.mask[m * call.channels + i];
    rows[count] = i;  // stays if it is used: without a branch, since no one foresees which are
    count += used;
  }
  rows.resize(count);
  return rows;
}

// The scores of all channels for one vector.
inline void score_all(const Call& call, const float* h, float* scores) {
  versioned([&](auto n) __attribute__((always_inline)) {
    using Floats = Vector<float, n>;
    const auto one = [&](int64_t c) {
      float score = std::fabs(h[c]);
      if (call.weight != nullptr) score *= call.weight[c];
      return call.expected != nullptr ? score * call.expected[c] : score;
    };
    int64_t c = 0;
    for (; c + n <= call.size; c += n) {
      Floats score = (Floats)(loaded<Vector<int32_t, n>>(h + c) & 0x7fffffff);
      if (call.weight != nullptr) score *= loaded<Floats>(call.weight + c);
      if (call.expected != nullptr) score *= loaded<Floats>(call.expected + c);
      std::memcpy(scores + c, &score, sizeof(score));
    }
    for (; c < call.size; ++c) scores[c] = one(c);
  });
}

// Scores |h| weight expected [mask rows, C] of the candidates; a shared row takes the norm over
// vectors.
inline std::vector<float> scored(const Call& call, const float* h, Team& team) {
  const int64_t n = call.vectors, size = call.size;
  std::vector<float> scores(call.mask_rows() * size);
  if (n == 1 && call.all()) {
    score_all(call, h, scores.data());
    return scores;
  }
  team.run(call.mask_rows(), [&](int64_t row) {
    float* of_row = scores.data() + row * size;
    for (int64_t c = 0; c < size; ++c) {
      const float* values = h + (call.all() ? c : call.candidates[c]) * n;
      float magnitude = std::fabs(values[row]);
      if (call.shared) {
        float squares = 0;
        for (int64_t v = 0; v < n; ++v) squares += values[v] * values[v];
        magnitude = std::sqrt(squares);
      }
      if (call.weight != nullptr) magnitude *= call.weight[c];
      of_row[c] = call.expected != nullptr ? magnitude * call.expected[c] : magnitude;
    }
  });
  return scores;
}

// Sets the candidates of each mask row to what `chosen_of(row, its scores)` says, bytes [C].
template <typename ChosenOf>
void set_candidates(const Call& call, const std::vector<float>& scores, uint8_t* mask, Team& team,
                    const ChosenOf& chosen_of) {
  const int64_t size = call.size;
  team.run(call.mask_rows(), [&](int64_t row) {
    uint8_t* of_row = mask + row * call.channels;
    const std::vector<uint8_t> chosen = chosen_of(row, scores.data() + row * size);
    if (call.all()) return std::copy(chosen.begin(), chosen.end(), of_row), void();
    for (int64_t c = 0; c < size; ++c) of_row[call.candidates[c]] = chosen[c];
  });
}

inline void choose(const Call& call, const std::vector<float>& scores, Team& team) {
  const int64_t size = call.size;
  set_candidates(call, scores, call.mask, team, [&](int64_t, const float* of_row) {
    std::vector<uint8_t> chosen(size);
    if (call.threshold == nullptr) select_top(of_row, size, call.keep, chosen.data());
    for (int64_t c = 0; c < size && call.threshold != nullptr; ++c) {
      chosen[c] = of_row[c] > call.threshold[c];
    }
    return chosen;
  });
}

// mask: of the channels that are on for a vector, the `exact` best. It may be that of the call.
inline void best(const Call& call, const std::vector<float>& scores, uint8_t* mask, Team& team) {
  const int64_t size = call.size;
  set_candidates(call, scores, mask, team, [&](int64_t row, const float* of_row) {
    std::vector<uint8_t> on, chosen(size);
    const uint8_t* from = call.mask + row * call.channels;
    if (!call.all()) {
      on.resize(size);
      for (int64_t c = 0; c < size; ++c) on[c] = from[call.candidates[c]];
    }
    Ranking(of_row, size, call.all() ? from : on.data()).top(call.exact, chosen.data());
    return chosen;
  });
}

}  // namespace popjax
