// Merging (count, mean, M2) partials.
#pragma once

#include <cstddef>
#include <vector>

namespace ppo {

// Partials of three, merged in order as Chan, Golub and LeVeque (1979) do.
inline void merge_moments(const std::vector<double>& partials, double* out) {
  double n = 0, mean = 0, m2 = 0;
  for (size_t i = 0; i + 2 < partials.size(); i += 3) {
    const double more = partials[i];
    if (more == 0) continue;
    const double delta = partials[i + 1] - mean, share = more / (n + more);
    mean = n == 0 ? partials[i + 1] : mean + delta * share;
    m2 += partials[i + 2] + (n == 0 ? 0.0 : delta * delta * n * share);
    n += more;
  }
  out[0] = n;
  out[1] = mean;
  out[2] = m2;
}

}  // namespace ppo
