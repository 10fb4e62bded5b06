// Slope of one token's policy loss, with the softmax and gradient kernels of its row (no include
// guard, see foreach_isa.h).
#include "../../math.h"
#include "logprobs_simd.h"

namespace ppo::PPO_ISA {

// d loss / d logprobs of one token, unweighted, on one lane of T; neither gspo nor given.
template <class T>
double policy_slope(const PolicyOptions& o, const TokenValues& v) {
  const PolicyConsts<T> c(o);
  PolicyToken<T> t{T(v.logprobs),  T(v.old_logprobs), T(v.advantage),
                   T(v.is_weight), T(v.ref_logprobs), T(1),
                   first_n<T>(0)};
  if (o.whiten) t.advantage = whiten_advantage(c, t.advantage);
  switch (o.variant) {
    case Variant::cispo:
      return policy_terms<Variant::cispo, false>(o, c, t).grad;
    case Variant::penalty:
      return policy_terms<Variant::penalty, false>(o, c, t).grad;
    case Variant::linear:
      return policy_terms<Variant::linear, false>(o, c, t).grad;
    default:
      return policy_terms<Variant::clip, false>(o, c, t).grad;
  }
}

}  // namespace ppo::PPO_ISA
