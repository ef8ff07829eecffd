// The order of work in a step, for one element: once for every rule and loop. Loops load what it takes, and store what
// it leaves, of the first half before they begin the second: registers are few. (M: see common.h.)
#pragma once

#include "../core/operand.h"
#include "../core/transforms.h"
#include "common.h"

namespace fusedoptim {

// The values of an element's operands, in the compute type: before, then after it was updated.
template <class V>
struct Element {
  V param, grad, state[kStates];
};

// What is done to a gradient before the rule, in the compute type.
template <class T>
struct GradTransform {
  T unscale, coefficient, limit;

  FUSEDOPTIM_HD static GradTransform of(const GroupTransforms& t) {
    return {static_cast<T>(t.unscale), static_cast<T>(t.coefficient), static_cast<T>(t.limit)};
  }
};

template <class M>
FUSEDOPTIM_HD typename M::V transform_grad(typename M::V g, const GradTransform<typename M::T>& t) {
  return M::clamp(g * M::set(t.unscale) * M::set(t.coefficient), M::set(t.limit));
}

// A group's transforms in the compute type, worked out once and not for every element.
template <class T>
struct Transforms {
  GradTransform<T> grad;
  LerpWeight<T> toward_param;
  bool leave_gradient, zero_grad;

  FUSEDOPTIM_HD static Transforms of(const GroupTransforms& t) {
    return {GradTransform<T>::of(t), LerpWeight<T>::of(1.0 - t.ema_decay), t.leave_gradient(), t.zero_grad};
  }
};

// What is known when a loop is compiled of what surrounds the rule: a 16-bit loop has few cycles to spare for asking.
enum class Around { nothing, before, everything };

// Of n elements, the first half of the work: the gradient, and the rule.
template <class Rule, int variant, class M, Around around, int n>
FUSEDOPTIM_HD void update_elements(Element<typename M::V> (&x)[n], const Transforms<typename M::T>& t,
                                   const typename Rule::template Scalars<typename M::T>& c) {
  if (around != Around::nothing && !t.leave_gradient) {
    FUSEDOPTIM_UNROLL
    for (int j = 0; j < n; ++j) x[j].grad = transform_grad<M>(x[j].grad, t.grad);
  }
  FUSEDOPTIM_UNROLL
  for (int j = 0; j < n; ++j) Rule::template update<variant, M>(x[j].param, x[j].grad, x[j].state, c);
}

// The second: the moving average. param: as it reads once it was stored. (Then come zeros in the gradient's place.)
template <class M>
FUSEDOPTIM_HD void average_element(Element<typename M::V>& x, const Transforms<typename M::T>& t, typename M::V param) {
  x.state[kAverage] = lerp<M>(x.state[kAverage], param, t.toward_param);
}

}  // namespace fusedoptim
