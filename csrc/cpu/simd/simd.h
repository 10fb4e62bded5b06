// The lane vocabulary of kernels, once per instruction set (no include guard, see foreach_isa.h).
//
// A kernel is a template over T: `F` (lanes<F> fp32 lanes; in ppo::scalar F is float itself), or
// float or double as one lane. For each T:
//   lanes<T>  scalar_t<T>  mask_t<T>
//   set1<T>(s)  load<T>(p)  load_n<T>(p, n, fill)  store(p, x)  store_n(p, x, n)
//       p: fp32, bf16 or fp16 storage (double for T = double), any alignment; lanes >= n read as
//       `fill` and are neither read nor written
//   load_mask<T>(bytes)  load_mask_n<T>(bytes, n)  first_n<T>(n)      lanes >= n are false
//   + - * / and unary -;  < <= > >= == (false on NaN), != (true on NaN);  & | ! on masks
//   vfma(a, b, c) = a*b + c  select(mask, a, b)  vabs  vsqrt
//   vmin(a, b) = a < b ? a : b  vmax(a, b) = a > b ? a : b     so a NaN in either gives b
//   any(m)  all(m)  count(m)
//   reduce_add(x)  reduce_min(x)  reduce_max(x)     in one fixed order
//   vexp  vexpm1  (1-2 ulp, -inf -> 0 / -1, overflow -> inf, NaN -> NaN)  vexp_neg (see
//   simd_math.h) vlog(float), vlog(double) Acc<T> sum in double: add(x), add_square(x), total()
// The fp32 functions run the same operations in every lane and tail. Multiply-add is never
// contracted
// (-ffp-contract=off), vfma is fused wherever the instruction set has it.
#include "simd_scalar.h"
#if PPO_ISA_WIDTH == 8
#include "simd_avx2.h"
#elif PPO_ISA_WIDTH == 16
#include "simd_avx512.h"
#endif
#include "fetch.h"
#include "simd_math.h"
