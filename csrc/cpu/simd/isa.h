// Which instruction set the kernels run on: chosen once from the CPU, overridable for tests.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define PPO_X86 1
#else
#define PPO_X86 0
#endif

namespace ppo {

enum class Isa { scalar, avx2, avx512 };

const char* isa_name(Isa isa);
Isa best_isa();    // the widest one that this CPU has
Isa active_isa();  // best_isa(), or PPO_FAST_ISA, or what set_isa() chose
// Throws std::invalid_argument for an unknown name or one that this CPU lacks; "auto" resets.
void set_isa(const char* name);

template <class Fn>
inline Fn select_isa([[maybe_unused]] Fn scalar, [[maybe_unused]] Fn avx2,
                     [[maybe_unused]] Fn avx512) {
  switch (active_isa()) {
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    default:
      return scalar;
  }
}

}  // namespace ppo

// PPO_SELECT(fn)(args) calls ppo::<isa>::fn of the active instruction set; PPO_SELECT(fn<A, B>)
// too.
#if PPO_X86 && defined(PPO_EIGHT_LANES)
#define PPO_SELECT(...)                                                     \
  ::ppo::select_isa(&::ppo::scalar::__VA_ARGS__, &::ppo::avx2::__VA_ARGS__, \
                    &::ppo::avx512vl::__VA_ARGS__)
#elif PPO_X86
#define PPO_SELECT(...)                                                     \
  ::ppo::select_isa(&::ppo::scalar::__VA_ARGS__, &::ppo::avx2::__VA_ARGS__, \
                    &::ppo::avx512::__VA_ARGS__)
#else
#define PPO_SELECT(...) (&::ppo::scalar::__VA_ARGS__)
#endif
