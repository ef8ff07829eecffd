// The storages that loops are compiled for.
#pragma once

#include <type_traits>

#include "../core/tensor_table.h"
#include "pairs.h"

namespace fusedoptim {

// The storages of parameter, gradient, states, and of the state that is the second moment. unencoded: a loop of a tile,
// which leaves fp32 numbers where UpdateInputs say, or in an fp32 parameter itself, and random words.
template <Storage param_, Storage grad_, Storage state_ = grad_, Storage second_ = state_, bool unencoded_ = false>
struct Mix {
  static constexpr Storage param = param_, grad = grad_, state = state_, second = second_;
  static constexpr bool unencoded = unencoded_;
  static constexpr Storage result = unencoded ? Storage::f32 : param;
  static constexpr bool has_pairs = can_pair(param) && can_pair(grad) && can_pair(state) && can_pair(second);
  static_assert(!is_stochastic(state), "only these two share a word");

  template <class Rule>
  static constexpr Storage of_slot(int k) {
    return k == Rule::second_moment ? second : state;
  }
  template <class Rule>
  static constexpr bool takes_random() {
    return unencoded || is_stochastic(param) || (Rule::second_moment >= 0 && is_stochastic(second));
  }
};

// Calls f(slot) for each state that the variant has; slots are constants.
template <class Rule, int variant, int k = 0, class F>
FUSEDOPTIM_INLINE void for_each_slot(const F& f) {
  if constexpr (k < Rule::kSlots) {
    if constexpr (Rule::uses(variant, k)) f(std::integral_constant<int, k>{});
    for_each_slot<Rule, variant, k + 1>(f);
  }
}
template <class Rule>
constexpr int count_slots(int variant) {
  int n = 0;
  for (int k = 0; k < Rule::kSlots; ++k) n += Rule::uses(variant, k);
  return n;
}

// ---- which of them a rule has ----

template <class... X>
struct MixList {
  template <class... Y>
  MixList<X..., Y...> operator+(MixList<Y...>) const;
};
template <class A, class B>
using Joined = decltype(A{} + B{});

// Linear: loops over a tensor whose operands share one dense memory order. Unencoded: those of a tile, whose states are
// of the compute type.
template <class Rule, int variant, class M>
struct DefaultLoops {
  using S = Storage;
  static constexpr bool in_f64 = sizeof(typename M::T) == 8, has_states = count_slots<Rule>(variant) > 0;
  using Usual = MixList<Mix<S::f32, S::f32>, Mix<S::bf16, S::bf16>, Mix<S::f16, S::f16>, Mix<S::bf16, S::bf16, S::f32>>;
  // What the documentation recommends, where no state is stochastic but the second moment.
  using Recommended = MixList<Mix<S::bf16_remainder, S::bf16, S::bf16, S::bf16_stochastic>,
                              Mix<S::bf16_stochastic, S::bf16, S::bf16, S::bf16_stochastic>,
                              Mix<S::bf16, S::bf16, S::bf16, S::bf16_stochastic>,
                              Mix<S::bf16_remainder, S::bf16, S::f32>, Mix<S::bf16_stochastic, S::bf16, S::f32>,
                              Mix<S::bf16_master, S::bf16, S::f32>, Mix<S::f32, S::f32, S::bf16, S::bf16_stochastic>>;
  using Linear =
      std::conditional_t<in_f64, MixList<Mix<S::f64, S::f64>>,
                         std::conditional_t<(M::width > 1 && has_states), Joined<Usual, Recommended>, Usual>>;
  using Unencoded = std::conditional_t<
      (M::width > 1 && !in_f64),
      MixList<Mix<S::bf16_remainder, S::bf16, S::f32, S::f32, true>,
              Mix<S::bf16_remainder8, S::bf16, S::f32, S::f32, true>,
              Mix<S::bf16_stochastic, S::bf16, S::f32, S::f32, true>, Mix<S::f32, S::f32, S::f32, S::f32, true>>,
      MixList<>>;
};

// A rule of a library of its own names its own.
template <class Rule, int variant, class M, class = void>
struct LoopsOf : DefaultLoops<Rule, variant, M> {};
template <class Rule, int variant, class M>
struct LoopsOf<Rule, variant, M, std::void_t<typename Rule::Linear>> {
  using Linear = typename Rule::Linear;
  using Unencoded = typename Rule::Unencoded;
};

// Whether no Mix has an entry's storages, or its layout none of these loops. states: a bit for each that is used.
FUSEDOPTIM_INLINE bool needs_tiles(const Entry& e, uint32_t states, int second_moment) {
  using S = Storage;
  const S param = e.param().storage, grad = e.grad().storage;
  if (e.layout || e.row || !is_dtype(grad)) return true;
  const bool in_f64 = param == S::f64;
  bool is_mix = (grad == S::f64) == in_f64;
  S state = S::unsupported;  // of all but the second moment, so far
  for (int k = 0; k < kMaxSlots; ++k) {
    if (!(states >> k & 1)) continue;
    const S s = e.state(k).storage;
    is_mix = is_mix && (s == S::f64) == in_f64 && (is_dtype(s) || (k == second_moment && s == S::bf16_stochastic));
    if (k == second_moment) continue;
    is_mix = is_mix && (state == S::unsupported || s == state);
    state = s;
  }
  return !is_mix;
}

}  // namespace fusedoptim
