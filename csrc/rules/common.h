// What every update rule shares. A rule is arithmetic only: values in, values out. It knows no torch, no CUDA, no
// pointers and no loops, and is compiled by the C++ compiler and by nvcc alike.
//
// A rule is written against a "lane" type M, which a backend supplies:
//   M::T                  the compute type, float or double
//   M::V                  one value of T on a GPU, a SIMD register of them on a CPU
//   M::set(T) -> V        the scalar in every lane
//   M::fma(a, b, c) -> V  a*b + c with one rounding
//   M::sqrt(a) -> V       correctly rounded (IEEE 754), as is the operator /
//   M::max(a, b) -> V     NaN if either is NaN, as torch.maximum
//   M::clamp(a, b) -> V   a within [-b, b]; NaN if a is NaN, as torch.clamp
// + - * / on V are the built-in operators. Compilers must not contract them (-ffp-contract=off, -fmad=false): every
// fma below is spelled, because it is part of the result.
//
// A rule says of itself:
//   name, hyper_names, state_names, number_names  as Python declares them (fusedoptim/*.py), which is compared when a
//                            plan is made. Numbers are states that are one fp32 number per tensor
//   has_step, sums           whether it counts steps; how many sums of squares over whole tensors it asks for
//   divides                  whether it takes roots or quotients of elements, all of which end in the parameter
//   (so does every state, in the same step: where one is a NaN or infinite, the parameter or a divisor shows it)
//   second_moment            the state that is an average, or a sum, of squares; -1 without such
//   powers, power_base       how many powers x^step its scalars need, the first uses of StepInputs::pow; their bases
//   variants, variant, uses  its variants, which one a row of hyper-parameters asks for, and that one's states
// and has these functions:
//   prepare<T>(StepInputs)          makes a tensor's Scalars<T> of numbers
//   update<variant, M>(p, g, s, c)  steps one element: parameter, gradient, states, scalars
//   next_numbers(StepInputs, out)   makes the new numbers, where it has any
// A built-in rule's only sum is that of the gradient, transformed. Others: see cpu/own_program.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "../core/dtype.h"
#include "../core/power.h"
#include "../core/row.h"

namespace fusedoptim {

// pow, remembering the last result of each of its few uses: tensors of one model differ in lr far more often than in
// beta or step, and two calls of pow cost as much as a hundred elements.
struct PowMemo {
  static constexpr int kUses = 8;
  double base[kUses] = {}, exponent[kUses] = {}, result[kUses] = {1, 1, 1, 1, 1, 1, 1, 1};  // pow(0, 0) is 1

  FUSEDOPTIM_HD double operator()(int use, double x, double y) {
    if (base[use] != x || exponent[use] != y) {
      base[use] = x;
      exponent[use] = y;
      result[use] = power(x, y);
    }
    return result[use];
  }
};

// Where a rule's scalars come from, per tensor and step. All of it is double: scalars are rounded once, at the end.
struct StepInputs {
  const double* hyper;   // the group's row, indexed by the rule's Hyper enum
  double step;           // the number of this step, counted from 1; 0 for a rule without a step
  bool first;            // the states are to be taken as absent: this is the tensor's first step
  const double* sums;    // of squares, as many as the rule asks for; NaN as long as they are not known
  const float* numbers;  // as many as the rule has, before this step; 0 for one that its group does without
  double numel;          // elements of the whole tensor
  PowMemo* pow;
};

// What most rules do without.
struct ElementwiseRule {
  static constexpr int sums = 0, powers = 0;
  enum Number { kNumbers };
  static constexpr const char* number_names[] = {nullptr};
};

// The learning rate with torch's arithmetic: a Python float computes in double, a tensor lr rounds every operation to
// its own dtype (16-bit ones compute in fp32 first). Results are returned as double, which holds each exactly.
struct Lr {
  double value;
  LrDType dtype;

  FUSEDOPTIM_HD explicit Lr(const double* hyper)
      : value(hyper[kLr]), dtype(static_cast<LrDType>(static_cast<int>(hyper[kLrDType]))) {}

  FUSEDOPTIM_HD double round(float x) const {
    if (dtype == LrDType::bf16) return bf16_to_f32(f32_to_bf16(x));
    if (dtype == LrDType::f16) return f16_to_f32(f32_to_f16(x));
    return x;
  }
  FUSEDOPTIM_HD bool in_double() const { return dtype == LrDType::python || dtype == LrDType::f64; }

  // lr / x
  FUSEDOPTIM_HD double over(double x) const {
    if (in_double()) return value / x;
    return round(static_cast<float>(value) / static_cast<float>(x));
  }
  // 1 - lr * weight_decay
  FUSEDOPTIM_HD double decay(double weight_decay) const {
    if (in_double()) return 1.0 - value * weight_decay;
    const double product = round(static_cast<float>(value) * static_cast<float>(weight_decay));
    return round(1.0f - static_cast<float>(product));
  }
};

// torch.lerp with a scalar weight: two formulas, of which the one is exact at weight 0 and the other at weight 1.
template <class T>
struct LerpWeight {
  T coefficient;
  bool from_start;

  FUSEDOPTIM_HD static LerpWeight of(double weight) {
    const T w = static_cast<T>(weight);
    const bool small = (w < 0 ? -w : w) < T(0.5);
    return {small ? w : w - T(1), small};
  }
};

// A divisor that is the same for all elements of a tensor, with its reciprocal, rounded: a division by it can then be
// three cheap operations.
template <class T>
struct Divisor {
  T value, reciprocal;

  FUSEDOPTIM_HD static Divisor of(double x) {
    const T value = static_cast<T>(x);
    return {value, T(1) / value};
  }
};

// Where roots and quotients are worked out, so that a backend for which they are slow can do it in another way that has
// the same bits (csrc/cuda/lanes.cuh does).
template <class M>
struct Quotients {
  using V = typename M::V;

  // sqrt(x) / d, two roundings
  FUSEDOPTIM_HD static V root_over(V x, const Divisor<typename M::T>& d) { return M::sqrt(x) / M::set(d.value); }
  // s + a / b, two roundings
  FUSEDOPTIM_HD static V add_ratio(V s, V a, V b) { return s + a / b; }
};

template <class M>
FUSEDOPTIM_HD typename M::V lerp(typename M::V start, typename M::V end, const LerpWeight<typename M::T>& w) {
  return M::fma(M::set(w.coefficient), end - start, w.from_start ? start : end);
}

// torch.addcmul(s, a, b, value=v) for a and b the same tensor
template <class M>
FUSEDOPTIM_HD typename M::V add_scaled_square(typename M::V s, typename M::V a, typename M::T v) {
  return M::fma(M::set(v) * a, a, s);
}

// torch.addcdiv(s, a, b, value=v)
template <class M>
FUSEDOPTIM_HD typename M::V add_scaled_ratio(typename M::V s, typename M::V a, typename M::V b, typename M::T v) {
  return Quotients<M>::add_ratio(s, M::set(v) * a, b);
}

// maximize and coupled weight decay, with which four of the rules begin
template <class T>
struct WeightDecay {
  T weight_decay;
  bool maximize, decays;
};

template <class M>
FUSEDOPTIM_HD typename M::V apply_weight_decay(typename M::V g, typename M::V p, const WeightDecay<typename M::T>& c) {
  if (c.maximize) g = -g;
  if (c.decays) g = M::fma(M::set(c.weight_decay), p, g);
  return g;
}

}  // namespace fusedoptim
