// Pieces: runs of a loss's tokens within one sequence, and the lanes over them (no include guard,
// see foreach_isa.h).
namespace ppo::PPO_ISA {

// Tokens that are summed in T before the sums go on in double: 64 additions in an fp32 lane lose
// at most 6 bits; a whole block in the one lane of ppo::scalar would lose 10.
template <class T>
constexpr int64_t kRun = sizeof(scalar_t<T>) == 8 ? kBlock : 64 * lanes<T>;

// At most kBlock consecutive slots of one sequence; `flat` is the first of them.
struct Piece {
  int64_t sequence, column, flat, size;
};

// Piece from `slot` to the end of its sequence or to `last`, whichever comes first.
inline Piece piece_at(const SequenceMap& seqs, int64_t slot, int64_t last) {
  const int64_t s = seqs.find(slot);
  const int64_t end = seqs.end(s) < last ? seqs.end(s) : last;
  return {s, seqs.column(s, slot), slot, end - slot};
}

template <class T>
struct Buffer {
  alignas(64) scalar_t<T> data[kBlock];
};

// Values of the piece as scalars of T; null if the tensor is absent.
template <class T>
inline const scalar_t<T>* fetch_piece(const View& v, const Piece& p, Buffer<T>& buffer) {
  if (!v.data) return nullptr;
  return fetch(v, p.sequence, p.column, p.size, buffer.data);
}
inline const uint8_t* fetch_mask(const View& v, const Piece& p, uint8_t* buffer) {
  if (!v.data) return nullptr;
  return fetch_bytes(v, p.sequence, p.column, p.size, buffer);
}

// Lanes with a live token: `every` (all exist, none is masked), `masked` (all exist, some are
// masked), `tail` (only the lanes before the piece's end exist).
enum class LaneMask { every, masked, tail };

template <class T, LaneMask which>
struct Lanes {
  int64_t i, left;
  mask_t<T> live;

  // x in live lanes, 0 in dead ones.
  PPO_INLINE T only(T x) const {
    return which == LaneMask::every ? x : select(live, x, set1<T>(0));
  }
  PPO_INLINE T read(const scalar_t<T>* p) const {
    return only(which == LaneMask::tail ? load_n<T>(p + i, left, 0) : load<T>(p + i));
  }
  // Dead lanes write 0.
  PPO_INLINE void write(scalar_t<T>* p, T x) const {
    if (which == LaneMask::tail) {
      store_n(p + i, only(x), left);
    } else {
      store(p + i, only(x));
    }
  }
};

// Flags of the unmasked slots among the `left` slots from i on.
template <class T>
PPO_INLINE mask_t<T> live_lanes(const uint8_t* mask, int64_t i, int64_t left) {
  return mask ? load_mask_n<T>(mask + i, left) : first_n<T>(left);
}

// Calls step.tokens(lanes) for every vector of a piece, step.nothing(lanes) if all its lanes are
// dead.
template <class T, class Step>
PPO_INLINE void each_lanes(const uint8_t* mask, int64_t size, const Step& step) {
  int64_t i = 0;
  for (; i + lanes<T> <= size; i += lanes<T>) {
    const mask_t<T> live = mask ? load_mask<T>(mask + i) : first_n<T>(lanes<T>);
    if (all(live)) {
      step.tokens(Lanes<T, LaneMask::every>{i, lanes<T>, live});
    } else if (any(live)) {
      step.tokens(Lanes<T, LaneMask::masked>{i, lanes<T>, live});
    } else {
      step.nothing(Lanes<T, LaneMask::masked>{i, lanes<T>, live});
    }
  }
  const int64_t left = size - i;
  if (left == 0) return;
  const mask_t<T> live = live_lanes<T>(mask, i, left);
  step.tokens(Lanes<T, LaneMask::tail>{i, left, live});
}

}  // namespace ppo::PPO_ISA
