// The update of a range of a tensor whose operands may have any storages: which loop takes what of it.
#pragma once

#include "../gpu/tuning.h"
#include "stored_groups.cuh"

namespace fusedoptim::cuda {

// Bits of `left` are for the spans of a warp.
static_assert(gpu::kLargestChunk <= 32 * kThreads * AnyStorages::width && kPart <= 32 * kThreads * AnyStorages::width);

template <class Rule, int variant, class Storages>
__device__ __forceinline__ bool has_storages(const BlockWork& work) {
  bool all = true;
#pragma unroll
  for (int k = 0; k < kFirstState + Rule::kSlots; ++k)
    if (uses<Rule, variant>(k)) all = all && work.storage(k) == Storages::of(work, k);
  return all;
}

// How many elements a group has; 0 for a mix without a loop of its own.
template <class Rule, int variant, class... Loops>
__device__ __forceinline__ int known_width(const BlockWork& work, LoopList<Loops...>) {
  int width = 0;
  ((width = width == 0 && has_storages<Rule, variant, Loops>(work) ? Loops::width : width), ...);
  return width;
}

// How far into the tensor groups of this width begin, so that all operands are aligned to them; -1 if none are.
template <class Rule, int variant>
__device__ __forceinline__ int head_of(const BlockWork& work, int width) {
  const DeviceEntry& e = work.entry;
  if (e.layout >= 0 || e.row % kBlock != 0) return -1;
  const auto address = [](const void* p) { return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p)); };
  const uint32_t size = static_cast<uint32_t>(size_of(work.storage(kParam))), group = width * size;
  const uint32_t head = (group - (address(work.data(kParam)) & (group - 1))) & (group - 1);
  uint32_t misaligned = head % size | (e.row > 0 ? head : 0);
  const auto check = [&](const void* data, uint32_t bytes) {
    // 16 bytes at most are accessed at once.
    const uint32_t at_once = width * bytes < 16 ? width * bytes : 16;
    misaligned |= bytes == 0 ? 0 : (address(data) + head / size * bytes) & (at_once - 1);
  };
#pragma unroll
  for (int k = 0; k < kOperands; ++k) {
    if (!uses<Rule, variant>(k)) continue;
    check(work.data(k), static_cast<uint32_t>(size_of(work.storage(k))));
    check(e.operand[k].extra, static_cast<uint32_t>(extra_size_of(work.storage(k))));
  }
  if (work.average()) check(work.data(kAverageOperand), 4);
  return misaligned ? -1 : static_cast<int>(head / size);
}

// Whether all indices of a range have the same upper half, for which the keys are.
__device__ __forceinline__ bool has_one_key(const BlockWork& work, int64_t begin, int64_t end) {
  if (!work.is_stochastic()) return true;
  const uint64_t first = static_cast<uint64_t>(work.entry.first_index);
  return (first + begin) >> 32 == work.random.upper && (first + end - 1) >> 32 == work.random.upper;
}

template <class Rule, int variant, class... Loops>
__device__ __forceinline__ void update_by_loop(const BlockWork& work, int64_t begin, uint32_t spans,
                                               const typename Rule::template Scalars<float>& c, LoopList<Loops...>) {
  const bool found = ((has_storages<Rule, variant, Loops>(work)
                           ? (update_stored_groups<Rule, variant, Loops>(work, begin, spans, c), true)
                           : false) ||
                      ...);
  if (!found) update_stored_groups<Rule, variant, AnyStorages>(work, begin, spans, c);
}

template <class Rule, int variant, class T, bool wide>
__device__ __forceinline__ void update_stored_range(const BlockWork& work,
                                                    const typename Rule::template Scalars<T>& scalars,
                                                    const int64_t* layouts) {
  int64_t begin = work.begin, end = work.end, done = begin, gap = 0;
  if constexpr (!wide) {
    using Loops = decltype(known_loops<Rule, variant>());
    const int known = known_width<Rule, variant>(work, Loops{}), width = known ? known : AnyStorages::width;
    const int head = head_of<Rule, variant>(work, width);
    if (head >= 0) {
      // Ranges are moved up by the head, which the first one does as well.
      const auto moved = [&](int64_t at) { return at + head < work.entry.numel ? at + head : work.entry.numel; };
      gap = begin == 0 ? moved(0) : 0;
      begin = moved(begin);
      end = moved(end);
      const int span = kWarp * width;
      const uint32_t spans = has_one_key(work, begin, end) ? static_cast<uint32_t>(end - begin) / span : 0;
      const auto c = scalars;
      if (threadIdx.x % kWarp == 0) left_by_warp() = 0;
      __syncwarp();
      update_by_loop<Rule, variant>(work, begin, spans, c, Loops{});
      __syncwarp();
      done = begin + static_cast<int64_t>(spans) * span;
      uint32_t left = left_by_warp();
      for (int64_t i = begin + threadIdx.x / kWarp * span; left != 0; left >>= 1, i += kWarps * span)
        for (int k = 0; (left & 1) && k < span; k += kSpan)
          update_span<Rule, variant, T, wide>(work, i + k, (i + k) / kBlock, kSpan, scalars, layouts);
    }
  }
  if (gap > 0) update_spans<Rule, variant, T, wide>(work, 0, gap, scalars, layouts);
  update_spans<Rule, variant, T, wide>(work, done, end, scalars, layouts);
}

}  // namespace fusedoptim::cuda
