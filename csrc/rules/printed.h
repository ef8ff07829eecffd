// What printed rules call (fusedoptim/own_rules/cpp.py), beside common.h: operations on lanes that no built-in rule
// has, with the compiler's own vectors, and numbers.
#pragma once

#include <cstring>
#include <type_traits>

#include "common.h"

namespace fusedoptim::printed {

inline double power_of(const StepInputs& in, int use, double x, double y) {
  return in.pow && use < PowMemo::kUses ? (*in.pow)(use, x, y) : power(x, y);
}
inline double fp32(double x) { return static_cast<float>(x); }

// What is computed with a learning rate that is a tensor.
inline double lr_add(const Lr& lr, double a, double b) {
  return lr.in_double() ? a + b : lr.round(static_cast<float>(a) + static_cast<float>(b));
}
inline double lr_sub(const Lr& lr, double a, double b) {
  return lr.in_double() ? a - b : lr.round(static_cast<float>(a) - static_cast<float>(b));
}
inline double lr_mul(const Lr& lr, double a, double b) {
  return lr.in_double() ? a * b : lr.round(static_cast<float>(a) * static_cast<float>(b));
}
inline double lr_div(const Lr& lr, double a, double b) {
  return lr.in_double() ? a / b : lr.round(static_cast<float>(a) / static_cast<float>(b));
}

// Unsigned integers, as many and as wide as the numbers of a register.
template <int size, int width>
struct Words;
template <int width>
struct Words<4, width> {
  typedef uint32_t U __attribute__((vector_size(4 * width)));
};
template <int width>
struct Words<8, width> {
  typedef uint64_t U __attribute__((vector_size(8 * width)));
};
template <>
struct Words<4, 1> {
  using U = uint32_t;
};
template <>
struct Words<8, 1> {
  using U = uint64_t;
};

template <class M>
struct Bits {
  using U = typename Words<sizeof(typename M::T), M::width>::U;
  using Word = typename Words<sizeof(typename M::T), 1>::U;
  static constexpr Word kSign = Word{1} << (8 * sizeof(Word) - 1);

  FUSEDOPTIM_INLINE static U of(typename M::V v) {
    U u;
    static_assert(sizeof(u) == sizeof(v));
    memcpy(&u, &v, sizeof(u));
    return u;
  }
  FUSEDOPTIM_INLINE static typename M::V value(U u) {
    typename M::V v;
    memcpy(&v, &u, sizeof(v));
    return v;
  }
};

// A mask is what a comparison of V gives: a register of integers, or a bool.
template <class M, class Mask>
FUSEDOPTIM_INLINE typename M::V where_(Mask mask, typename M::V a, typename M::V b) {
  return mask ? a : b;
}
template <class M, class Mask>
FUSEDOPTIM_INLINE Mask and_(Mask a, Mask b) {
  return a & b;
}
template <class M, class Mask>
FUSEDOPTIM_INLINE Mask or_(Mask a, Mask b) {
  return a | b;
}
template <class M, class Mask>
FUSEDOPTIM_INLINE Mask not_(Mask a) {
  if constexpr (std::is_same_v<Mask, bool>)
    return !a;
  else
    return ~a;
}

template <class M>
FUSEDOPTIM_INLINE typename M::V abs_(typename M::V v) {
  return Bits<M>::value(Bits<M>::of(v) & ~Bits<M>::kSign);
}
template <class M>
FUSEDOPTIM_INLINE typename M::V copysign_(typename M::V size, typename M::V sign) {
  return Bits<M>::value((Bits<M>::of(size) & ~Bits<M>::kSign) | (Bits<M>::of(sign) & Bits<M>::kSign));
}
// 0 for a zero of either sign and for a NaN, as torch.sign.
template <class M>
FUSEDOPTIM_INLINE typename M::V sign_(typename M::V v) {
  const typename M::V zero = M::set(0), one = M::set(1);
  return (v > zero ? one : zero) - (v < zero ? one : zero);
}
// NaN if either is; of two zeros the second, as torch.minimum.
template <class M>
FUSEDOPTIM_INLINE typename M::V min_(typename M::V a, typename M::V b) {
  return a != a ? a : a < b ? a : b;
}

}  // namespace fusedoptim::printed
