// The loop that updates elements, once for every rule, variant, compute type and instruction set: it loads, has
// rules/step_element.h do the work, and stores. Storages are known when it is compiled; for others see tiles.h.
//
// Cost: a step waits for memory (28 bytes per element for AdamW in fp32), and has about 30 cycles per 16 elements and
// core to spare for arithmetic.
#pragma once

#include "../core/tensor_table.h"
#include "../rules/step_element.h"
#include "mixes.h"

namespace fusedoptim {

template <class Rule, int variant, class M, class X, Around around>
class Loop {
 public:
  using T = typename M::T;
  using V = typename M::V;
  using U = typename Integers<M::width>::U;
  using Scalars = typename Rule::template Scalars<T>;

  // upper_index: of the places of all elements in the whole tensor, where random bits are taken.
  FUSEDOPTIM_INLINE Loop(const Entry& e, const UpdateInputs& in, uint32_t upper_index = 0)
      : e_(e),
        c_(*static_cast<const Scalars*>(in.scalars)),
        t_(without_asking(Transforms<T>::of(in.transforms))),
        average_(around == Around::everything && !X::unencoded && e.state(kAverage).data &&
                 in.transforms.ema_decay >= 0),
        zero_grad_(around == Around::everything && in.transforms.zero_grad),
        result_(X::result == X::param ? e.param() : Operand{in.params, nullptr, X::result}),
        words_(in.words),
        key_(X::template takes_random<Rule>() ? RandomKey::of(in.stream, 0, upper_index) : RandomKey{}) {}

  FUSEDOPTIM_INLINE void run(int64_t begin, int64_t end) const {
    int64_t i = begin;
    if constexpr (X::has_pairs && M::has_pairs) {
      if (!average_) {
        Words words = words_from(i, 2);
        for (; i + 2 * M::width <= end; i += 2 * M::width) step_pair(i, words);
      }
    }
    Words words = words_from(i, 1);
    for (; i + M::width <= end; i += M::width) step<true>(i, M::width, words);
    if (i < end) step<false>(i, static_cast<int>(end - i), words);
  }

 private:
  // Of the parameter and the second moment, which share a word; the other states take none.
  static constexpr int kParamHalf = 0, kSecondHalf = 1;
  struct NoWords {
    FUSEDOPTIM_INLINE U next() { return U{}; }
    FUSEDOPTIM_INLINE void next_pair(U (&word)[2]) { word[0] = word[1] = U{}; }
  };
  using Words = std::conditional_t<X::template takes_random<Rule>(), RandomWords<M>, NoWords>;

  FUSEDOPTIM_INLINE Words words_from(int64_t i, uint32_t stride) const {
    if constexpr (X::template takes_random<Rule>())
      return Words(static_cast<uint32_t>(e_.first_index + i), key_, stride);
    else
      return {};
  }

  // The last n < width elements go through the same lanes as all others, hence have the same bits, but perhaps for the
  // sign of a NaN.
  template <bool full>
  FUSEDOPTIM_INLINE void step(int64_t i, int n, Words& words) const {
    Element<V> y[1], &x = y[0];
    x.param = load_lanes<X::param, full>(e_.param(), i, n);
    x.grad = load_lanes<X::grad, full>(e_.grad(), i, n);
    for_each_slot<Rule, variant>([&](auto k) FUSEDOPTIM_INLINE_LAMBDA {
      x.state[k] = load_lanes<X::template of_slot<Rule>(k), full>(e_.state(k), i, n);
    });
    update_elements<Rule, variant, M, around>(y, t_, c_);
    const U word = X::unencoded && !words_ ? U{} : words.next();
    if (X::unencoded && words_) memcpy(words_ + i, &word, full ? sizeof(word) : n * sizeof(uint32_t));
    for_each_slot<Rule, variant>([&](auto k) FUSEDOPTIM_INLINE_LAMBDA {
      store_lanes<X::template of_slot<Rule>(k), kSecondHalf, full>(e_.state(k), i, n, x.state[k], word);
    });
    store_lanes<X::result, kParamHalf, full>(result_, i, n, x.param, word);
    if (average_) {
      constexpr Storage average = storage_of(kCompute<T>);
      x.state[kAverage] = load_lanes<average, full>(e_.state(kAverage), i, n);
      average_element<M>(x, t_, as_stored<M, X::param>(x.param, word & 0xffffu));
      store_lanes<average, 0, full>(e_.state(kAverage), i, n, x.state[kAverage], word);
    }
    if (zero_grad_) store_lanes<X::grad, 0, full>(e_.grad(), i, n, M::set(0), word);
  }

  template <Storage s, bool full>
  FUSEDOPTIM_INLINE static V load_lanes(const Operand& o, int64_t i, int n) {
    if constexpr (full) return load<M, s>(o, i);
    alignas(64) T x[M::width] = {};
    load_some<M>(x, {o.data, o.extra, s}, i, n);
    return M::load(x);
  }
  template <Storage s, int half, bool full>
  FUSEDOPTIM_INLINE static void store_lanes(const Operand& o, int64_t i, int n, V v, U word) {
    if constexpr (full) return store<M, s>(o, i, v, half == 0 ? word & 0xffffu : word >> 16);
    alignas(64) T x[M::width];
    uint32_t words[M::width];
    M::store(x, v);
    memcpy(words, &word, sizeof(words));
    store_some<M>(x, {o.data, o.extra, s}, i, n, {words, 16 * half});
  }

  // All operands of 16 bits: 2*width elements at once.
  FUSEDOPTIM_INLINE void step_pair(int64_t i, Words& words) const {
    using P = Pairs<M>;
    Element<V> x[2];
    P::template load<X::param>(e_.param(), i, x[0].param, x[1].param);
    P::template load<X::grad>(e_.grad(), i, x[0].grad, x[1].grad);
    for_each_slot<Rule, variant>([&](auto k) FUSEDOPTIM_INLINE_LAMBDA {
      P::template load<X::template of_slot<Rule>(k)>(e_.state(k), i, x[0].state[k], x[1].state[k]);
    });
    update_elements<Rule, variant, M, around>(x, t_, c_);
    U word[2];
    words.next_pair(word);
    V stored[2 + 2 * kSlots] = {x[0].param, x[1].param};
    int n = 2;
    for_each_slot<Rule, variant>([&](auto k) FUSEDOPTIM_INLINE_LAMBDA {
      stored[n++] = x[0].state[k];
      stored[n++] = x[1].state[k];
    });
    if (__builtin_expect(M::any_nan(stored), false)) {
      for_each_slot<Rule, variant>([&](auto k) FUSEDOPTIM_INLINE_LAMBDA {
        P::store_slowly(e_.state(k), i, x[0].state[k], x[1].state[k], word[0], word[1], 16 * kSecondHalf);
      });
      P::store_slowly(e_.param(), i, x[0].param, x[1].param, word[0], word[1], 16 * kParamHalf);
    } else {
      for_each_slot<Rule, variant>([&](auto k) FUSEDOPTIM_INLINE_LAMBDA {
        constexpr Storage s = X::template of_slot<Rule>(k);
        P::template store<s, kSecondHalf>(e_.state(k), i, x[0].state[k], x[1].state[k], word);
      });
      P::template store<X::param, kParamHalf>(e_.param(), i, x[0].param, x[1].param, word);
    }
    if (zero_grad_) P::store_bits(e_.grad().data, i, U{});
  }

  // In a loop that does everything, transforming costs less than asking whether to.
  static FUSEDOPTIM_INLINE Transforms<T> without_asking(Transforms<T> t) {
    if (around == Around::everything) t.leave_gradient = false;
    return t;
  }

  static constexpr int kSlots = count_slots<Rule>(variant);

  const Entry e_;  // copies, whose fields no store can alias
  const Scalars c_;
  const Transforms<T> t_;
  const bool average_, zero_grad_;
  const Operand result_;
  uint32_t* const words_;
  const RandomKey key_;  // of word 0
};

template <class Rule, int variant, class M, class X>
FUSEDOPTIM_INLINE void run_loop(const Entry& e, int64_t begin, int64_t end, const UpdateInputs& in,
                                uint32_t upper_index = 0) {
  // fp32 and 16 bits have a loop without anything around the rule: 16 bits have few cycles to spare.
  if constexpr (sizeof(typename M::T) == 4) {
    if (in.transforms.do_nothing()) {
      Loop<Rule, variant, M, X, Around::nothing>(e, in, upper_index).run(begin, end);
      return;
    }
  }
  Loop<Rule, variant, M, X, Around::everything>(e, in, upper_index).run(begin, end);
}

// Operands that share one dense memory order, which is the logical one where random bits are taken: their key changes
// every 2^32 elements.
template <class Rule, int variant, class M, class X>
void update_linear(const Entry& e, int64_t begin, int64_t end, const UpdateInputs& in) {
  if constexpr (!X::template takes_random<Rule>()) return run_loop<Rule, variant, M, X>(e, begin, end, in);
  for (int64_t i = begin; i < end;) {
    const int64_t index = e.first_index + i, left = (int64_t{1} << 32) - (index & 0xffffffff);
    const int64_t until = end - i < left ? end : i + left;
    run_loop<Rule, variant, M, X>(e, i, until, in, static_cast<uint32_t>(index >> 32));
    i = until;
  }
}

// ---- which storages there are loops for: see mixes.h ----

template <class Rule, int variant, class X>
FUSEDOPTIM_INLINE bool fits(const Entry& e) {
  bool same = e.param().storage == X::param && e.grad().storage == X::grad;
  for_each_slot<Rule, variant>(
      [&](auto k) FUSEDOPTIM_INLINE_LAMBDA { same = same && e.state(k).storage == X::template of_slot<Rule>(k); });
  return same;
}

template <class Rule, int variant, class M, class... X>
FUSEDOPTIM_INLINE UpdateFn find_among(const Entry& e, MixList<X...>) {
  UpdateFn found = nullptr;
  ((found = !found && fits<Rule, variant, X>(e) ? update_linear<Rule, variant, M, X> : found), ...);
  return found;
}

// Null if there is none.
template <class Rule, int variant, class M>
UpdateFn find_linear(const Entry& e) {
  return find_among<Rule, variant, M>(e, typename LoopsOf<Rule, variant, M>::Linear{});
}
// Of those of a tile. States are of the compute type.
template <class Rule, int variant, class M>
UpdateFn find_unencoded(const Entry& e) {
  return find_among<Rule, variant, M>(e, typename LoopsOf<Rule, variant, M>::Unencoded{});
}

}  // namespace fusedoptim
