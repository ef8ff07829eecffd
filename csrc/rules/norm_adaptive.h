// A step whose length is normalised by a moving average of the tensor's gradient norm:
//   n = ||g||_2,  a = beta*a + (1-beta)*n from a = 0,  p = p*(1 - lr*weight_decay) - (lr / (a + eps)) * g
// The average is one fp32 scalar per tensor; it and the step length are computed in double and rounded once to fp32,
// whatever the dtype of the parameter. Where a + eps is 0, the step length is 0.
#pragma once

#include "common.h"

namespace fusedoptim {

struct NormAdaptive : ElementwiseRule {
  static constexpr const char* name = "norm_adaptive";
  static constexpr bool has_step = true, divides = false;
  static constexpr int sums = 1;
  enum Hyper { kBeta = kFirstRuleHyper, kEps, kWeightDecay, kMaximize, kHypers };
  static constexpr const char* hyper_names[] = {"beta", "eps", "weight_decay", "maximize"};
  enum Slot { kSlots };
  static constexpr int second_moment = -1;
  static constexpr const char* state_names[] = {nullptr};
  enum Number { kAvgGradNorm, kNumbers };
  static constexpr const char* number_names[] = {"avg_grad_norm"};

  static constexpr int variants = 1;
  static int variant(const double*) { return 0; }
  static constexpr bool uses(int, int) { return false; }

  template <class T>
  struct Scalars {
    T decay, neg_step_size;
  };

  FUSEDOPTIM_HD static void next_numbers(const StepInputs& in, float* out) {
    const double beta = in.hyper[kBeta], before = in.numbers[kAvgGradNorm];
    const float norm = static_cast<float>(std::sqrt(in.sums[0]));
    out[kAvgGradNorm] = static_cast<float>(beta * before + (1.0 - beta) * static_cast<double>(norm));
  }

  template <class T>
  FUSEDOPTIM_HD static Scalars<T> prepare(const StepInputs& in) {
    const double* h = in.hyper;
    float average[kNumbers];
    next_numbers(in, average);
    const double divisor = static_cast<double>(average[kAvgGradNorm]) + h[kEps];
    const float step_size = divisor != 0 ? static_cast<float>(h[kLr] / divisor) : 0.0f;
    Scalars<T> c;
    c.decay = h[kWeightDecay] != 0 ? static_cast<float>(1.0 - h[kLr] * h[kWeightDecay]) : 1.0f;
    c.neg_step_size = h[kMaximize] != 0 ? step_size : -step_size;
    return c;
  }

  template <int variant, class M>
  FUSEDOPTIM_HD static void update(typename M::V& p, typename M::V g, typename M::V*, const Scalars<typename M::T>& c) {
    p = M::fma(M::set(c.neg_step_size), g, p * M::set(c.decay));
  }
};

}  // namespace fusedoptim
