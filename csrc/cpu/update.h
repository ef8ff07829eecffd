// Which loop a tensor needs: one that was compiled for its storages, or the one over tiles.
#pragma once

#include "kernels.h"
#include "tiles.h"

namespace fusedoptim {

template <class Rule, int variant, class M>
UpdateFn find_update_with(const Entry& e) {
  const UpdateFn found = e.layout || e.row ? nullptr : find_linear<Rule, variant, M>(e);
  return found ? found : update_tiles<Rule, variant, M>;
}

template <class Rule, int variant, class F32, class F64>
UpdateFn find_update(const Entry& e) {
  const bool wide = e.compute_dtype() == DType::f64;
  return wide ? find_update_with<Rule, variant, F64>(e) : find_update_with<Rule, variant, F32>(e);
}

template <class Rule, int variant, class F32, class F64>
constexpr FindLoop find_update_of() {
  if constexpr (variant < Rule::variants)
    return find_update<Rule, variant, F32, F64>;
  else
    return nullptr;
}

template <class F32, class F64, class... R>
constexpr UpdatesOfRules updates_of(RuleList<R...>) {
  static_assert(kMaxVariants == 4 && ((R::variants <= kMaxVariants) && ...));
  return {{{find_update_of<R, 0, F32, F64>(), find_update_of<R, 1, F32, F64>(), find_update_of<R, 2, F32, F64>(),
            find_update_of<R, 3, F32, F64>()}...}};
}

}  // namespace fusedoptim
