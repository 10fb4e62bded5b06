// The choice of an instruction set: the CPU's best, PPO_FAST_ISA's, or set_isa's.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "foreach_isa.h"

#if PPO_X86
#include <cpuid.h>
#endif

namespace ppo {
namespace {

constexpr Isa kAll[] = {Isa::scalar, Isa::neon, Isa::avx2, Isa::avx512};

#if PPO_X86
// __builtin_cpu_supports("f16c") does not compile with clang 14.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

Isa detect() {
#if PPO_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    return Isa::avx2;
  }
#endif
  return PPO_ARM ? Isa::neon : Isa::scalar;
}

Isa parse(const std::string& name) {
  if (name == "auto") return best_isa();
  for (Isa isa : kAll) {
    if (name != isa_name(isa)) continue;
    if (isa <= best_isa() && (PPO_ARM || isa != Isa::neon)) return isa;
    throw std::invalid_argument("PPO_FAST_ISA: this CPU has no " + name + ", its best is " +
                                isa_name(best_isa()));
  }
  throw std::invalid_argument("PPO_FAST_ISA: must be auto, scalar, neon, avx2 or avx512, got " +
                              name);
}

// A function-local static, so that a bad PPO_FAST_ISA is an exception and not a failed dlopen.
std::atomic<Isa>& choice() {
  static std::atomic<Isa> isa{[] {
    const char* name = std::getenv("PPO_FAST_ISA");
    return parse(name ? name : "auto");
  }()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::neon:
      return "neon";
    default:
      return "scalar";
  }
}

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa active_isa() { return choice().load(std::memory_order_relaxed); }

void set_isa(const char* name) { choice().store(parse(name), std::memory_order_relaxed); }

bool bf16_dot() {
#if PPO_X86
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has && active_isa() == Isa::avx512;
#else
  return false;
#endif
}

}  // namespace ppo
