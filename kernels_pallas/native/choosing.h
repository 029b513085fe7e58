// Which channels of a feed-forward layer a decode step uses, and of these which are read exactly.
#pragma once

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
  std::vector<int64_t> candidates;
  const float* weight;     // [C] or null
  const float* expected;   // [C] or null: |up| as a score by the gate has it
  const float* threshold;  // [C] or null: chosen by score > threshold instead of by rank
  uint8_t* mask;           // [1 or N, F], a result

  int64_t mask_rows() const { return shared ? 1 : vectors; }
  const uint8_t* mask_of(int64_t v) const { return mask + (shared ? 0 : v) * channels; }
  bool used(int64_t channel) const {
    for (int64_t m = 0; m < mask_rows(); ++m) {
      if (mask[m * channels + channel]) return true;
    }
    return false;
  }
};

// Channels first .. end - 1 that some vector uses.
inline std::vector<int64_t> used_rows(const Call& call, int64_t first, int64_t end) {
  std::vector<int64_t> rows;
  rows.reserve(end - first);
  for (int64_t i = first; i < end; ++i) {
    if (call.used(i)) rows.push_back(i);
  }
  return rows;
}

// Scores |h| weight expected [mask rows, C] of the candidates; a shared row takes the norm over
// vectors.
inline std::vector<float> scored(const Call& call, const float* h, Team& team) {
  const int64_t n = call.vectors, size = call.candidates.size();
  std::vector<float> scores(call.mask_rows() * size);
  team.run(call.mask_rows(), [&](int64_t row) {
    float* of_row = scores.data() + row * size;
    for (int64_t c = 0; c < size; ++c) {
      const float* values = h + call.candidates[c] * n;
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
  const int64_t size = call.candidates.size();
  team.run(call.mask_rows(), [&](int64_t row) {
    const std::vector<uint8_t> chosen = chosen_of(row, scores.data() + row * size);
    for (int64_t c = 0; c < size; ++c) mask[row * call.channels + call.candidates[c]] = chosen[c];
  });
}

inline void choose(const Call& call, const std::vector<float>& scores, Team& team) {
  const int64_t size = call.candidates.size();
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
  const int64_t size = call.candidates.size();
  set_candidates(call, scores, mask, team, [&](int64_t row, const float* of_row) {
    std::vector<uint8_t> on(size), chosen(size);
    for (int64_t c = 0; c < size; ++c) on[c] = call.mask[row * call.channels + call.candidates[c]];
    Ranking(of_row, size, on.data()).top(call.exact, chosen.data());
    return chosen;
  });
}

}  // namespace popjax
