// The k largest of many scores, in three passes over the digits of their bits: a float that is not
// negative orders as the integer of its bits does. The sign is dropped, so -0 is 0.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

namespace popjax {

// chosen[i] = 1 for exactly `keep` of `size` scores, the largest; of equal ones the first.
inline void select_top(const float* scores, int64_t size, int64_t keep, uint8_t* chosen) {
  if (keep <= 0 || keep >= size) {
    std::fill(chosen, chosen + size, static_cast<uint8_t>(keep > 0));
    return;
  }
  std::vector<uint32_t> keys(size);
  std::memcpy(keys.data(), scores, size * sizeof(float));
  for (auto& key : keys) key &= 0x7fffffff;
  // The keep-th largest key, one digit after the other: `prefix` are the digits known so far.
  constexpr std::array<int, 4> kShifts = {31, 20, 10, 0};
  uint32_t prefix = 0;
  int64_t room = keep;  // how many of the keys that begin with `prefix` are still to be taken
  for (int level = 1; level < 4; ++level) {
    const int shift = kShifts[level], above = kShifts[level - 1];
    const uint32_t digits = 1u << (above - shift);
    std::vector<int32_t> count(digits);
    for (const uint32_t key : keys) {
      if (level == 1 || key >> above == prefix) ++count[(key >> shift) & (digits - 1)];
    }
    uint32_t digit = digits - 1;
    while (count[digit] < room) room -= count[digit--];
    prefix = prefix << (above - shift) | digit;
  }
  for (int64_t i = 0; i < size; ++i) {
    chosen[i] = keys[i] > prefix || (keys[i] == prefix && room-- > 0);
  }
}

}  // namespace popjax
