// The loops that update elements, once for every rule, variant, compute type and instruction set: they load, have
// rules/step_element.h do the work, and store.
//
// Cost: a step waits for memory (28 bytes per element for AdamW in fp32), and has about 30 cycles per 16 elements and
// core to spare for arithmetic. Storages that all agree get a loop of their own.
#pragma once

#include "../core/strided.h"
#include "../rules/step_element.h"
#include "codec.h"
#include "kernels.h"

namespace fusedoptim {

// fixed: the storage of parameter and gradient, fixed_state: of the rule's states, where they are known.
template <class Rule, int variant, class M, int fixed, int fixed_state, Around around>
class Loop {
 public:
  using T = typename M::T;
  using V = typename M::V;
  using Scalars = typename Rule::template Scalars<T>;

  // param_storage: what the parameter is rounded to for its moving average.
  FUSEDOPTIM_INLINE Loop(const Entry& e, const Scalars& c, const GroupTransforms& t, DType param_storage)
      : e_(e),
        c_(c),
        t_(without_asking(Transforms<T>::of(t))),
        average_(around == Around::everything && e.state(kAverage).data && t.ema_decay >= 0),
        zero_grad_(around == Around::everything && t.zero_grad),
        param_storage_(param_storage) {}

  FUSEDOPTIM_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int bf16 = static_cast<int>(DType::bf16);
    int64_t i = begin;
    if constexpr (fixed == bf16 && fixed_state == bf16 && M::has_pairs)
      if (!average_)
        for (; i + 2 * M::width <= end; i += 2 * M::width) step_bf16_pair(i);
    for (; i + M::width <= end; i += M::width) step<true>(i, M::width);
    if (i < end) step<false>(i, static_cast<int>(end - i));
  }

 private:
  // The last n < width elements go through the same lanes as all others, hence have the same bits, but perhaps for the
  // sign of a NaN.
  template <bool full>
  FUSEDOPTIM_INLINE void step(int64_t i, int n) const {
    Element<V> y[1], &x = y[0];
    x.param = load<M, fixed, full>(e_.param(), i, n);
    x.grad = load<M, fixed, full>(e_.grad(), i, n);
    for (int k = 0; k < Rule::kSlots; ++k)
      if (Rule::uses(variant, k)) x.state[k] = load<M, fixed_state, full>(e_.state(k), i, n);
    update_elements<Rule, variant, M, around>(y, t_, c_);
    for (int k = 0; k < Rule::kSlots; ++k)
      if (Rule::uses(variant, k)) store<M, fixed_state, full>(e_.state(k), i, n, x.state[k]);
    store<M, fixed, full>(e_.param(), i, n, x.param);
    if (average_) {
      x.state[kAverage] = load<M, kAverageStorage, full>(e_.state(kAverage), i, n);
      average_element<M>(x, t_, as_stored<M, kParamStorage>(x.param, param_storage_));
      store<M, kAverageStorage, full>(e_.state(kAverage), i, n, x.state[kAverage]);
    }
    if (zero_grad_) store<M, fixed, full>(e_.grad(), i, n, M::set(0));
  }

  // All operands bf16: 2*width elements at once.
  FUSEDOPTIM_INLINE void step_bf16_pair(int64_t i) const {
    const auto at = [i](const Operand& o) { return static_cast<uint16_t*>(o.data) + i; };
    Element<V> x[2];
    M::load_bf16_pair(at(e_.param()), x[0].param, x[1].param);
    M::load_bf16_pair(at(e_.grad()), x[0].grad, x[1].grad);
    for (int k = 0; k < Rule::kSlots; ++k)
      if (Rule::uses(variant, k)) M::load_bf16_pair(at(e_.state(k)), x[0].state[k], x[1].state[k]);
    update_elements<Rule, variant, M, around>(x, t_, c_);
    for (int k = 0; k < Rule::kSlots; ++k)
      if (Rule::uses(variant, k)) M::store_bf16_pair(at(e_.state(k)), x[0].state[k], x[1].state[k]);
    M::store_bf16_pair(at(e_.param()), x[0].param, x[1].param);
    if (zero_grad_) M::store_bf16_pair(at(e_.grad()), M::set(0), M::set(0));
  }

  // In a loop that does everything, transforming costs less than asking whether to.
  static FUSEDOPTIM_INLINE Transforms<T> without_asking(Transforms<T> t) {
    if (around == Around::everything) t.leave_gradient = false;
    return t;
  }

  // Elements of the compute type may be those of a tile, and the parameter of any.
  static constexpr int kParamStorage = fixed == static_cast<int>(kCompute<T>) ? kAnyDType : fixed;
  static constexpr int kAverageStorage = static_cast<int>(kCompute<T>);
  const Entry e_;  // copies, whose fields no store can alias
  const Scalars c_;
  const Transforms<T> t_;
  const bool average_, zero_grad_;
  const DType param_storage_;
};

template <class Rule, int variant, class M, int fixed, int fixed_state>
FUSEDOPTIM_INLINE void run_loop(const Entry& e, int64_t begin, int64_t end, const void* scalars,
                                const GroupTransforms& t, DType param_storage) {
  // fp32 and 16 bits have a loop without anything around the rule: 16 bits have few cycles to spare.
  constexpr bool may_be_alone = sizeof(typename M::T) == 4 && fixed != kAnyDType;
  const auto& c = *static_cast<const typename Rule::template Scalars<typename M::T>*>(scalars);
  if constexpr (may_be_alone) {
    if (t.do_nothing()) {
      Loop<Rule, variant, M, fixed, fixed_state, Around::nothing>(e, c, t, param_storage).run(begin, end);
      return;
    }
  }
  Loop<Rule, variant, M, fixed, fixed_state, Around::everything>(e, c, t, param_storage).run(begin, end);
}

// Operands that share one dense memory order.
template <class Rule, int variant, class M, int fixed, int fixed_state = fixed>
void update_linear(const Entry& e, int64_t begin, int64_t end, const void* scalars, const GroupTransforms& t) {
  run_loop<Rule, variant, M, fixed, fixed_state>(e, begin, end, scalars, t, e.param().storage);
}

// All others: tile by tile, through contiguous buffers of the compute type that stay in the L1 cache.
template <class Rule, int variant, class M>
void update_tiles(const Entry& e, int64_t begin, int64_t end, const void* scalars, const GroupTransforms& t) {
  using T = typename M::T;
  constexpr int64_t kTileElements = 512;
  alignas(64) T buffer[kOperands][kTileElements];
  Entry tile;
  bool read[kOperands] = {true, true}, written[kOperands] = {true, t.zero_grad};
  for (int k = 0; k < kStates; ++k)
    read[kFirstState + k] = written[kFirstState + k] =
        k == kAverage ? e.state(k).data && t.ema_decay >= 0 : k < Rule::kSlots && Rule::uses(variant, k);
  for (int k = 0; k < kOperands; ++k)
    if (read[k]) tile.operand[k] = {buffer[k], nullptr, kCompute<T>};
  const Layout& l = *e.layout;
  for (int64_t i = begin; i < end; i += kTileElements) {
    const int64_t n = end - i < kTileElements ? end - i : kTileElements;
    for (int k = 0; k < kOperands; ++k)
      if (read[k]) gather<M>(buffer[k], e.operand[k], l.sizes, l.strides[k], i, n);
    run_loop<Rule, variant, M, static_cast<int>(kCompute<T>), static_cast<int>(kCompute<T>)>(tile, 0, n, scalars, t,
                                                                                             e.param().storage);
    for (int k = 0; k < kOperands; ++k)
      if (written[k]) scatter<M>(buffer[k], e.operand[k], l.sizes, l.strides[k], i, n);
  }
}

// ---- which of them a tensor needs ----

template <class Rule>
FUSEDOPTIM_INLINE bool storages_are(const Entry& e, int variant, DType d, DType state) {
  bool same = e.param().storage == d && e.grad().storage == d;
  for (int k = 0; k < Rule::kSlots; ++k)
    if (Rule::uses(variant, k)) same = same && e.state(k).storage == state;
  return same;
}

template <class Rule, int variant, class F32, class F64>
UpdateFn find_update_of_variant(const Entry& e) {
  constexpr DType F = DType::f32, D = DType::f64, B = DType::bf16, H = DType::f16;
  constexpr int f32 = static_cast<int>(F), f64 = static_cast<int>(D), bf16 = static_cast<int>(B);
  constexpr int f16 = static_cast<int>(H);
  if (e.compute_dtype() == D) {
    if (e.layout) return update_tiles<Rule, variant, F64>;
    if (storages_are<Rule>(e, variant, D, D)) return update_linear<Rule, variant, F64, f64>;
    return update_linear<Rule, variant, F64, kAnyDType>;
  }
  if (e.layout) return update_tiles<Rule, variant, F32>;
  if (storages_are<Rule>(e, variant, F, F)) return update_linear<Rule, variant, F32, f32>;
  if (storages_are<Rule>(e, variant, B, B)) return update_linear<Rule, variant, F32, bf16>;
  if (storages_are<Rule>(e, variant, H, H)) return update_linear<Rule, variant, F32, f16>;
  if (storages_are<Rule>(e, variant, B, F)) return update_linear<Rule, variant, F32, bf16, f32>;
  return update_linear<Rule, variant, F32, kAnyDType>;
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
