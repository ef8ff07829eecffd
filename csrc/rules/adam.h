// Adam (Kingma and Ba, arXiv:1412.6980), AdamW (Loshchilov and Hutter, arXiv:1711.05101) and AMSGrad (Reddi et al.,
// arXiv:1904.09237), with the roundings of torch.optim's own eager code.
#pragma once

#include "common.h"

namespace fusedoptim {

struct Adam : ElementwiseRule {
  static constexpr const char* name = "adam";
  static constexpr bool has_step = true, divides = true;
  enum Hyper {
    kBeta1 = kFirstRuleHyper,
    kBeta2,
    kEps,
    kWeightDecay,
    kAmsgrad,
    kMaximize,
    kDecoupled,
    kBiasCorrection,
    kHypers
  };
  static constexpr const char* hyper_names[] = {
      "betas[0]",       "betas[1]", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay",
      "bias_correction"};
  enum Slot { kExpAvg, kExpAvgSq, kMaxExpAvgSq, kSlots };
  static constexpr int second_moment = kExpAvgSq;
  static constexpr const char* state_names[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};

  static constexpr int powers = 2;
  FUSEDOPTIM_HD static double power_base(const double* h, int use) { return h[kBeta1 + use]; }

  // variant 1 is AMSGrad
  static constexpr int variants = 2;
  static int variant(const double* h) { return h[kAmsgrad] != 0; }
  static constexpr bool uses(int variant, int slot) { return slot != kMaxExpAvgSq || variant == 1; }

  template <class T>
  struct Scalars {
    WeightDecay<T> weight_decay;
    T decay;
    LerpWeight<T> toward_grad;
    T beta2, one_minus_beta2;
    Divisor<T> bias_correction2_sqrt;
    T eps, neg_step_size;
  };

  template <class T>
  FUSEDOPTIM_HD static Scalars<T> prepare(const StepInputs& in) {
    const double* h = in.hyper;
    const bool corrects = h[kBiasCorrection] != 0, decoupled = h[kDecoupled] != 0, decays = h[kWeightDecay] != 0;
    const double bias_correction1 = corrects ? 1.0 - (*in.pow)(0, power_base(h, 0), in.step) : 1.0;
    const double bias_correction2 = corrects ? 1.0 - (*in.pow)(1, power_base(h, 1), in.step) : 1.0;
    const Lr lr(h);
    Scalars<T> c;
    c.weight_decay = {static_cast<T>(h[kWeightDecay]), h[kMaximize] != 0, decays && !decoupled};
    c.decay = decays && decoupled ? static_cast<T>(lr.decay(h[kWeightDecay])) : T(1);
    c.toward_grad = LerpWeight<T>::of(1.0 - h[kBeta1]);
    c.beta2 = static_cast<T>(h[kBeta2]);
    c.one_minus_beta2 = static_cast<T>(1.0 - h[kBeta2]);
    c.bias_correction2_sqrt = Divisor<T>::of((*in.pow)(2, bias_correction2, 0.5));  // Python's **, not sqrt
    c.eps = static_cast<T>(h[kEps]);
    c.neg_step_size = static_cast<T>(-lr.over(bias_correction1));
    return c;
  }

  template <int variant, class M>
  FUSEDOPTIM_HD static void update(typename M::V& p, typename M::V g, typename M::V* s,
                                   const Scalars<typename M::T>& c) {
    p = p * M::set(c.decay);  // decay is 1, which changes nothing, unless it is decoupled and on
    g = apply_weight_decay<M>(g, p, c.weight_decay);
    s[kExpAvg] = lerp<M>(s[kExpAvg], g, c.toward_grad);
    s[kExpAvgSq] = add_scaled_square<M>(s[kExpAvgSq] * M::set(c.beta2), g, c.one_minus_beta2);
    typename M::V second = s[kExpAvgSq];
    if constexpr (variant == 1) second = s[kMaxExpAvgSq] = M::max(s[kMaxExpAvgSq], second);
    const typename M::V denom = Quotients<M>::root_over(second, c.bias_correction2_sqrt) + M::set(c.eps);
    p = add_scaled_ratio<M>(p, s[kExpAvg], denom, c.neg_step_size);
  }
};

}  // namespace fusedoptim
