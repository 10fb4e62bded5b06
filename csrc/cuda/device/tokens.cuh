// Per-token tensors, read by each thread in four consecutive flat slots whatever their layout, so
// that the layout changes no bit of a sum.
#pragma once

#include "tensor.cuh"

namespace ppo::cuda {

constexpr int kItems = 4;  // of a thread
constexpr int kTokenThreads = 256;
constexpr int kTile = kItems * kTokenThreads;

// Tensor of tokens by flat slots: slot i, in row r, is element i * stride + r * skip. For a (rows,
// cols) tensor skip = row stride - cols * stride. Null data if absent.
struct Column {
  const void* data;
  DType dtype;
  bool wide;  // slots 4i .. 4i + 3 are neighbours, aligned to their 16, 8 or 4 bytes
  int64_t stride, skip;
};

// Rows of the slots of one tile.
struct TileRows {
  int64_t row, left;  // of the tile's first slot: its row, and how many slots that still has
  uint32_t cols;

  PPO_DEVICE TileRows(int64_t first, int64_t n_cols)
      : row(first / n_cols),
        left(n_cols - first % n_cols),
        cols(uint32_t(n_cols < kTile ? n_cols : kTile)) {}
  // Row of slot i. Rows after the first may be shorter than a tile.
  PPO_DEVICE int64_t of(int i) const {
    return i < left ? row : row + 1 + int64_t(uint32_t(i - int(left)) / cols);
  }
};

// Slots [first, first + count) of this thread, at most kItems.
struct Slots {
  int64_t first;
  int count;
  int64_t row[kItems];
};

// Unconverted words that a thread has loaded from one tensor: all loads are issued before the
// first value is needed.
struct Raw {
  uint32_t words[kItems];
};

PPO_DEVICE Raw load_raw(const Column& c, const Slots& s) {
  Raw raw = {};
  if (!c.data) return raw;
  if (c.wide && s.count == kItems) {
    const int64_t at = s.first + s.row[0] * c.skip;
    if (c.dtype == DType::f32) {
      const uint4 v =
          __ldcs(reinterpret_cast<const uint4*>(static_cast<const float*>(c.data) + at));
      raw = {v.x, v.y, v.z, v.w};
    } else {
      const uint2 v =
          __ldcs(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(c.data) + at));
      raw.words[0] = v.x;
      raw.words[1] = v.y;
    }
    return raw;
  }
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    if (k >= s.count) continue;
    const int64_t at = (s.first + k) * c.stride + s.row[k] * c.skip;
    raw.words[k] = c.dtype == DType::f32 ? static_cast<const uint32_t*>(c.data)[at]
                                         : static_cast<const uint16_t*>(c.data)[at];
  }
  return raw;
}

// Loaded words converted to fp32; 0 if the tensor is absent.
struct Values {
  float at[kItems];
};

PPO_DEVICE Values values_of(const Column& c, const Slots& s, const Raw& raw) {
  const uint32_t* w = raw.words;
  Values v;
  if (c.dtype == DType::f32) {
#pragma unroll
    for (int k = 0; k < kItems; ++k) v.at[k] = __uint_as_float(w[k]);
    return v;
  }
  const bool paired = c.wide && s.count == kItems;
  const uint32_t bits[kItems] = {w[0], paired ? w[0] >> 16 : w[1], paired ? w[1] : w[2],
                                 paired ? w[1] >> 16 : w[3]};
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const uint16_t half = uint16_t(bits[k]);
    v.at[k] = c.dtype == DType::bf16 ? widen(bf16{half}) : widen(fp16{half});
  }
  return v;
}

// Bit k is set if slot k exists and the mask keeps it; an absent mask keeps all.
PPO_DEVICE uint32_t live_items(const Column& mask, const Slots& s) {
  const uint32_t there = (1u << s.count) - 1u;
  if (!mask.data) return there;
  const auto* bytes = static_cast<const uint8_t*>(mask.data);
  if (mask.wide && s.count == kItems) {
    const uint32_t v =
        __ldcs(reinterpret_cast<const uint32_t*>(bytes + s.first + s.row[0] * mask.skip));
    return uint32_t((v & 0xffu) != 0) | uint32_t((v & 0xff00u) != 0) << 1 |
           uint32_t((v & 0xff0000u) != 0) << 2 | uint32_t((v & 0xff000000u) != 0) << 3;
  }
  uint32_t live = 0;
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    if (k >= s.count) continue;
    const int64_t at = (s.first + k) * mask.stride + s.row[k] * mask.skip;
    live |= uint32_t(bytes[at] != 0) << k;
  }
  return live;
}

// Stores x[k] for the slots that exist; `out` is contiguous, and aligned to 16 bytes if `wide`.
PPO_DEVICE void store_items(float* out, bool wide, const Slots& s, const float (&x)[kItems]) {
  if (wide && s.count == kItems) {
    *reinterpret_cast<float4*>(out + s.first) = make_float4(x[0], x[1], x[2], x[3]);
    return;
  }
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    if (k < s.count) out[s.first + k] = x[k];
  }
}

// Slots of this thread in a tile; `cols` is 0 if no row number is needed.
PPO_DEVICE Slots slots_of(int64_t tile, int64_t total, int64_t cols) {
  const int64_t start = tile * kTile;
  const int mine = int(threadIdx.x) * kItems;
  const int64_t left = total - start - mine;
  Slots s{start + mine, left < 0 ? 0 : left < kItems ? int(left) : kItems, {}};
  if (cols > 0) {
    const TileRows rows(start, cols);
#pragma unroll
    for (int k = 0; k < kItems; ++k) s.row[k] = rows.of(mine + k);
  }
  return s;
}

// Shape of (B, T) or flat (N,) tokens; the latter are one row.
struct TokenShape {
  int64_t rows, cols;
  int64_t total() const { return rows * cols; }
  int64_t tiles() const { return (total() + kTile - 1) / kTile; }
};

inline TokenShape token_shape(const Tensor& x, const char* op) {
  const auto sizes = x.sizes();
  PPO_CHECK(sizes.size() == 1 || sizes.size() == 2, op, "expected (B, T) or (N,)");
  return sizes.size() == 2 ? TokenShape{sizes[0], sizes[1]} : TokenShape{1, sizes[0]};
}

inline Column column_of(const OptTensor& x, const TokenShape& shape) {
  if (!x) return Column{};
  const auto strides = x->strides();
  Column c{x->const_data_ptr(), dtype_of(*x), false, strides[strides.size() - 1], 0};
  if (shape.cols == 1 && strides.size() == 2) {
    c.stride = strides[0];
  } else if (shape.rows > 1) {
    c.skip = strides[0] - shape.cols * c.stride;
  }
  const size_t bytes = kItems * x->element_size();
  const bool in_step = c.skip == 0 || (shape.cols % kItems == 0 && c.skip % kItems == 0);
  c.wide = c.stride == 1 && in_step && reinterpret_cast<uintptr_t>(c.data) % bytes == 0;
  return c;
}

}  // namespace ppo::cuda
