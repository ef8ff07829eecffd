// RMSprop (Hinton, lecture 6e of Neural Networks for Machine Learning, 2012), its centered form (Graves,
// arXiv:1308.0850) and its momentum, with the roundings of torch.optim's own eager code; eps inside the root as
// TensorFlow has it.
#pragma once

#include "common.h"

namespace fusedoptim {

struct RMSprop : ElementwiseRule {
  static constexpr const char* name = "rmsprop";
  static constexpr bool has_step = true, divides = true;
  enum Hyper { kAlpha = kFirstRuleHyper, kEps, kWeightDecay, kMomentum, kCentered, kMaximize, kEpsInsideRoot, kHypers };
  static constexpr const char* hyper_names[] = {"alpha",    "eps",      "weight_decay",   "momentum",
                                                "centered", "maximize", "eps_inside_root"};
  enum Slot { kSquareAvg, kMomentumBuffer, kGradAvg, kSlots };
  static constexpr int second_moment = kSquareAvg;
  static constexpr const char* state_names[] = {"square_avg", "momentum_buffer", "grad_avg"};

  // bit 0 of the variant: momentum; bit 1: centered
  static constexpr int variants = 4;
  static int variant(const double* h) { return (h[kMomentum] > 0 ? 1 : 0) | (h[kCentered] != 0 ? 2 : 0); }
  static constexpr bool uses(int variant, int slot) {
    return slot == kSquareAvg || (slot == kMomentumBuffer ? (variant & 1) != 0 : (variant & 2) != 0);
  }

  template <class T>
  struct Scalars {
    WeightDecay<T> weight_decay;
    LerpWeight<T> toward_grad;
    T alpha, one_minus_alpha, eps_inside, eps_outside, momentum, neg_lr;
  };

  template <class T>
  FUSEDOPTIM_HD static Scalars<T> prepare(const StepInputs& in) {
    const double* h = in.hyper;
    Scalars<T> c;
    c.weight_decay = {static_cast<T>(h[kWeightDecay]), h[kMaximize] != 0, h[kWeightDecay] != 0};
    c.toward_grad = LerpWeight<T>::of(1.0 - h[kAlpha]);
    c.alpha = static_cast<T>(h[kAlpha]);
    c.one_minus_alpha = static_cast<T>(1.0 - h[kAlpha]);
    // One of the two is -0, which changes no number that it is added to, not even -0.
    const bool inside = h[kEpsInsideRoot] != 0;
    c.eps_inside = inside ? static_cast<T>(h[kEps]) : T(-0.0);
    c.eps_outside = inside ? T(-0.0) : static_cast<T>(h[kEps]);
    c.momentum = static_cast<T>(h[kMomentum]);
    c.neg_lr = static_cast<T>(-h[kLr]);
    return c;
  }

  template <int variant, class M>
  FUSEDOPTIM_HD static void update(typename M::V& p, typename M::V g, typename M::V* s,
                                   const Scalars<typename M::T>& c) {
    using T = typename M::T;
    g = apply_weight_decay<M>(g, p, c.weight_decay);
    s[kSquareAvg] = add_scaled_square<M>(s[kSquareAvg] * M::set(c.alpha), g, c.one_minus_alpha);
    typename M::V variance = s[kSquareAvg];
    if constexpr ((variant & 2) != 0) {
      s[kGradAvg] = lerp<M>(s[kGradAvg], g, c.toward_grad);
      variance = add_scaled_square<M>(variance, s[kGradAvg], T(-1));
    }
    const typename M::V denom = M::sqrt(variance + M::set(c.eps_inside)) + M::set(c.eps_outside);
    if constexpr ((variant & 1) != 0) {
      s[kMomentumBuffer] = add_scaled_ratio<M>(s[kMomentumBuffer] * M::set(c.momentum), g, denom, T(1));
      p = M::fma(M::set(c.neg_lr), s[kMomentumBuffer], p);
    } else {
      p = add_scaled_ratio<M>(p, g, denom, c.neg_lr);
    }
  }
};

}  // namespace fusedoptim
