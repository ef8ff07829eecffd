// The elementwise update of a range of one tensor by one block: the loops, once for every rule, variant and storage.
// They load, have rules/step_element.h do the work, and store.
#pragma once

#include <type_traits>

#include "block_work.cuh"

namespace fusedoptim::cuda {

// ---- storages of a tensor's operands: known when compiled, for what nearly all tensors are, or looked up ----

template <DType kParamAndGrad, DType kState>
struct Known {
  static constexpr Around around = Around::before;
  static constexpr __device__ DType of(const BlockWork&, int operand) {
    return operand < kFirstState ? kParamAndGrad : kState;
  }
};
struct LookedUp {
  static constexpr Around around = Around::everything;
  static __device__ DType of(const BlockWork& work, int operand) { return work.dtype(operand); }
};

// Whether a tensor's operands have these storages, and nothing happens after the rule.
template <class Rule, int variant, class Storages>
__device__ __forceinline__ bool has(const BlockWork& work) {
  bool all = !work.zero_grad() && !work.average();
#pragma unroll
  for (int k = 0; k < kFirstState + Rule::kSlots; ++k)
    if (uses<Rule, variant>(k)) all = all && work.dtype(k) == Storages::of(work, k);
  return all;
}

// ---- single elements ----

template <class T>
struct Single {
  Element<T> value[1];
  int64_t at[kOperands];
};

template <class Rule, int variant, class T, bool wide>
__device__ __forceinline__ void load_operands(Single<T>& x, const BlockWork& work, int64_t i, const int64_t* layouts) {
  if (work.entry.layout >= 0)
    strided_offsets(layouts + work.entry.layout, i, x.at);
  else
    for (int k = 0; k < kOperands; ++k) x.at[k] = i;
#pragma unroll
  for (int k = 0; k < kOperands; ++k) {
    if (uses<Rule, variant>(k)) value_of(x.value[0], k) = load_single<T, wide>(work.data(k), work.dtype(k), x.at[k]);
  }
  x.value[0].state[kAverage] =
      work.average() ? load_single<T, wide>(work.data(kAverageOperand), kCompute<T>, x.at[kAverageOperand]) : T(0);
}

template <class Rule, int variant, class T, bool wide>
__device__ __forceinline__ void update_operands(Single<T>& x, const BlockWork& work,
                                                const typename Rule::template Scalars<T>& c) {
  update_elements<Rule, variant, Lane<T>, Around::before>(x.value, work.transforms<T>(), c);
  if (work.average())
    average_element<Lane<T>>(x.value[0], work.transforms<T>(), as_stored(x.value[0].param, work.dtype(kParam)));
  if (work.zero_grad()) x.value[0].grad = T(0);
#pragma unroll
  for (int k = 0; k < kOperands; ++k) {
    if (k == kGrad ? work.zero_grad() : uses<Rule, variant>(k))
      store_single<wide>(work.data(k), work.dtype(k), x.at[k], value_of(x.value[0], k));
  }
  if (work.average())
    store_single<wide>(work.data(kAverageOperand), kCompute<T>, x.at[kAverageOperand], x.value[0].state[kAverage]);
}

// [begin, begin + gap) and from there on [resume, ...), `count` in all. Heads, tails, and tensors without a common
// alignment or memory order.
template <class Rule, int variant, class T, bool wide>
__device__ __forceinline__ void update_singles(const BlockWork& work, int64_t begin, int64_t gap, int64_t resume,
                                               int64_t count, const typename Rule::template Scalars<T>& c,
                                               const int64_t* layouts) {
  constexpr int U = wide || states_of<Rule, variant>() > 2 ? 1 : 2;  // under way at once, as registers allow
#pragma unroll 1
  for (int64_t first = threadIdx.x; first < count; first += U * kThreads) {
    Single<T> x[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t j = first + u * kThreads;
      if (j >= count) break;
      load_operands<Rule, variant, T, wide>(x[u], work, j < gap ? begin + j : resume + (j - gap), layouts);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (first + u * kThreads >= count) break;
      update_operands<Rule, variant, T, wide>(x[u], work, c);
    }
  }
}

// ---- groups of elements ----

// A group, as it was fetched and as it is to be stored.
struct Group {
  Raw operand[kOperands];
};

// The new values of a group in place of the old ones. False if they are not to be used: see FastLane.
template <class Rule, int variant, class T, int kGroup, class Storages>
__device__ __forceinline__ bool update_group(Group& x, const BlockWork& work, const Transforms<T>& t,
                                             const typename Rule::template Scalars<T>& c) {
  using M = std::conditional_t<sizeof(T) == 4, LaneOfGroups, Lane<T>>;
  constexpr bool kFast = Rule::divides && std::is_same_v<M, FastLane>;
  Element<T> elements[kGroup];
#pragma unroll
  for (int k = 0; k < kOperands; ++k) {
    if (!uses<Rule, variant>(k)) continue;
    T values[kGroup];
    decode<kGroup>(values, x.operand[k], Storages::of(work, k));
    for (int j = 0; j < kGroup; ++j) value_of(elements[j], k) = values[j];
  }
  update_elements<Rule, variant, M, Around::before>(elements, t, c);
  bool right = true;
#pragma unroll
  for (int j = 0; j < kGroup; ++j)
    if constexpr (kFast) right &= FastLane::is_right(elements[j].param);
#pragma unroll
  for (int k = 0; k < kOperands; ++k) {
    if (k == kGrad || !uses<Rule, variant>(k)) continue;
    T values[kGroup];
    for (int j = 0; j < kGroup; ++j) values[j] = value_of(elements[j], k);
    encode<kGroup>(x.operand[k], values, Storages::of(work, k));
  }
  return right;
}

// What comes after the rule, of a group that was stored from element i on. Registers are too few for it before.
template <int kGroup, class T>
__device__ __forceinline__ void finish_group(const Group& x, const BlockWork& work, int64_t i) {
  const Transforms<T>& t = work.transforms<T>();  // read where it is, in shared memory: registers are few
  // Eight elements are a group only where all operands have 16 bits, which an average has not.
  if (kGroup != 8 && work.average()) {
    char* const at = static_cast<char*>(work.data(kAverageOperand)) + i * sizeof(T);
    T averages[kGroup], params[kGroup];
    Raw raw;
    fetch<kGroup>(raw, at, kCompute<T>);
    decode<kGroup>(averages, raw, kCompute<T>);
    decode<kGroup>(params, x.operand[kParam], work.dtype(kParam));
    for (int j = 0; j < kGroup; ++j) {
      Element<T> e;
      e.state[kAverage] = averages[j];
      average_element<Lane<T>>(e, t, params[j]);
      averages[j] = e.state[kAverage];
    }
    encode<kGroup>(raw, averages, kCompute<T>);
    put<kGroup>(at, raw, kCompute<T>);
  }
  const DType grad = work.dtype(kGrad);
  if (t.zero_grad) put<kGroup>(static_cast<char*>(work.data(kGrad)) + i * size_of(grad), Raw{}, grad);
}

// How many groups a thread has under way at once: two, 32 bytes per operand, unless they need more registers than five
// blocks to a multiprocessor leave. Five loads of one group are then 50 KB per multiprocessor.
template <class Rule, int variant, class Storages>
constexpr int groups_at_once() {
  return states_of<Rule, variant>() <= (Storages::around == Around::before ? 2 : 1) ? 2 : 1;
}

// `count` groups of kGroup elements from `begin` on.
template <class Rule, int variant, class T, int kGroup, class Storages>
__device__ __forceinline__ void update_groups(const BlockWork& work, int64_t begin, uint32_t count,
                                              const typename Rule::template Scalars<T>& c) {
  constexpr int U = groups_at_once<Rule, variant, Storages>();
  const auto t = work.transforms<T>();
  char* base[kOperands];
#pragma unroll
  for (int k = 0; k < kOperands; ++k)
    if (uses<Rule, variant>(k)) base[k] = static_cast<char*>(work.data(k)) + begin * size_of(Storages::of(work, k));
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
      at[u] = (done[u] ? count - 1 : group) * kGroup;
#pragma unroll
      for (int k = 0; k < kOperands; ++k)
        if (uses<Rule, variant>(k))
          fetch<kGroup>(x[u].operand[k], base[k] + at[u] * size_of(Storages::of(work, k)), Storages::of(work, k));
    }
    bool again = false;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const bool right = update_group<Rule, variant, T, kGroup, Storages>(x[u], work, t, c);
      if (done[u]) continue;
      if (!right) {
        again = true;
        continue;
      }
      done[u] = true;
#pragma unroll
      for (int k = 0; k < kOperands; ++k)
        if (k != kGrad && uses<Rule, variant>(k))
          put<kGroup>(base[k] + at[u] * size_of(Storages::of(work, k)), x[u].operand[k], Storages::of(work, k));
      if (Storages::around == Around::everything) finish_group<kGroup, T>(x[u], work, begin + at[u]);
    }
    if (Rule::divides && sizeof(T) == 4 && again) {  // element by element, from memory
#pragma unroll 1
      for (int j = 0; j < U * kGroup; ++j) {
        const bool last = j >= kGroup * (U - 1);
        if (last ? done[U - 1] : done[0]) continue;
        const int64_t i = begin + (last ? at[U - 1] + j - kGroup * (U - 1) : at[0] + j);
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

template <class Rule, int variant>
__device__ __forceinline__ Vectors vectors(const BlockWork& work) {
  uint32_t sizes = 0;  // the sizes of all operands, as bits
  const auto for_each = [&](const auto& f) {
#pragma unroll
    for (int k = 0; k < kOperands; ++k)
      if (uses<Rule, variant>(k)) f(work.data(k), size_of(work.dtype(k)));
    if (work.average()) f(work.data(kAverageOperand), size_of(work.dtype(kAverageOperand)));
  };
  for_each([&](const void*, int64_t size) { sizes |= static_cast<uint32_t>(size); });
  const int width = sizes == 8 ? 2 : sizes > 8 ? 1 : sizes >= 4 ? 4 : 8;
  // Sizes and widths are powers of 2.
  const uint32_t bytes = static_cast<uint32_t>(size_of(work.dtype(kParam))), group = width * bytes;
  const uint32_t over = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(work.data(kParam))) & (group - 1);
  const int head = static_cast<int>((group - over) & (group - 1)) >> (bytes == 2 ? 1 : bytes == 4 ? 2 : 3);
  uint32_t misaligned = width == 1 ? 1 : 0;
  for_each([&](const void* data, uint32_t size) {
    misaligned |= (static_cast<uint32_t>(reinterpret_cast<uintptr_t>(data)) + head * size) & (width * size - 1);
  });
  return misaligned ? Vectors{1, 0} : Vectors{width, head};
}

// Ranges are moved up by the head, which the first one does as well, and cut where the tensor ends.
__device__ __forceinline__ int64_t moved(const BlockWork& work, int64_t at, int head) {
  return at + head < work.entry.numel ? at + head : work.entry.numel;
}

// wide: some operands may have 64 bits and others less.
template <class Rule, int variant, class T, bool wide>
__device__ __forceinline__ void update_range(const BlockWork& work, const typename Rule::template Scalars<T>& scalars,
                                             const int64_t* layouts) {
  const auto c = scalars;
  const Vectors v = work.entry.layout >= 0 ? Vectors{1, 0} : vectors<Rule, variant>(work);
  const int head = v.head < work.entry.numel ? v.head : static_cast<int>(work.entry.numel);
  const int64_t begin = moved(work, work.begin, head);
  const uint32_t groups = v.width > 1 ? static_cast<uint32_t>(moved(work, work.end, head) - begin) / v.width : 0;
  using Floats = Known<DType::f32, DType::f32>;
  using Halves = Known<DType::bf16, DType::bf16>;
  using HalvesAndFloats = Known<DType::bf16, DType::f32>;
  if constexpr (sizeof(T) == 8) {
    if (v.width == 2) update_groups<Rule, variant, T, 2, LookedUp>(work, begin, groups, c);
  } else if constexpr (!wide) {
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
  // Worked out again: the loops of groups need the registers.
  const int64_t done = moved(work, work.begin, head) + groups * v.width, end = moved(work, work.end, head);
  const int64_t gap = work.begin == 0 ? head : 0;
  update_singles<Rule, variant, T, wide>(work, 0, gap, done, gap + end - done, c, layouts);
}

// For a step that is skipped.
template <bool wide>
__device__ __noinline__ void zero_gradient(const BlockWork& work, const int64_t* layouts) {
  for (int64_t i = work.begin + threadIdx.x; i < work.end; i += kThreads) {
    int64_t at[kOperands];
    at[kGrad] = i;
    if (work.entry.layout >= 0) strided_offsets(layouts + work.entry.layout, i, at);
    store_single<wide>(work.data(kGrad), work.dtype(kGrad), at[kGrad], 0.0f);
  }
}

}  // namespace fusedoptim::cuda
