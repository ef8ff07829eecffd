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
UpdateFn find_update_of_variant(const Entry& e) {
  const bool wide = e.compute_dtype() == DType::f64;
  return wide ? find_update_with<Rule, variant, F64>(e) : find_update_with<Rule, variant, F32>(e);
}

template <class Rule, class F32, class F64, int variant = 0>
UpdateFn find_update(int wanted, const Entry& e) {
  if constexpr (variant < Rule::variants) {
    if (wanted == variant) return find_update_of_variant<Rule, variant, F32, F64>(e);
    return find_update<Rule, F32, F64, variant + 1>(wanted, e);
  } else {
    return nullptr;
  }
}

template <class F32, class F64, class... R>
constexpr UpdatesOfRules updates_of(RuleList<R...>) {
  return {{find_update<R, F32, F64>...}};
}

}  // namespace fusedoptim
