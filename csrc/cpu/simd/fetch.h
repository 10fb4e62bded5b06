// Reading n consecutive elements of a View's row as T = float or double (no include guard, see
// foreach_isa.h; part of simd.h).
namespace ppo::PPO_ISA {

template <class Storage>
PPO_INLINE double element(const void* p, int64_t i) {
  return double(to_float(static_cast<const Storage*>(p)[i]));
}
template <>
PPO_INLINE double element<double>(const void* p, int64_t i) {
  return static_cast<const double*>(p)[i];
}

template <class Storage, class T>
inline void gather(const Storage* p, int64_t stride, int64_t n, T* out) {
  if (stride == 0) {
    const T x = T(element<Storage>(p, 0));
    for (int64_t i = 0; i < n; ++i) out[i] = x;
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = T(element<Storage>(p, i * stride));
  }
}

// Widen n contiguous 2-byte elements.
template <class Storage>
inline void widen_row(const Storage* p, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + lanes<F> <= n; i += lanes<F>) store(out + i, load<F>(p + i));
  for (; i < n; ++i) out[i] = to_float(p[i]);
}

template <class Storage, class T>
inline const T* fetch_as(const View& v, int64_t row, int64_t col, int64_t n, T* buffer) {
  const Storage* p = at<Storage>(v, row, col);
  if constexpr (sizeof(Storage) == 2 && sizeof(T) == 4) {
    if (v.col_stride == 1) {
      widen_row(p, n, buffer);
      return buffer;
    }
  }
  gather(p, v.col_stride, n, buffer);
  return buffer;
}

// Pointer to elements (row, col) .. (row, col + n) as T: into the tensor itself where it is T and
// contiguous along the row, else into `buffer` (room for n), converted. Any stride, 0 included.
template <class T>
inline const T* fetch(const View& v, int64_t row, int64_t col, int64_t n, T* buffer) {
  constexpr DType own = sizeof(T) == 8 ? DType::f64 : DType::f32;
  if (v.dtype == own && v.col_stride == 1) return at<T>(v, row, col);
  switch (v.dtype) {
    case DType::f32:
      return fetch_as<float>(v, row, col, n, buffer);
    case DType::bf16:
      return fetch_as<bf16>(v, row, col, n, buffer);
    case DType::f16:
      return fetch_as<fp16>(v, row, col, n, buffer);
    default:
      return fetch_as<double>(v, row, col, n, buffer);
  }
}

// The same for a 1-byte mask or flag: bytes, non-zero is true.
inline const uint8_t* fetch_bytes(const View& v, int64_t row, int64_t col, int64_t n,
                                  uint8_t* buffer) {
  const uint8_t* p = at<uint8_t>(v, row, col);
  if (v.col_stride == 1) return p;
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i * v.col_stride];
  return buffer;
}

}  // namespace ppo::PPO_ISA
