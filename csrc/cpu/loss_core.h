// Reading the tokens of a loss in pieces of one sequence (no include guard, see foreach_isa.h).
namespace ppo::PPO_ISA {

// Tokens summed before their sums go on in double: 64 additions in an fp32 lane cost 6 bits at
// worst, a whole block on the one lane of ppo::scalar would cost 10.
template <class T>
constexpr int64_t kRun = sizeof(scalar_t<T>) == 8 ? kBlock : 64 * lanes<T>;

// Up to kBlock consecutive slots of one sequence; `flat` is the first one.
struct Piece {
  int64_t sequence, column, flat, size;
};

// The piece that starts at `slot`, cut at the sequence's end and at `last`.
inline Piece piece_at(const SequenceMap& seqs, int64_t slot, int64_t last) {
  const int64_t s = seqs.find(slot);
  const int64_t end = seqs.end(s) < last ? seqs.end(s) : last;
  return {s, seqs.column(s, slot), slot, end - slot};
}

template <class T>
struct Buffer {
  alignas(64) scalar_t<T> data[kBlock];
};

// The piece's values as scalars of T, or null where the tensor is absent.
template <class T>
inline const scalar_t<T>* fetch_piece(const View& v, const Piece& p, Buffer<T>& buffer) {
  if (!v.data) return nullptr;
  return fetch(v, p.sequence, p.column, p.size, buffer.data);
}
inline const uint8_t* fetch_mask(const View& v, const Piece& p, uint8_t* buffer) {
  if (!v.data) return nullptr;
  return fetch_bytes(v, p.sequence, p.column, p.size, buffer);
}

// Lanes i .. i + lanes<T> of a piece; `whole` promises that all of them are inside it.
template <class T, bool whole>
struct Lanes {
  int64_t i, left;

  PPO_INLINE mask_t<T> live(const uint8_t* mask) const {
    if (!mask) return first_n<T>(left);
    return whole ? load_mask<T>(mask + i) : load_mask_n<T>(mask + i, left);
  }
  // What stands in a dead slot is replaced by 0.
  PPO_INLINE T read(const scalar_t<T>* p, mask_t<T> live) const {
    const T x = whole ? load<T>(p + i) : load_n<T>(p + i, left, 0);
    return select(live, x, set1<T>(0));
  }
  PPO_INLINE void write(scalar_t<T>* p, T x) const {
    if (whole) {
      store(p + i, x);
    } else {
      store_n(p + i, x, left);
    }
  }
};

template <class T>
PPO_INLINE void add_if(T& sum, mask_t<T> m) {
  sum = sum + select(m, set1<T>(1), set1<T>(0));
}

}  // namespace ppo::PPO_ISA
