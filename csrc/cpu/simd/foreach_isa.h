// Instruction sets: the choice of one at run time and, where PPO_KERNEL names a header, that
// header compiled once per instruction set, as ppo::scalar, ppo::avx2 and ppo::avx512 on x86 and
// as ppo::scalar and ppo::neon on ARM (PPO_ISA is the name). In csrc/cpu/<family>/<op>.cpp:
//
//   #define PPO_KERNEL "../<family>/<op>_simd.h"
//   #include "../simd/foreach_isa.h"
//   ... PPO_SELECT(row_kernel)(args) runs the kernel for this CPU.
//
// With PPO_EIGHT_LANES defined first, AVX-512 machines run kernels of eight lanes too, with the
// registers and masked operations of AVX-512VL (PPO_MASKED is defined): ppo::avx512vl.
//
// A kernel header, and every header of ours that it includes (csrc/math.h), has no include guard
// and puts all its code into `namespace ppo::PPO_ISA`; simd.h is already included. Outside headers
// must be included before this file, at the baseline target: an inline function of std compiled
// here for AVX-512 could be the copy that the linker keeps for all callers. For the same reason
// kernel code calls libm as ::exp, not std::exp(float). In GCC neither lambdas nor implicit
// constructors inherit the pragma's target, so kernels are plain functions, and parallel_for
// lambdas outside only call them.
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "../../tensor/types.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define PPO_X86 1
#include <immintrin.h>
#else
#define PPO_X86 0
#endif
#if defined(__aarch64__) && defined(__ARM_NEON)
#define PPO_ARM 1
#include <arm_neon.h>
#else
#define PPO_ARM 0
#endif

namespace ppo {

enum class Isa { scalar, neon, avx2, avx512 };

const char* isa_name(Isa isa);
Isa best_isa();    // the widest of this CPU
Isa active_isa();  // best_isa(), or PPO_FAST_ISA, or what set_isa() chose
// Throws std::invalid_argument for an unknown name or one that this CPU lacks; "auto" resets.
void set_isa(const char* name);
// True where kernels may use AVX512-BF16: the CPU has it, and the active set is avx512.
bool bf16_dot();

#if PPO_X86
template <class Fn>
inline Fn select_isa(Fn scalar, Fn avx2, Fn avx512) {
  switch (active_isa()) {
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    default:
      return scalar;
  }
}
#elif PPO_ARM
template <class Fn>
inline Fn select_isa(Fn scalar, Fn neon) {
  return active_isa() == Isa::neon ? neon : scalar;
}
#endif

}  // namespace ppo

// PPO_SELECT(fn)(args) calls ppo::<isa>::fn of the active instruction set; fn may be fn<A, B>.
#if PPO_X86 && defined(PPO_EIGHT_LANES)
#define PPO_SELECT(...)                                                     \
  ::ppo::select_isa(&::ppo::scalar::__VA_ARGS__, &::ppo::avx2::__VA_ARGS__, \
                    &::ppo::avx512vl::__VA_ARGS__)
#elif PPO_X86
#define PPO_SELECT(...)                                                     \
  ::ppo::select_isa(&::ppo::scalar::__VA_ARGS__, &::ppo::avx2::__VA_ARGS__, \
                    &::ppo::avx512::__VA_ARGS__)
#elif PPO_ARM
#define PPO_SELECT(...) ::ppo::select_isa(&::ppo::scalar::__VA_ARGS__, &::ppo::neon::__VA_ARGS__)
#else
#define PPO_SELECT(...) (&::ppo::scalar::__VA_ARGS__)
#endif

#ifdef PPO_KERNEL
#define PPO_INLINE inline __attribute__((always_inline))

#define PPO_ISA scalar
#define PPO_ISA_WIDTH 1
#include "simd.h"
#include PPO_KERNEL
#undef PPO_ISA
#undef PPO_ISA_WIDTH

#if PPO_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define PPO_ISA avx2
#define PPO_ISA_WIDTH 8
#include "simd.h"
#include PPO_KERNEL
#undef PPO_ISA
#undef PPO_ISA_WIDTH
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#ifdef PPO_EIGHT_LANES
#define PPO_ISA avx512vl
#define PPO_ISA_WIDTH 8
#define PPO_MASKED 1
#else
#define PPO_ISA avx512
#define PPO_ISA_WIDTH 16
#endif
#include "simd.h"
#include PPO_KERNEL
#undef PPO_ISA
#undef PPO_ISA_WIDTH
#undef PPO_MASKED
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#elif PPO_ARM
#define PPO_ISA neon  // every aarch64 has it: no target of its own
#define PPO_ISA_WIDTH 8
#include "simd.h"
#include PPO_KERNEL
#undef PPO_ISA
#undef PPO_ISA_WIDTH
#endif  // PPO_X86
#endif  // PPO_KERNEL
