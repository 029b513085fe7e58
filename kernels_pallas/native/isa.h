// Which instruction set runs is found out when the library is loaded, not when it is built: one
// file serves every x86-64 machine. Elsewhere the compiler's baseline runs (NEON on aarch64).
#pragma once

#include <cstdlib>
#include <cstring>
#include <type_traits>

namespace popjax {

// kVnni is kAvx512 with products of small integers, which few kernels need.
enum class Isa { kPlain, kAvx2, kAvx512, kVnni };

inline Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512) return __builtin_cpu_supports("avx512vnni") ? Isa::kVnni : Isa::kAvx512;
  return avx2 ? Isa::kAvx2 : Isa::kPlain;
#else
  return Isa::kPlain;
#endif
}

// POPJAX_ISA lowers the choice, so that tests reach every version on one machine.
inline Isa chosen_isa() {
  const Isa best = best_isa();
  const char* asked = std::getenv("POPJAX_ISA");
  if (asked == nullptr) return best;
  const Isa isa = std::strcmp(asked, "plain") == 0    ? Isa::kPlain
                  : std::strcmp(asked, "avx2") == 0   ? Isa::kAvx2
                  : std::strcmp(asked, "avx512") == 0 ? Isa::kAvx512
                                                      : best;
  return isa < best ? isa : best;
}

inline Isa isa() {
  static const Isa chosen = chosen_isa();
  return chosen;
}

template <int N>
using Floats = std::integral_constant<int, N>;

#if defined(__x86_64__)
template <typename F>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))) void run_avx512(
    const F& body) {
  body(Floats<16>());
}

template <typename F>
__attribute__((target("avx2,fma"))) void run_avx2(const F& body) {
  body(Floats<8>());
}
#endif

// Runs `body(Floats<N>)`, an always-inline callable, as compiled for the chosen instruction set,
// whose registers hold N floats.
template <typename F>
void versioned(const F& body) {
#if defined(__x86_64__)
  if (isa() >= Isa::kAvx512) return run_avx512(body);
  if (isa() == Isa::kAvx2) return run_avx2(body);
#endif
  body(Floats<4>());
}

}  // namespace popjax
