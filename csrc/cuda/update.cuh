// The elementwise update of a range of one tensor by one block: the loop, once for every rule, variant and dtype.
#pragma once

#include <type_traits>

#include "access.cuh"
#include "lanes.cuh"

namespace fusedoptim::cuda {

// What surrounds the rule, in a compute type: worked out once, not by every thread.
template <class T>
struct Around {
  Intake<T> intake;
  LerpWeight<T> toward_param;

  static __device__ Around of(const Composition& c) { return {Intake<T>::of(c), LerpWeight<T>::of(1.0 - c.ema_decay)}; }
};

// One block's work, as its first warp found it, in shared memory.
struct BlockWork {
  DeviceEntry entry;
  void* grad;
  int64_t begin, end;   // elements
  int64_t item, items;  // of the segment
  int32_t index;        // of the entry
  Work work;
  bool first;  // its states count as absent
  bool zero_grad;
  bool plain_gradient;  // nothing is done to it before the rule
  Around<float> around32;
  Around<double> around64;

  __device__ void surround(const Composition& c) {
    zero_grad = c.zero_grad;
    plain_gradient = c.unscale == 1 && c.coefficient == 1 && c.limit == static_cast<double>(INFINITY);
    around32 = Around<float>::of(c);
    around64 = Around<double>::of(c);
  }
  template <class T>
  __device__ const Around<T>& around() const {
    if constexpr (sizeof(T) == 8)
      return around64;
    else
      return around32;
  }
};

template <class T>
inline constexpr DType kCompute = sizeof(T) == 8 ? DType::f64 : DType::f32;

// A parameter as it reads after it was stored.
template <class T>
__device__ __forceinline__ T as_stored(T x, DType d) {
  if constexpr (sizeof(T) == 4)
    if (size_of(d) == 2) return decode_16(encode_16(x, d), d);
  return x;
}

// ---- dtypes of a tensor's operands: known when compiled, for what nearly all tensors are, or looked up ----

template <DType kParam, DType kGrad, DType kState>
struct Known {
  static constexpr bool known = true;
  static constexpr __device__ DType param(const DeviceEntry&) { return kParam; }
  static constexpr __device__ DType grad(const DeviceEntry&) { return kGrad; }
  static constexpr __device__ DType state(const DeviceEntry&, int) { return kState; }
};
struct LookedUp {
  static constexpr bool known = false;
  static __device__ DType param(const DeviceEntry& e) { return e.param_dtype; }
  static __device__ DType grad(const DeviceEntry& e) { return e.grad_dtype; }
  static __device__ DType state(const DeviceEntry& e, int k) { return e.state_dtype[k]; }
};

// Whether a tensor's operands have these dtypes, and nothing happens after the rule.
template <class Rule, int variant, class Dtypes>
__device__ __forceinline__ bool has(const BlockWork& work) {
  const DeviceEntry& e = work.entry;
  bool all = !work.zero_grad && (e.uses >> kEma & 1) == 0;
  all = all && e.param_dtype == Dtypes::param(e) && e.grad_dtype == Dtypes::grad(e);
#pragma unroll
  for (int k = 0; k < Rule::kSlots; ++k)
    if (Rule::uses(variant, k)) all = all && e.state_dtype[k] == Dtypes::state(e, k);
  return all;
}

// ---- single elements ----

template <class T>
struct Single {
  T param, grad, state[kStates];
  int64_t at[kOperands];
};

template <class Rule, int variant, class T, bool mixed>
__device__ __forceinline__ void load_operands(Single<T>& x, const BlockWork& work, int64_t i, const int64_t* layouts) {
  const DeviceEntry& e = work.entry;
  if (e.layout >= 0)
    strided_offsets(layouts + e.layout, i, x.at);
  else
    for (int k = 0; k < kOperands; ++k) x.at[k] = i;
  x.grad = load_single<T, mixed>(work.grad, e.grad_dtype, x.at[kGrad]);
  x.param = load_single<T, mixed>(e.param, e.param_dtype, x.at[kParam]);
#pragma unroll
  for (int k = 0; k < Rule::kSlots; ++k)
    if (Rule::uses(variant, k)) x.state[k] = load_single<T, mixed>(e.state[k], e.state_dtype[k], x.at[kFirstState + k]);
  x.state[kEma] =
      e.uses >> kEma & 1 ? load_single<T, mixed>(e.state[kEma], kCompute<T>, x.at[kFirstState + kEma]) : T(0);
}

template <class Rule, int variant, class T, bool mixed>
__device__ __forceinline__ void update_operands(Single<T>& x, const BlockWork& work,
                                                const typename Rule::template Scalars<T>& c) {
  const DeviceEntry& e = work.entry;
  const auto& [intake, toward_param] = work.around<T>();
  Rule::template update<variant, Lane<T>>(x.param, taken<Lane<T>>(x.grad, intake), x.state, c);
#pragma unroll
  for (int k = 0; k < Rule::kSlots; ++k)
    if (Rule::uses(variant, k)) store_single<mixed>(e.state[k], e.state_dtype[k], x.at[kFirstState + k], x.state[k]);
  store_single<mixed>(e.param, e.param_dtype, x.at[kParam], x.param);
  if (e.uses >> kEma & 1)
    store_single<mixed>(e.state[kEma], kCompute<T>, x.at[kFirstState + kEma],
                        lerp<Lane<T>>(x.state[kEma], as_stored(x.param, e.param_dtype), toward_param));
  if (work.zero_grad) store_single<mixed>(work.grad, e.grad_dtype, x.at[kGrad], T(0));
}

// [begin, begin + gap) and from there on [resume, ...), `count` in all. Heads, tails, and tensors without a common
// alignment or memory order.
template <class Rule, int variant, class T, bool mixed>
__device__ __forceinline__ void update_singles(const BlockWork& work, int64_t begin, int64_t gap, int64_t resume,
                                               int64_t count, const typename Rule::template Scalars<T>& c,
                                               const int64_t* layouts) {
  constexpr int U = mixed ? 1 : 2;  // under way at once
#pragma unroll 1
  for (int64_t first = threadIdx.x; first < count; first += U * kThreads) {
    Single<T> x[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t j = first + u * kThreads;
      if (j >= count) break;
      load_operands<Rule, variant, T, mixed>(x[u], work, j < gap ? begin + j : resume + (j - gap), layouts);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (first + u * kThreads >= count) break;
      update_operands<Rule, variant, T, mixed>(x[u], work, c);
    }
  }
}

// ---- groups of elements ----

// Where a tensor's operands begin, beyond its head.
template <class Rule, int variant, class Dtypes>
struct Bases {
  char *param, *grad, *state[kMaxSlots];

  __device__ __forceinline__ Bases(const BlockWork& work, int64_t begin) {
    const DeviceEntry& e = work.entry;
    param = static_cast<char*>(e.param) + begin * size_of(Dtypes::param(e));
    grad = static_cast<char*>(work.grad) + begin * size_of(Dtypes::grad(e));
#pragma unroll
    for (int k = 0; k < Rule::kSlots; ++k)
      if (Rule::uses(variant, k)) state[k] = static_cast<char*>(e.state[k]) + begin * size_of(Dtypes::state(e, k));
  }
};

// A group, as it was fetched and as it is to be stored.
struct Group {
  Raw param, grad, state[kMaxSlots];
};

// The new values of a group in place of the old ones. False if they are not to be used: see FastLane.
template <class Rule, int variant, class T, int G, class Dtypes>
__device__ __forceinline__ bool update_group(Group& x, const BlockWork& work, bool plain_gradient,
                                             const Intake<T>& intake, const typename Rule::template Scalars<T>& c) {
  using M = std::conditional_t<sizeof(T) == 4, LaneOfGroups, Lane<T>>;
  constexpr bool kFast = Rule::divides && std::is_same_v<M, FastLane>;
  const DeviceEntry& e = work.entry;
  T param[G], gradient[G], state[kMaxSlots][G];
  decode<G>(param, x.param, Dtypes::param(e));
  decode<G>(gradient, x.grad, Dtypes::grad(e));
#pragma unroll
  for (int k = 0; k < Rule::kSlots; ++k)
    if (Rule::uses(variant, k)) decode<G>(state[k], x.state[k], Dtypes::state(e, k));
  if (!plain_gradient)
    for (int j = 0; j < G; ++j) gradient[j] = taken<M>(gradient[j], intake);
  bool right = true;
#pragma unroll
  for (int j = 0; j < G; ++j) {
    T slots[kMaxSlots];
#pragma unroll
    for (int k = 0; k < Rule::kSlots; ++k)
      if (Rule::uses(variant, k)) slots[k] = state[k][j];
    Rule::template update<variant, M>(param[j], gradient[j], slots, c);
    if constexpr (kFast) right &= FastLane::is_right(param[j]);
#pragma unroll
    for (int k = 0; k < Rule::kSlots; ++k)
      if (Rule::uses(variant, k)) state[k][j] = slots[k];
  }
  encode<G>(x.param, param, Dtypes::param(e));
#pragma unroll
  for (int k = 0; k < Rule::kSlots; ++k)
    if (Rule::uses(variant, k)) encode<G>(x.state[k], state[k], Dtypes::state(e, k));
  return right;
}

// The moving average and the gradient's zeros of a group that was stored.
template <int G, class T>
__device__ __forceinline__ void finish_group(const BlockWork& work, const Raw& param, const LerpWeight<T>& toward_param,
                                             int64_t i) {
  const DeviceEntry& e = work.entry;
  if (G != 8 && e.uses >> kEma & 1) {  // eight elements are a group only where all operands have 16 bits
    char* const at = static_cast<char*>(e.state[kEma]) + i * sizeof(T);
    T ema[G], stored[G];
    Raw raw;
    fetch<G>(raw, at, kCompute<T>);
    decode<G>(ema, raw, kCompute<T>);
    decode<G>(stored, param, e.param_dtype);
#pragma unroll
    for (int j = 0; j < G; ++j) ema[j] = lerp<Lane<T>>(ema[j], stored[j], toward_param);
    encode<G>(raw, ema, kCompute<T>);
    put<G>(at, raw, kCompute<T>);
  }
  if (work.zero_grad) put<G>(static_cast<char*>(work.grad) + i * size_of(e.grad_dtype), Raw{}, e.grad_dtype);
}

// How many groups a thread has under way at once: two, 32 bytes per operand, unless they need more registers than five
// blocks to a multiprocessor leave. Five loads of one group are then 50 KB per multiprocessor.
template <class Rule, int variant, class Dtypes>
constexpr int groups_at_once() {
  int states = 0;
  for (int k = 0; k < Rule::kSlots; ++k) states += Rule::uses(variant, k);
  return states <= (Dtypes::known ? 2 : 1) ? 2 : 1;
}

// `count` groups of G elements from `begin` on.
template <class Rule, int variant, class T, int G, class Dtypes>
__device__ __forceinline__ void update_groups(const BlockWork& work, int64_t begin, uint32_t count,
                                              const typename Rule::template Scalars<T>& c) {
  constexpr int U = groups_at_once<Rule, variant, Dtypes>();
  const DeviceEntry& e = work.entry;
  const Bases<Rule, variant, Dtypes> base(work, begin);
  const auto [intake, toward_param] = work.around<T>();
  const bool plain_gradient = work.plain_gradient;
#pragma unroll 1
  for (uint32_t first = threadIdx.x; first < count; first += U * kThreads) {
    Group x[U];
    uint32_t at[U];  // of the group, in elements
    bool done[U];    // it was stored, or is not to be
#pragma unroll
    for (int u = 0; u < U; ++u) {
      // Beyond the end the last group stands in: cheaper than a branch.
      const uint32_t group = first + u * kThreads;
      done[u] = u > 0 && group >= count;
      at[u] = (done[u] ? count - 1 : group) * G;
      fetch<G>(x[u].grad, base.grad + at[u] * size_of(Dtypes::grad(e)), Dtypes::grad(e));
      fetch<G>(x[u].param, base.param + at[u] * size_of(Dtypes::param(e)), Dtypes::param(e));
#pragma unroll
      for (int k = 0; k < Rule::kSlots; ++k)
        if (Rule::uses(variant, k))
          fetch<G>(x[u].state[k], base.state[k] + at[u] * size_of(Dtypes::state(e, k)), Dtypes::state(e, k));
    }
    bool again = false;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const bool right = update_group<Rule, variant, T, G, Dtypes>(x[u], work, plain_gradient, intake, c);
      if (done[u]) continue;
      if (!right) {
        again = true;
        continue;
      }
      done[u] = true;
#pragma unroll
      for (int k = 0; k < Rule::kSlots; ++k)
        if (Rule::uses(variant, k))
          put<G>(base.state[k] + at[u] * size_of(Dtypes::state(e, k)), x[u].state[k], Dtypes::state(e, k));
      put<G>(base.param + at[u] * size_of(Dtypes::param(e)), x[u].param, Dtypes::param(e));
      if (!Dtypes::known) finish_group<G>(work, x[u].param, toward_param, begin + at[u]);
    }
    if (Rule::divides && sizeof(T) == 4 && again) {  // element by element, from memory
#pragma unroll 1
      for (int j = 0; j < U * G; ++j) {
        const bool last = j >= G * (U - 1);
        if (last ? done[U - 1] : done[0]) continue;
        const int64_t i = begin + (last ? at[U - 1] + j - G * (U - 1) : at[0] + j);
        Single<T> single;
        load_operands<Rule, variant, T, false>(single, work, i, nullptr);
        update_operands<Rule, variant, T, false>(single, work, c);
      }
    }
  }
}

// How many elements make a group whose operands, from some element on, are all aligned to the group; 1 if none does.
struct Vectors {
  int width, head;
};

template <class Rule, int variant, class T>
__device__ __forceinline__ Vectors vectors(const DeviceEntry& e, const void* grad) {
  uint32_t sizes = 0;  // the sizes of all operands, as bits
  const auto for_each = [&](const auto& f) {
    f(e.param, e.param_dtype);
    f(grad, e.grad_dtype);
#pragma unroll
    for (int k = 0; k < Rule::kSlots; ++k)
      if (Rule::uses(variant, k)) f(e.state[k], e.state_dtype[k]);
    if (e.uses >> kEma & 1) f(e.state[kEma], sizeof(T) == 8 ? DType::f64 : DType::f32);
  };
  for_each([&](const void*, DType d) { sizes |= static_cast<uint32_t>(size_of(d)); });
  const int width = sizes == 8 ? 2 : sizes > 8 ? 1 : sizes >= 4 ? 4 : 8;
  // Sizes and widths are powers of 2.
  const uint32_t bytes = static_cast<uint32_t>(size_of(e.param_dtype)), group = width * bytes;
  const uint32_t over = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(e.param)) & (group - 1);
  const int head = static_cast<int>((group - over) & (group - 1)) >> (bytes == 2 ? 1 : bytes == 4 ? 2 : 3);
  uint32_t misaligned = width == 1 ? 1 : 0;
  for_each([&](const void* base, DType d) {
    const uint32_t size = static_cast<uint32_t>(size_of(d));
    misaligned |= (static_cast<uint32_t>(reinterpret_cast<uintptr_t>(base)) + head * size) & (width * size - 1);
  });
  return misaligned ? Vectors{1, 0} : Vectors{width, head};
}

// mixed: some operands may have 64 bits and others less.
template <class Rule, int variant, class T, bool mixed>
__device__ __forceinline__ void update_range(const BlockWork& work, const typename Rule::template Scalars<T>& scalars,
                                             const int64_t* layouts) {
  const auto c = scalars;
  const int64_t n = work.entry.numel;
  const Vectors v = work.entry.layout >= 0 ? Vectors{1, 0} : vectors<Rule, variant, T>(work.entry, work.grad);
  // Ranges are moved up by the head, which the first one does as well, and cut where the tensor ends.
  const int64_t head = v.head < n ? v.head : n;
  const int64_t begin = work.begin + head < n ? work.begin + head : n;
  const int64_t end = work.end + head < n ? work.end + head : n;
  const uint32_t groups = v.width > 1 ? static_cast<uint32_t>(end - begin) / v.width : 0;
  using Floats = Known<DType::f32, DType::f32, DType::f32>;
  using Halves = Known<DType::bf16, DType::bf16, DType::bf16>;
  using HalvesAndFloats = Known<DType::bf16, DType::bf16, DType::f32>;
  if constexpr (sizeof(T) == 8) {
    if (v.width == 2) update_groups<Rule, variant, T, 2, LookedUp>(work, begin, groups, c);
  } else if constexpr (!mixed) {
    if (v.width == 4 && has<Rule, variant, Floats>(work))
      update_groups<Rule, variant, T, 4, Floats>(work, begin, groups, c);
    else if (v.width == 4 && has<Rule, variant, HalvesAndFloats>(work))
      update_groups<Rule, variant, T, 4, HalvesAndFloats>(work, begin, groups, c);
    else if (v.width == 4)
      update_groups<Rule, variant, T, 4, LookedUp>(work, begin, groups, c);
    else if (v.width == 8 && has<Rule, variant, Halves>(work))
      update_groups<Rule, variant, T, 8, Halves>(work, begin, groups, c);
    else if (v.width == 8)
      update_groups<Rule, variant, T, 8, LookedUp>(work, begin, groups, c);
  }
  const int64_t done = begin + groups * v.width, gap = work.begin == 0 ? head : 0;
  update_singles<Rule, variant, T, mixed>(work, 0, gap, done, gap + end - done, c, layouts);
}

// The same, for the entry's own variant.
template <class Rule, class T, bool mixed, int variant = 0>
__device__ __forceinline__ void update_variant(const BlockWork& work, const typename Rule::template Scalars<T>& scalars,
                                               const int64_t* layouts) {
  if constexpr (variant < Rule::variants) {
    if (work.entry.variant == variant)
      update_range<Rule, variant, T, mixed>(work, scalars, layouts);
    else
      update_variant<Rule, T, mixed, variant + 1>(work, scalars, layouts);
  }
}

// For a step that is skipped.
template <bool mixed>
__device__ __noinline__ void zero_gradient(const BlockWork& work, const int64_t* layouts) {
  const DeviceEntry& e = work.entry;
  for (int64_t i = work.begin + threadIdx.x; i < work.end; i += kThreads) {
    int64_t at[kOperands];
    at[kGrad] = i;
    if (e.layout >= 0) strided_offsets(layouts + e.layout, i, at);
    store_single<mixed>(work.grad, e.grad_dtype, at[kGrad], 0.0f);
  }
}

}  // namespace fusedoptim::cuda
