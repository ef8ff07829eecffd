// No optimizer: a gradient in the parameter's place becomes what other rules get, so that clipping alone is a step,
// too.
#pragma once

#include "common.h"

namespace fusedoptim {

struct Clip : ElementwiseRule {
  static constexpr const char* name = "clip";
  static constexpr bool has_step = false, divides = false;
  enum Hyper { kHypers = kFirstRuleHyper };
  static constexpr const char* hyper_names[] = {nullptr};
  enum Slot { kSlots };
  static constexpr const char* state_names[] = {nullptr};
  static constexpr int second_moment = -1;

  static constexpr int variants = 1;
  static int variant(const double*) { return 0; }
  static constexpr bool uses(int, int) { return false; }

  template <class T>
  struct Scalars {};

  template <class T>
  FUSEDOPTIM_HD static Scalars<T> prepare(const StepInputs&) {
    return {};
  }

  template <int variant, class M>
  FUSEDOPTIM_HD static void update(typename M::V& p, typename M::V g, typename M::V*, const Scalars<typename M::T>&) {
    p = g;
  }
};

}  // namespace fusedoptim
