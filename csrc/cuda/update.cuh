// The elementwise update of a range of one tensor by one block: the loop, once for every rule, variant and dtype.
#pragma once

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
  Around<float> around32;
  Around<double> around64;

  __device__ void surround(const Composition& c) {
    zero_grad = c.zero_grad;
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

// A parameter as it reads after it was stored.
template <class T>
__device__ __forceinline__ T as_stored(T x, DType d) {
  if constexpr (sizeof(T) == 4)
    if (size_of(d) == 2) return decode_16(encode_16(x, d), d);
  return x;
}

// `count` groups of G elements from `begin` on. Each thread has two of them, 32 bytes per operand, under way at once.
template <class Rule, int variant, class T, int G>
__device__ __forceinline__ void update_groups(const BlockWork& work, int64_t begin, int64_t count,
                                              const typename Rule::template Scalars<T>& c) {
  constexpr int U = 2;
  constexpr bool kEarly = G == 4;  // there are registers for it, which in fp64 there are not
  const DeviceEntry& e = work.entry;
  const auto [intake, toward_param] = work.around<T>();
  const bool averages = (e.uses >> kEma & 1) != 0, zero_grad = work.zero_grad;
  constexpr DType kCompute = sizeof(T) == 8 ? DType::f64 : DType::f32;
#pragma unroll 1
  for (int64_t first = threadIdx.x; first < count; first += U * kThreads) {
    Raw p[U], g[U], s[U][kStates];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (first + u * kThreads >= count) break;
      const int64_t i = begin + (first + u * kThreads) * G;
      fetch<G>(g[u], work.grad, e.grad_dtype, i);
      fetch<G>(p[u], e.param, e.param_dtype, i);
#pragma unroll
      for (int k = 0; k < Rule::kSlots; ++k)
        if (Rule::uses(variant, k)) fetch<G>(s[u][k], e.state[k], e.state_dtype[k], i);
      if (kEarly && averages) fetch<G>(s[u][kEma], e.state[kEma], kCompute, i);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (first + u * kThreads >= count) break;
      const int64_t i = begin + (first + u * kThreads) * G;
      T param[G], gradient[G], state[kMaxSlots][G];
      decode<G>(param, p[u], e.param_dtype);
      decode<G>(gradient, g[u], e.grad_dtype);
#pragma unroll
      for (int k = 0; k < Rule::kSlots; ++k)
        if (Rule::uses(variant, k)) decode<G>(state[k], s[u][k], e.state_dtype[k]);
#pragma unroll
      for (int j = 0; j < G; ++j) {
        T slots[kMaxSlots];
#pragma unroll
        for (int k = 0; k < Rule::kSlots; ++k)
          if (Rule::uses(variant, k)) slots[k] = state[k][j];
        Rule::template update<variant, Lane<T>>(param[j], taken<Lane<T>>(gradient[j], intake), slots, c);
#pragma unroll
        for (int k = 0; k < Rule::kSlots; ++k)
          if (Rule::uses(variant, k)) state[k][j] = slots[k];
      }
#pragma unroll
      for (int k = 0; k < Rule::kSlots; ++k)
        if (Rule::uses(variant, k)) put<G>(e.state[k], e.state_dtype[k], i, state[k]);
      put<G>(e.param, e.param_dtype, i, param);
      if (G != 8 && averages) {  // eight elements are a group only where all operands have 16 bits
        T ema[G];
        if (!kEarly) fetch<G>(s[u][kEma], e.state[kEma], kCompute, i);
        decode<G>(ema, s[u][kEma], kCompute);
#pragma unroll
        for (int j = 0; j < G; ++j) ema[j] = lerp<Lane<T>>(ema[j], as_stored(param[j], e.param_dtype), toward_param);
        put<G>(e.state[kEma], kCompute, i, ema);
      }
      if (zero_grad) {
        const T zeros[G] = {};
        put<G>(work.grad, e.grad_dtype, i, zeros);
      }
    }
  }
}

// Single elements: [begin, begin + gap) and from there on [resume, ...), `count` in all. Heads, tails, and tensors
// without a common alignment or memory order.
template <class Rule, int variant, class T, bool mixed>
__device__ __forceinline__ void update_singles(const BlockWork& work, int64_t begin, int64_t gap, int64_t resume,
                                               int64_t count, const typename Rule::template Scalars<T>& c,
                                               const int64_t* layouts) {
  constexpr int U = mixed ? 1 : 2;
  const DeviceEntry& e = work.entry;
  const auto [intake, toward_param] = work.around<T>();
  const bool averages = (e.uses >> kEma & 1) != 0, zero_grad = work.zero_grad;
  constexpr DType kCompute = sizeof(T) == 8 ? DType::f64 : DType::f32;
#pragma unroll 1
  for (int64_t first = threadIdx.x; first < count; first += U * kThreads) {
    T p[U], g[U], s[U][kStates];
    int64_t at[U][kOperands];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t j = first + u * kThreads;
      if (j >= count) break;
      const int64_t i = j < gap ? begin + j : resume + (j - gap);
      if (e.layout >= 0)
        strided_offsets(layouts + e.layout, i, at[u]);
      else
        for (int k = 0; k < kOperands; ++k) at[u][k] = i;
      g[u] = load_single<T, mixed>(work.grad, e.grad_dtype, at[u][kGrad]);
      p[u] = load_single<T, mixed>(e.param, e.param_dtype, at[u][kParam]);
#pragma unroll
      for (int k = 0; k < Rule::kSlots; ++k)
        if (Rule::uses(variant, k))
          s[u][k] = load_single<T, mixed>(e.state[k], e.state_dtype[k], at[u][kFirstState + k]);
      s[u][kEma] = averages ? load_single<T, mixed>(e.state[kEma], kCompute, at[u][kFirstState + kEma]) : T(0);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (first + u * kThreads >= count) break;
      Rule::template update<variant, Lane<T>>(p[u], taken<Lane<T>>(g[u], intake), s[u], c);
#pragma unroll
      for (int k = 0; k < Rule::kSlots; ++k)
        if (Rule::uses(variant, k)) store_single<mixed>(e.state[k], e.state_dtype[k], at[u][kFirstState + k], s[u][k]);
      store_single<mixed>(e.param, e.param_dtype, at[u][kParam], p[u]);
      if (averages)
        store_single<mixed>(e.state[kEma], kCompute, at[u][kFirstState + kEma],
                            lerp<Lane<T>>(s[u][kEma], as_stored(p[u], e.param_dtype), toward_param));
      if (zero_grad) store_single<mixed>(work.grad, e.grad_dtype, at[u][kGrad], T(0));
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
  const int64_t groups = v.width > 1 ? (end - begin) / v.width : 0;
  if constexpr (sizeof(T) == 8) {
    if (v.width == 2) update_groups<Rule, variant, T, 2>(work, begin, groups, c);
  } else if constexpr (!mixed) {
    if (v.width == 4) update_groups<Rule, variant, T, 4>(work, begin, groups, c);
    if (v.width == 8) update_groups<Rule, variant, T, 8>(work, begin, groups, c);
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
