// What the kernels of moments and whiten are given.
#pragma once

#include "../../tensor/rows.h"

namespace ppo {

constexpr int64_t kMomentBlock = 1 << 14;

// A tensor of any rank, addressed by its flat slot: rows of `cols` elements.
struct FlatView {
  RowIndex rows;
  View view;  // of a row; null data where absent

  // Row `row` as the view's row 0.
  View row(int64_t i, size_t element_size) const {
    View v = view;
    v.data = static_cast<const char*>(view.data) + size_t(rows.offset(i)) * element_size;
    return v;
  }
};

struct WhitenArgs {
  FlatView x, mask;
  size_t x_size;  // of an element, in bytes
  int64_t cols;
  // whiten: y = (x - mean) * scale + add where kept; `flat` makes that `add` alone.
  double mean, scale, add;
  bool flat;
  void* out;
};

}  // namespace ppo
