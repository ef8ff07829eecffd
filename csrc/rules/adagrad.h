// Adagrad (Duchi, Hazan and Singer, JMLR 12, 2011), with the roundings of torch.optim's own eager code.
#pragma once

#include "common.h"

namespace fusedoptim {

struct Adagrad : ElementwiseRule {
  static constexpr const char* name = "adagrad";
  static constexpr bool has_step = true, divides = true;
  enum Hyper { kLrDecay = kFirstRuleHyper, kWeightDecay, kEps, kMaximize, kHypers };
  static constexpr const char* hyper_names[] = {"lr_decay", "weight_decay", "eps", "maximize"};
  enum Slot { kSum, kSlots };
  static constexpr int second_moment = kSum;
  static constexpr const char* state_names[] = {"sum"};

  static constexpr int variants = 1;
  static int variant(const double*) { return 0; }
  static constexpr bool uses(int, int) { return true; }

  template <class T>
  struct Scalars {
    WeightDecay<T> weight_decay;
    T eps, neg_clr;
  };

  template <class T>
  FUSEDOPTIM_HD static Scalars<T> prepare(const StepInputs& in) {
    const double* h = in.hyper;
    Scalars<T> c;
    c.weight_decay = {static_cast<T>(h[kWeightDecay]), h[kMaximize] != 0, h[kWeightDecay] != 0};
    c.eps = static_cast<T>(h[kEps]);
    c.neg_clr = static_cast<T>(-Lr(h).over(1.0 + (in.step - 1.0) * h[kLrDecay]));
    return c;
  }

  template <int variant, class M>
  FUSEDOPTIM_HD static void update(typename M::V& p, typename M::V g, typename M::V* s,
                                   const Scalars<typename M::T>& c) {
    g = apply_weight_decay<M>(g, p, c.weight_decay);
    s[kSum] = add_scaled_square<M>(s[kSum], g, typename M::T(1));
    p = add_scaled_ratio<M>(p, g, M::sqrt(s[kSum]) + M::set(c.eps), c.neg_clr);
  }
};

}  // namespace fusedoptim
