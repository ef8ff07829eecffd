// The CPU apply loop, once for every rule, variant, compute type and instruction set.
//
// Cost: a step waits for memory (28 bytes per element for AdamW in fp32), and has about 30 cycles per 16 elements and
// core to spare for arithmetic. Dtypes that all agree get a loop of their own; any other mix is chosen per load, by a
// branch that never changes within a tensor.
#pragma once

#include "../core/strided.h"
#include "../core/sum_of_squares.h"
#include "kernels.h"
#include "lanes_portable.h"

namespace fusedoptim {

inline constexpr int kAnyDType = -1;

template <class M, int fixed>
FUSEDOPTIM_HD typename M::V load(const void* base, DType d, int64_t i) {
  using T = typename M::T;
  if constexpr (fixed != kAnyDType) d = static_cast<DType>(fixed);
  if constexpr (sizeof(T) == 4) {
    if (d == DType::f32) return M::load(static_cast<const float*>(base) + i);
    if (d == DType::bf16) return M::load_bf16(static_cast<const uint16_t*>(base) + i);
    if (d == DType::f16) return M::load_f16(static_cast<const uint16_t*>(base) + i);
  } else {
    if (d == DType::f64) return M::load(static_cast<const double*>(base) + i);
  }
  alignas(64) T x[M::width];
  for (int k = 0; k < M::width; ++k) x[k] = load_element<T>(base, d, i + k);
  return M::load(x);
}

template <class M, int fixed>
FUSEDOPTIM_HD void store(void* base, DType d, int64_t i, typename M::V v) {
  using T = typename M::T;
  if constexpr (fixed != kAnyDType) d = static_cast<DType>(fixed);
  if constexpr (sizeof(T) == 4) {
    if (d == DType::f32) return M::store(static_cast<float*>(base) + i, v);
    if (d == DType::bf16) return M::store_bf16(static_cast<uint16_t*>(base) + i, v);
    if (d == DType::f16) return M::store_f16(static_cast<uint16_t*>(base) + i, v);
  } else {
    if (d == DType::f64) return M::store(static_cast<double*>(base) + i, v);
  }
  alignas(64) T x[M::width];
  M::store(x, v);
  for (int k = 0; k < M::width; ++k) store_element<T>(base, d, i + k, x[k]);
}

// The last n < width elements, in the same lanes as all others, hence with the same bits.
template <class M>
FUSEDOPTIM_HD typename M::V load_tail(const void* base, DType d, int64_t i, int n) {
  alignas(64) typename M::T x[M::width] = {};
  for (int k = 0; k < n; ++k) x[k] = load_element<typename M::T>(base, d, i + k);
  return M::load(x);
}

template <class M>
FUSEDOPTIM_HD void store_tail(void* base, DType d, int64_t i, int n, typename M::V v) {
  alignas(64) typename M::T x[M::width];
  M::store(x, v);
  for (int k = 0; k < n; ++k) store_element<typename M::T>(base, d, i + k, x[k]);
}

// All operands bf16: 2*width elements at once. Returns where it stopped.
template <class Rule, int variant, class M, bool plain>
FUSEDOPTIM_HD int64_t update_bf16_pairs(const Entry& e, int64_t begin, int64_t end,
                                        const typename Rule::template Scalars<float>& c, const Intake<float>& intake,
                                        bool zero_grad) {
  using V = typename M::V;
  const auto at = [](const void* base, int64_t i) { return static_cast<const uint16_t*>(base) + i; };
  const auto out = [](void* base, int64_t i) { return static_cast<uint16_t*>(base) + i; };
  int64_t i = begin;
  for (; i + 2 * M::width <= end; i += 2 * M::width) {
    V p[2], g[2], s[2][kMaxSlots];
    M::load_bf16_pair(at(e.param, i), p[0], p[1]);
    M::load_bf16_pair(at(e.grad, i), g[0], g[1]);
    if constexpr (!plain) g[0] = taken<M>(g[0], intake), g[1] = taken<M>(g[1], intake);
    for (int k = 0; k < Rule::kSlots; ++k)
      if (Rule::uses(variant, k)) M::load_bf16_pair(at(e.state[k], i), s[0][k], s[1][k]);
    Rule::template update<variant, M>(p[0], g[0], s[0], c);
    Rule::template update<variant, M>(p[1], g[1], s[1], c);
    for (int k = 0; k < Rule::kSlots; ++k)
      if (Rule::uses(variant, k)) M::store_bf16_pair(out(e.state[k], i), s[0][k], s[1][k]);
    M::store_bf16_pair(out(e.param, i), p[0], p[1]);
    if (!plain && zero_grad) M::store_bf16_pair(out(e.grad, i), M::set(0), M::set(0));
  }
  return i;
}

// fixed: the dtype of parameter and gradient, fixed_state: of all states, where they are known. plain: nothing
// surrounds the rule. A bf16 step, which has few cycles to spare, would feel the rest.
template <class Rule, int variant, class M, int fixed, int fixed_state, bool plain>
FUSEDOPTIM_HD void update_elements(const Entry& e, int64_t begin, int64_t end,
                                   const typename Rule::template Scalars<typename M::T>& c, const Composition& around) {
  using T = typename M::T;
  using V = typename M::V;
  constexpr DType kCompute = sizeof(T) == 8 ? DType::f64 : DType::f32;
  constexpr int bf16 = static_cast<int>(DType::bf16);
  const auto intake = Intake<T>::of(around);
  const auto toward_param = LerpWeight<T>::of(1.0 - around.ema_decay);
  const bool averages = !plain && e.state[kEma] && around.ema_decay >= 0, zero_grad = !plain && around.zero_grad;
  int64_t i = begin;
  if constexpr (fixed == bf16 && fixed_state == bf16 && M::has_pairs)
    if (!averages) i = update_bf16_pairs<Rule, variant, M, plain>(e, begin, end, c, intake, zero_grad);
  for (; i + M::width <= end; i += M::width) {
    V p = load<M, fixed>(e.param, e.param_dtype, i), s[kMaxSlots];
    V g = load<M, fixed>(e.grad, e.grad_dtype, i);
    if constexpr (!plain) g = taken<M>(g, intake);
    for (int k = 0; k < Rule::kSlots; ++k)
      if (Rule::uses(variant, k)) s[k] = load<M, fixed_state>(e.state[k], e.state_dtype[k], i);
    Rule::template update<variant, M>(p, g, s, c);
    for (int k = 0; k < Rule::kSlots; ++k)
      if (Rule::uses(variant, k)) store<M, fixed_state>(e.state[k], e.state_dtype[k], i, s[k]);
    store<M, fixed>(e.param, e.param_dtype, i, p);
    if (averages) {
      if (e.param_dtype != kCompute) p = load<M, fixed>(e.param, e.param_dtype, i);  // as it was rounded
      T* ema = static_cast<T*>(e.state[kEma]) + i;
      M::store(ema, lerp<M>(M::load(ema), p, toward_param));
    }
    if (zero_grad) store<M, fixed>(e.grad, e.grad_dtype, i, M::set(0));
  }
  if (i < end) {
    const int n = static_cast<int>(end - i);
    V p = load_tail<M>(e.param, e.param_dtype, i, n), s[kMaxSlots];
    V g = load_tail<M>(e.grad, e.grad_dtype, i, n);
    if constexpr (!plain) g = taken<M>(g, intake);
    for (int k = 0; k < Rule::kSlots; ++k)
      if (Rule::uses(variant, k)) s[k] = load_tail<M>(e.state[k], e.state_dtype[k], i, n);
    Rule::template update<variant, M>(p, g, s, c);
    for (int k = 0; k < Rule::kSlots; ++k)
      if (Rule::uses(variant, k)) store_tail<M>(e.state[k], e.state_dtype[k], i, n, s[k]);
    store_tail<M>(e.param, e.param_dtype, i, n, p);
    if (averages) {
      p = load_tail<M>(e.param, e.param_dtype, i, n);
      const V ema = lerp<M>(load_tail<M>(e.state[kEma], kCompute, i, n), p, toward_param);
      store_tail<M>(e.state[kEma], kCompute, i, n, ema);
    }
    if (zero_grad) store_tail<M>(e.grad, e.grad_dtype, i, n, M::set(0));
  }
}

template <class Rule, int variant, class M, int fixed, int fixed_state = fixed>
void update_linear(const Entry& entry, int64_t begin, int64_t end, const void* scalars, const Composition& around) {
  // fp32 and 16 bits have a loop without anything around the rule: 16 bits have few cycles to spare.
  constexpr bool in_f32 = fixed == static_cast<int>(DType::f32);
  constexpr bool in_16 = fixed == static_cast<int>(DType::bf16) || fixed == static_cast<int>(DType::f16);
  const Entry e = entry;  // a copy whose fields no store can alias
  const auto c = *static_cast<const typename Rule::template Scalars<typename M::T>*>(scalars);
  if constexpr (in_f32 || in_16) {
    if (around.is_plain()) {
      update_elements<Rule, variant, M, fixed, fixed_state, true>(e, begin, end, c, around);
      return;
    }
  }
  update_elements<Rule, variant, M, fixed, fixed_state, false>(e, begin, end, c, around);
}

// Operands of different memory order: tile by tile through contiguous buffers that stay in the L1 cache.
template <class Rule, int variant, class M>
void update_strided(const Entry& e, int64_t begin, int64_t end, const void* scalars, const Composition& around) {
  using T = typename M::T;
  constexpr int64_t kTileElements = 512;
  constexpr DType kDType = sizeof(T) == 8 ? DType::f64 : DType::f32;
  alignas(64) T p[kTileElements], g[kTileElements], s[kMaxSlots][kTileElements];
  const Layout& l = *e.layout;
  Entry tile;
  tile.param = p;
  tile.grad = g;
  tile.param_dtype = tile.grad_dtype = kDType;
  for (int k = 0; k < Rule::kSlots; ++k) {
    tile.state[k] = s[k];
    tile.state_dtype[k] = kDType;
  }
  const auto toward_param = LerpWeight<T>::of(1.0 - around.ema_decay);
  for (int64_t i = begin; i < end; i += kTileElements) {
    const int64_t n = end - i < kTileElements ? end - i : kTileElements;
    gather<M>(p, e.param, e.param_dtype, l.sizes, l.param, i, n);
    gather<M>(g, e.grad, e.grad_dtype, l.sizes, l.grad, i, n);
    for (int k = 0; k < Rule::kSlots; ++k)
      if (Rule::uses(variant, k)) gather<M>(s[k], e.state[k], e.state_dtype[k], l.sizes, l.state[k], i, n);
    update_linear<Rule, variant, M, static_cast<int>(kDType)>(tile, 0, n, scalars, around);
    for (int k = 0; k < Rule::kSlots; ++k)
      if (Rule::uses(variant, k)) scatter<M>(s[k], e.state[k], e.state_dtype[k], l.sizes, l.state[k], i, n);
    scatter<M>(p, e.param, e.param_dtype, l.sizes, l.param, i, n);
    if (e.state[kEma] && around.ema_decay >= 0) {
      gather<M>(p, e.param, e.param_dtype, l.sizes, l.param, i, n);  // as it was rounded
      gather<M>(g, e.state[kEma], kDType, l.sizes, l.state[kEma], i, n);
      for (int64_t k = 0; k < n; ++k) g[k] = lerp<portable::Lane<T>>(g[k], p[k], toward_param);
      scatter<M>(g, e.state[kEma], kDType, l.sizes, l.state[kEma], i, n);
    }
    if (around.zero_grad) fill_with_zeros<M>(e.grad, e.grad_dtype, l.sizes, l.grad, i, n);
  }
}

template <class M>
double tile_sum(const Entry& e, int64_t tile, const Composition& around) {
  using T = typename M::T;
  constexpr DType kDType = sizeof(T) == 8 ? DType::f64 : DType::f32;
  const int64_t start = tile * kTile, left = e.numel - start, n = left < kTile ? left : kTile;
  const auto intake = Intake<T>::of(around);
  const bool as_it_is = intake.unscale == 1 && intake.coefficient == 1 && intake.limit == T(INFINITY);
  if (!e.sum_layout && e.grad_dtype == kDType && n == kTile && as_it_is)
    return tile_sum_of_squares(static_cast<const T*>(e.grad) + start);
  alignas(64) T x[kTile] = {};
  if (e.sum_layout) {
    gather<M>(x, e.grad, e.grad_dtype, e.sum_layout->sizes, e.sum_layout->grad, start, n);
  } else {
    int64_t i = 0;
    for (; i + M::width <= n; i += M::width) M::store(x + i, load<M, kAnyDType>(e.grad, e.grad_dtype, start + i));
    for (; i < n; ++i) x[i] = load_element<T>(e.grad, e.grad_dtype, start + i);
  }
  if (!as_it_is)
    for (int64_t i = 0; i < kTile; i += M::width) M::store(x + i, taken<M>(M::load(x + i), intake));
  return tile_sum_of_squares(x);
}

// ---- lookup ----

template <class Rule>
FUSEDOPTIM_HD bool dtypes_are(const Entry& e, int variant, DType d, DType state) {
  bool same = e.param_dtype == d && e.grad_dtype == d;
  for (int k = 0; k < Rule::kSlots; ++k)
    if (Rule::uses(variant, k)) same = same && e.state_dtype[k] == state;
  return same;
}

template <class Rule, int variant, class F32, class F64>
UpdateFn update_for(const Entry& e) {
  constexpr DType F = DType::f32, D = DType::f64, B = DType::bf16, H = DType::f16;
  constexpr int f32 = static_cast<int>(F), f64 = static_cast<int>(D), bf16 = static_cast<int>(B);
  constexpr int f16 = static_cast<int>(H);
  if (e.compute_dtype() == D) {
    if (e.layout) return update_strided<Rule, variant, F64>;
    if (dtypes_are<Rule>(e, variant, D, D)) return update_linear<Rule, variant, F64, f64>;
    return update_linear<Rule, variant, F64, kAnyDType>;
  }
  if (e.layout) return update_strided<Rule, variant, F32>;
  if (dtypes_are<Rule>(e, variant, F, F)) return update_linear<Rule, variant, F32, f32>;
  if (dtypes_are<Rule>(e, variant, B, B)) return update_linear<Rule, variant, F32, bf16>;
  if (dtypes_are<Rule>(e, variant, H, H)) return update_linear<Rule, variant, F32, f16>;
  if (dtypes_are<Rule>(e, variant, B, F)) return update_linear<Rule, variant, F32, bf16, f32>;
  return update_linear<Rule, variant, F32, kAnyDType>;
}

template <class Rule, class F32, class F64, int variant = 0>
UpdateFn update_of_rule(int wanted, const Entry& e) {
  if constexpr (variant < Rule::variants) {
    if (wanted == variant) return update_for<Rule, variant, F32, F64>(e);
    return update_of_rule<Rule, F32, F64, variant + 1>(wanted, e);
  } else {
    return nullptr;
  }
}

template <class F32, class F64, class... R>
UpdateFn find_update(RuleList<R...>, int rule, int variant, const Entry& e) {
  UpdateFn found = nullptr;
  int index = 0;
  ((index++ == rule ? void(found = update_of_rule<R, F32, F64>(variant, e)) : void()), ...);
  return found;
}

template <class F32, class F64>
UpdateFn update_kernel(int rule, int variant, const Entry& e) {
  return find_update<F32, F64>(Rules{}, rule, variant % kWithEma, e);
}

template <class F32, class F64>
TileSumFn tile_sum_kernel(const Entry& e) {
  return e.compute_dtype() == DType::f64 ? tile_sum<F64> : tile_sum<F32>;
}

}  // namespace fusedoptim
