// Stochastic gradient descent with momentum (Sutskever et al., ICML 2013), with the roundings of torch.optim's own
// eager code. On a tensor's first step the momentum buffer becomes the gradient itself, without dampening.
#pragma once

#include "common.h"

namespace fusedoptim {

struct SGD : ElementwiseRule {
  static constexpr const char* name = "sgd";
  static constexpr bool has_step = false, divides = false;
  enum Hyper { kMomentum = kFirstRuleHyper, kDampening, kWeightDecay, kNesterov, kMaximize, kHypers };
  static constexpr const char* hyper_names[] = {"momentum", "dampening", "weight_decay", "nesterov", "maximize"};
  enum Slot { kMomentumBuffer, kSlots };
  static constexpr int second_moment = -1;
  static constexpr const char* state_names[] = {"momentum_buffer"};

  // variant 1 has momentum
  static constexpr int variants = 2;
  static int variant(const double* h) { return h[kMomentum] != 0; }
  static constexpr bool uses(int variant, int) { return variant == 1; }

  template <class T>
  struct Scalars {
    WeightDecay<T> weight_decay;
    T momentum, one_minus_dampening, neg_lr;
    bool nesterov, first;
  };

  template <class T>
  FUSEDOPTIM_HD static Scalars<T> prepare(const StepInputs& in) {
    const double* h = in.hyper;
    Scalars<T> c;
    c.weight_decay = {static_cast<T>(h[kWeightDecay]), h[kMaximize] != 0, h[kWeightDecay] != 0};
    c.momentum = static_cast<T>(h[kMomentum]);
    c.one_minus_dampening = static_cast<T>(1.0 - h[kDampening]);
    c.neg_lr = static_cast<T>(-h[kLr]);
    c.nesterov = h[kNesterov] != 0;
    c.first = in.first;
    return c;
  }

  template <int variant, class M>
  FUSEDOPTIM_HD static void update(typename M::V& p, typename M::V g, typename M::V* s,
                                   const Scalars<typename M::T>& c) {
    g = apply_weight_decay<M>(g, p, c.weight_decay);
    if constexpr (variant == 1) {
      typename M::V& buf = s[kMomentumBuffer];
      if (c.first)
        buf = g;
      else
        buf = M::fma(M::set(c.one_minus_dampening), g, buf * M::set(c.momentum));
      g = c.nesterov ? M::fma(M::set(c.momentum), buf, g) : buf;
    }
    p = M::fma(M::set(c.neg_lr), g, p);
  }
};

}  // namespace fusedoptim
