// What logprobs.cpp and its kernels exchange.
#pragma once

#include <cstdint>

namespace ppo {

// A row is worked on in segments of this many logits, merged in order: the bits of a row depend on
// V alone, and few long rows still occupy every thread.
constexpr int64_t kSegment = 32768;

// Of one segment, with z = logit * inv_temperature: max z, sum e^(z - max), sum (z - max) e^(z -
// max).
struct SoftmaxPart {
  double max, sum, dot;
};

// d loss / d logit_j = p_j (slope * ln p_j + offset) for every j but the token, which gets
// `at_token`.
struct RowGradient {
  enum Kind : int { zero, nan, live } kind;
  int64_t token;
  double inv_temperature, row_max, log_sum, slope, offset, at_token;
};

}  // namespace ppo
