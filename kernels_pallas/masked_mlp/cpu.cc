// The feed-forward layer of a decode step in one call: evaluate, score, choose, project.
//
//   h = act(x gate^T) * (x up^T)      y = (h * mask) down      mask: R always, of C the chosen
//
// What is chosen from decides what is read. From the product: gate and up of all rows, down of the
// chosen. From the gate alone: gate of all, up of the chosen, and down of these or of the best of
// them. Given, or from a scout, copies of gate and up in few bits: the chosen of all three. What no
// vector uses is not read.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "native/buffers.h"
#include "native/choosing.h"
#include "native/rounded.h"
#include "native/rows.h"
#include "native/sums.h"
#include "native/team.h"

namespace popjax {
namespace {

// Runs body(first, end) over pieces of the channels that suit independent rows; where only `share`
// of them are read, over fewer, since the first rows of a piece are waited for.
template <typename Body>
void over_channels(const Call& call, double share, Team& team, const Body& body) {
  const int64_t whole = rows_a_piece(call.channels, call.width);
  const auto enough = static_cast<int64_t>(PartialSums::kLeastRows / std::max(share, 0.01));
  const int64_t step = std::max(whole, std::min(enough, call.channels / 4) / 4 * 4);
  team.run((call.channels + step - 1) / step,
           [&](int64_t piece) { body(piece * step, std::min((piece + 1) * step, call.channels)); });
}

// The share of the channels that is read where each vector chooses `count` of the candidates; all
// where thresholds choose, since how many that will be is not known.
double share_of(const Call& call, int64_t count) {
  if (call.threshold != nullptr) return 1;
  const int64_t read = call.channels - call.size + count * call.mask_rows();
  return std::min(1.0, static_cast<double>(read) / static_cast<double>(call.channels));
}

// Dot products of rows `rows` with every vector, [rows, N].
template <typename W>
std::vector<float> dots(const W& w, const std::vector<int64_t>& rows, const float* x, int64_t n) {
  std::vector<float> out(rows.size() * n);
  dot_rows(w, rows.data(), static_cast<int64_t>(rows.size()), x, n, out.data(), n, 1);
  return out;
}

// h [F, N] = act(gate) * up where a channel is in use, or with gate_only the activated gate alone.
template <typename W>
void evaluate(const Call& call, const W& gate, const W& up, const float* x, bool gate_only,
              float* h, Team& team, double share = 1) {
  const int64_t n = call.vectors;
  over_channels(call, share, team, [&](int64_t first, int64_t end) {
    const auto rows = used_rows(call, first, end);
    auto a = dots(gate, rows, x, n);
    const auto u = gate_only ? std::vector<float>() : dots(up, rows, x, n);
    activate(call.activation, a.size(), gate_only ? nullptr : u.data(), a.data());
    for (size_t i = 0; i < rows.size(); ++i) {
      for (int64_t v = 0; v < n; ++v) {
        if (call.mask_of(v)[rows[i]]) h[rows[i] * n + v] = a[i * n + v];
      }
    }
  });
}

// h [F, N], the activated gate, times up of the rows in use.
template <typename U>
void multiply_up(const Call& call, const U& up, const float* x, float* h, Team& team) {
  const int64_t n = call.vectors;
  over_channels(call, share_of(call, call.keep), team, [&](int64_t first, int64_t end) {
    const auto rows = used_rows(call, first, end);
    const auto u = dots(up, rows, x, n);
    for (size_t i = 0; i < rows.size(); ++i) {
      for (int64_t v = 0; v < n; ++v) h[rows[i] * n + v] *= u[i * n + v];
    }
  });
}

template <typename W>
void project(const Call& call, const W& down, const float* h, float* y, Team& team) {
  const int64_t n = call.vectors;
  const PartialSums partial(call.channels, n, call.width);
  team.run(partial.pieces(), [&](int64_t piece) {
    const auto rows = used_rows(call, partial.begin(piece), partial.begin(piece + 1));
    std::vector<float> masked(rows.size() * n);
    for (size_t i = 0; i < rows.size(); ++i) {
      for (int64_t v = 0; v < n; ++v) {
        masked[i * n + v] = call.mask_of(v)[rows[i]] ? h[rows[i] * n + v] : 0.0f;
      }
    }
    float* out = partial.cleared(piece, 0, n);
    add_rows(down, rows.data(), static_cast<int64_t>(rows.size()), masked.data(), n, 1, n, out);
  });
  partial.add_up(y, team);
}

// h of a scout, replaced by that of the weights where it is best.
template <typename W>
void refine(const Call& call, const W& gate, const W& up, const float* x,
            const std::vector<float>& scores, float* h, Team& team) {
  std::vector<uint8_t> mask(call.mask_rows() * call.channels);
  best(call, scores, mask.data(), team);
  Call inner = call;
  inner.mask = mask.data();
  evaluate(inner, gate, up, x, false, h, team, share_of(call, call.exact));
}

// With `foretold`, h [F, N] is there already, a scout's.
template <typename W>
void mlp(const Call& call, const W& gate, const W& up, const W& down, const float* x, float* h,
         bool foretold, float* y, Team& team) {
  std::vector<float> scores;
  if (foretold) scores = scored(call, h, team);
  if (call.point == Point::kScout) choose(call, scores, team);
  if (foretold && call.exact >= 0) {
    refine(call, gate, up, x, scores, h, team);
  } else {
    evaluate(call, gate, up, x, call.point == Point::kGate, h, team);
  }
  if (call.point == Point::kProduct || call.point == Point::kGate) {
    choose(call, scored(call, h, team), team);
  }
  if (call.point == Point::kGate) {
    multiply_up(call, up, x, h, team);
    Call late = call;
    late.expected = nullptr;
    if (call.exact >= 0) best(late, scored(late, h, team), late.mask, team);
  }
  project(call, down, h, y, team);
}

// The candidates of a call, none where they are all channels in their order.
ffi::Error read_candidates(const ffi::AnyBuffer& candidate, Call& call) {
  const auto* index = static_cast<const int32_t*>(candidate.untyped_data());
  if (call.size == call.channels && counts_up(index, call.size)) return ffi::Error::Success();
  call.candidates.assign(index, index + call.size);
  std::vector<uint8_t> seen(call.channels);
  for (const int64_t c : call.candidates) {
    if (c < 0 || c >= call.channels) {
      return invalid("candidate " + std::to_string(c) + " is outside 0.." +
                     std::to_string(call.channels - 1));
    }
    if (seen[c]++) return invalid("candidate " + std::to_string(c) + " is named twice");
  }
  return ffi::Error::Success();
}

ffi::Error read_call(const ffi::AnyBuffer& x, const ffi::AnyBuffer& gate,
                     const ffi::AnyBuffer& candidate, const ffi::AnyBuffer& weight,
                     const ffi::AnyBuffer& threshold, const ffi::AnyBuffer& given,
                     const ffi::AnyBuffer& expected, int32_t point, int32_t activation,
                     int64_t keep, ffi::AnyBuffer& mask, Call& call) {
  call.vectors = dim(x, 0), call.width = dim(x, 1), call.channels = dim(gate, 0);
  call.activation = static_cast<Activation>(activation);
  call.point = static_cast<Point>(point);
  call.keep = keep;
  call.mask = static_cast<uint8_t*>(mask.untyped_data());
  call.shared = dim(mask, 0) == 1;
  const int64_t size = candidate.element_count();
  call.size = size;
  if (auto error = read_candidates(candidate, call); error.failure()) return error;
  for (const auto* each : {&weight, &threshold, &expected}) {
    const int64_t count = each->element_count();
    if (each->element_type() != ffi::F32 || (count != 0 && count != size)) {
      return invalid(
          "give each candidate a float32 weight, threshold or expected up, or none of them");
    }
  }
  const auto optional = [](const ffi::AnyBuffer& b) {
    return b.element_count() > 0 ? static_cast<const float*>(b.untyped_data()) : nullptr;
  };
  call.weight = optional(weight);
  call.threshold = optional(threshold);
  call.expected = optional(expected);
  const int64_t cells = call.mask_rows() * call.channels;
  if (call.point == Point::kGiven) {
    if (given.element_type() != ffi::PRED || static_cast<int64_t>(given.element_count()) != cells) {
      return invalid("a given mask is boolean, one row for all vectors or one for each");
    }
    const auto* from = static_cast<const uint8_t*>(given.untyped_data());
    std::copy(from, from + cells, call.mask);
  } else {
    std::fill(call.mask, call.mask + cells, uint8_t{1});
  }
  if (call.keep < 0 || call.keep > size) return invalid("more candidates to keep than there are");
  return ffi::Error::Success();
}

bool alike(const ffi::AnyBuffer& a, const ffi::AnyBuffer& b) {
  return a.element_type() == b.element_type() && a.element_count() == b.element_count();
}

// h [F, N] as a scout, gate and up as `values` with `scales`, foretells it.
ffi::Error foretell(const Call& call, const ffi::AnyBuffer* values, const ffi::AnyBuffer* scales,
                    const float* x, float* h, Team& team) {
  const bool fits = alike(values[0], values[1]) && alike(scales[0], scales[1]);
  if (!fits || dim(values[0], 0) != call.channels) {
    return invalid("a scout has a gate and an up of one kind, with a row for each channel");
  }
  return with_rows(values[0], scales[0], call.width, [&](auto gate) {
    auto up = gate;
    up.data = static_cast<decltype(up.data)>(values[1].untyped_data());
    set_scales(up, scales[1]);
    using W = decltype(gate);
    if constexpr (std::is_same_v<W, Int4Rows> || std::is_same_v<W, Int6Rows>) {
      const RoundedVectors rounded(x, call.vectors, call.width);
      evaluate(call, Rounded<W>{gate, &rounded}, Rounded<W>{up, &rounded}, x, false, h, team);
    } else {
      evaluate(call, gate, up, x, false, h, team);
    }
    return ffi::Error::Success();
  });
}

ffi::Error masked_mlp(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer gate,
                      ffi::AnyBuffer up, ffi::AnyBuffer down, ffi::RemainingArgs more,
                      ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> mask,
                      int32_t point, int32_t activation, int64_t keep, int64_t exact) {
  // candidate [C], weight [C], threshold [C], given [M, F], then the scales of gate, up and down,
  // gate and up of a scout, and their scales, then expected [C].
  std::vector<ffi::AnyBuffer> rest;
  for (size_t i = 0; i < 12; ++i) {
    auto buffer = more.get<ffi::AnyBuffer>(i);
    if (buffer.has_error()) return buffer.error();
    rest.push_back(*buffer);
  }
  if (!is_activation(x) || !is_activation(*y)) return invalid("x is not float32 or bfloat16");
  if (!alike(gate, up) || !alike(gate, down) || !alike(rest[4], rest[5]) ||
      !alike(rest[4], rest[6])) {
    return invalid("gate, up and down need one shape, one dtype and one group size");
  }
  Call call;
  if (auto error = read_call(x, gate, rest[0], rest[1], rest[2], rest[3], rest[11], point,
                             activation, keep, *mask, call);
      error.failure()) {
    return error;
  }
  const Activations in(x);
  Result out(*y);
  Team team(pool, kPieces);
  std::unique_ptr<float[]> h(new float[call.channels * call.vectors]);
  const bool foretold = rest[7].element_count() > 0;
  call.exact = exact;
  if (foretold) {
    auto error = foretell(call, &rest[7], &rest[9], in.data(), h.get(), team);
    if (error.failure()) return error;
  }
  return with_rows(gate, rest[4], call.width, [&](auto g) {
    auto u = g, d = g;
    u.data = static_cast<decltype(u.data)>(up.untyped_data());
    d.data = static_cast<decltype(d.data)>(down.untyped_data());
    set_scales(u, rest[5]);
    set_scales(d, rest[6]);
    mlp(call, g, u, d, in.data(), h.get(), foretold, out.data(), team);
    out.store();
    return ffi::Error::Success();
  });
}

// Masks of the `keep` largest of each row of scores [N, C], ties to the lower index.
ffi::Error top(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> scores,
               ffi::Result<ffi::Buffer<ffi::PRED>> mask, int64_t keep) {
  const int64_t rows = scores.dimensions()[0], size = scores.dimensions()[1];
  if (keep < 0 || keep > size) return invalid("more to keep than there are");
  Team team(pool, rows);
  team.run(rows, [&](int64_t row) {
    select_top(scores.typed_data() + row * size, size, keep,
               reinterpret_cast<uint8_t*>(mask->typed_data()) + row * size);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(popjax_masked_mlp, masked_mlp,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int32_t>("point")
                                  .Attr<int32_t>("activation")
                                  .Attr<int64_t>("keep")
                                  .Attr<int64_t>("exact"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(popjax_top, top,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::PRED>>()
                                  .Attr<int64_t>("keep"));

}  // namespace popjax
