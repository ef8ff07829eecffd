// Elements of any storages, in any memory order, in blocks or not: element by element, for what the loops of groups do
// not take. A warp does a span of elements: a block of states in 8 bits, or as many others.
#pragma once

#include "../core/block.h"
#include "block_work.cuh"

namespace fusedoptim::cuda {

inline constexpr int kSpan = static_cast<int>(kBlock);

// What a warp makes of a span's states before it knows their scales.
struct Staged {
  float state[kMaxSlots][kSpan];
};
// The one buffer that all rules and variants in a kernel share.
__device__ inline Staged& staged_by_warp() {
  __shared__ Staged staged[kWarps];
  return staged[threadIdx.x / kWarp];
}

// Called: inlined for each operand of each variant, their cases would take most of the compiler's time.
template <class T, bool wide>
__device__ __noinline__ T load_any(const Addresses& o, Storage s, int64_t at) {
  if (is_dtype(s)) return load_single<T, wide>(o.data, static_cast<DType>(s), at);
  return load_stored<T>(o.data, o.extra, s, at);
}
template <bool wide, class T>
__device__ __noinline__ void store_any(const Addresses& o, Storage s, int64_t at, T x, uint32_t random) {
  if (is_dtype(s)) return store_single<wide>(o.data, static_cast<DType>(s), at, x);
  store_stored<T>(o.data, o.extra, s, at, x, random);
}

__device__ __noinline__ inline void find_strided(const int64_t* layout, int64_t i, int64_t (&at)[kStrides]) {
  strided_offsets(layout, i, at);
}

// Blocks are numbered row by row.
struct Blocks {
  int64_t row, in_row;

  __device__ static Blocks of(int64_t row) { return {row, blocks_of_row(row)}; }
  // The first that begins at element i or later.
  __device__ int64_t first_from(int64_t i) const { return i / row * in_row + (i % row + kBlock - 1) / kBlock; }
  __device__ int64_t begin(int64_t block) const { return block / in_row * row + block % in_row * kBlock; }
  __device__ int size(int64_t block) const {
    const int64_t left = row - block % in_row * kBlock;
    return static_cast<int>(left < kBlock ? left : kBlock);
  }
};

// How many words of random bits an element's operands share.
template <class Rule, int variant>
constexpr int words_of() {
  int words = 1;
  for (int k = 0; k < Rule::kSlots; ++k) {
    const int word = half_of_slot(k, Rule::second_moment) / 2;
    if (Rule::uses(variant, k) && word >= words) words = word + 1;
  }
  return words;
}

// One span's work, for all lanes of a warp: elements [begin, begin + count), which are `block` where something is in
// blocks.
template <class Rule, int variant, class T, bool wide>
struct Span {
  static constexpr bool kMayHaveBlocks = sizeof(T) == 4 && Rule::kSlots > 0;
  const BlockWork& work;
  const typename Rule::template Scalars<T>& c;
  const int64_t* layouts;
  int64_t begin, block;
  int count;
  bool is_stochastic;

  __device__ bool in_blocks(int slot) const { return kMayHaveBlocks && is_in_blocks(work.storage(kFirstState + slot)); }
  __device__ const Addresses& operand(int k) const { return work.entry.operand[k]; }
  __device__ float* scale(int slot) const { return static_cast<float*>(operand(kFirstState + slot).extra) + block; }
  __device__ uint8_t* code(int slot, int64_t at) const {
    return static_cast<uint8_t*>(operand(kFirstState + slot).data) + at;
  }

  // Where element i of the tensor lies in each operand; last, which it is of the whole tensor.
  __device__ void find(int64_t i, int64_t (&at)[kStrides]) const {
    if (work.entry.layout >= 0)
      find_strided(layouts + work.entry.layout, i, at);
    else
      for (int k = 0; k < kStrides; ++k) at[k] = i;
    at[kIndex] += work.entry.first_index;
  }

  __device__ T load_state(int slot, int64_t at) const {
    const Storage s = work.storage(kFirstState + slot);
    if (in_blocks(slot)) {
      const BlockFormat f = block_format(s);
      return block_value(f, *code(slot, at), block_unit(f, *scale(slot)));
    }
    return load_any<T, wide>(operand(kFirstState + slot), s, at);
  }

  // The whole of an element but for states in blocks, which are left staged.
  __device__ void update_element(int j, Staged& staged) const {
    int64_t at[kStrides];
    find(begin + j, at);
    Element<T> x[1];
    x[0].param = load_any<T, wide>(operand(kParam), work.storage(kParam), at[kParam]);
    x[0].grad = load_single<T, wide>(work.data(kGrad), work.dtype(kGrad), at[kGrad]);
#pragma unroll
    for (int k = 0; k < Rule::kSlots; ++k)
      if (Rule::uses(variant, k)) x[0].state[k] = load_state(k, at[kFirstState + k]);
    update_elements<Rule, variant, Lane<T>, Around::before>(x, work.transforms<T>(), c);
    uint32_t random[kWords] = {};
    if (is_stochastic)
      for (int k = 0; k < words_of<Rule, variant>(); ++k)
        random[k] = work.random.word(k, static_cast<uint64_t>(at[kIndex]));
#pragma unroll
    for (int k = 0; k < Rule::kSlots; ++k) {
      if (!Rule::uses(variant, k)) continue;
      const int half = half_of_slot(k, Rule::second_moment), o = kFirstState + k;
      if (in_blocks(k))
        staged.state[k][j] = static_cast<float>(x[0].state[k]);
      else
        store_any<wide>(operand(o), work.storage(o), at[o], x[0].state[k], random[half / 2] >> half % 2 * 16 & 0xffffu);
    }
    const uint32_t of_param = random[0] & 0xffffu;
    store_any<wide>(operand(kParam), work.storage(kParam), at[kParam], x[0].param, of_param);
    if (work.average()) {
      const int64_t there = at[kAverageOperand];
      x[0].state[kAverage] = load_single<T, wide>(work.data(kAverageOperand), kCompute<T>, there);
      average_element<Lane<T>>(x[0], work.transforms<T>(), as_stored_in(work.storage(kParam), x[0].param, of_param));
      store_single<wide>(work.data(kAverageOperand), kCompute<T>, there, x[0].state[kAverage]);
    }
    if (work.zero_grad()) store_single<wide>(work.data(kGrad), work.dtype(kGrad), at[kGrad], T(0));
  }

  // Scales a state's new numbers and stores their codes.
  __device__ void store_block(int slot, const float* x) const {
    const int lane = threadIdx.x % kWarp;
    const Storage s = work.storage(kFirstState + slot);
    const BlockFormat f = block_format(s);
    uint32_t largest = 0;
    for (int j = lane; j < count; j += kWarp) {
      const uint32_t magnitude = bits_of(x[j]) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
    }
    for (int delta = kWarp / 2; delta > 0; delta /= 2) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, largest, delta);
      largest = other > largest ? other : largest;
    }
    const float scaled_by = block_scale(largest), inverse = block_inverse(f, scaled_by);
    if (lane == 0) *scale(slot) = scaled_by;
    const int half = half_of_slot(slot, Rule::second_moment);
    for (int j = lane; j < count; j += kWarp) {
      int64_t at[kStrides];
      find(begin + j, at);
      uint32_t rounding = block_half(f);
      if (fusedoptim::is_stochastic(s)) {
        const uint32_t word = work.random.word(half / 2, static_cast<uint64_t>(at[kIndex]));
        rounding = block_random(f, word >> half % 2 * 16 & 0xffffu);
      }
      *code(slot, at[kFirstState + slot]) = block_byte(f, x[j], block_code(f, x[j], inverse, rounding));
    }
  }

  __device__ void run() const {
    Staged& staged = staged_by_warp();
#pragma unroll 1
    for (int j = threadIdx.x % kWarp; j < count; j += kWarp) update_element(j, staged);
    if constexpr (kMayHaveBlocks) {
      __syncwarp();  // nobody reads a scale any more
#pragma unroll 1
      for (int k = 0; k < Rule::kSlots; ++k)
        if (Rule::uses(variant, k) && in_blocks(k)) store_block(k, staged.state[k]);
    }
  }
};

// Called: a loop that comes back to elements needs its registers.
template <class Rule, int variant, class T, bool wide>
__device__ __noinline__ void update_span(const BlockWork& work, int64_t begin, int64_t block, int count,
                                         const typename Rule::template Scalars<T>& c, const int64_t* layouts) {
  Span<Rule, variant, T, wide>{work, c, layouts, begin, block, count, work.is_stochastic()}.run();
}

// Elements [begin, end), or the blocks that begin there.
template <class Rule, int variant, class T, bool wide>
__device__ __forceinline__ void update_spans(const BlockWork& work, int64_t begin, int64_t end,
                                             const typename Rule::template Scalars<T>& c, const int64_t* layouts) {
  const int warp = threadIdx.x / kWarp;
  const bool in_blocks = work.entry.row > 0;
  const Blocks blocks = Blocks::of(in_blocks ? work.entry.row : kBlock);
  const int64_t first = in_blocks ? blocks.first_from(begin) : 0;
  const int64_t last = in_blocks ? blocks.first_from(end) : (end - begin + kSpan - 1) / kSpan;
#pragma unroll 1
  for (int64_t k = first + warp; k < last; k += kWarps) {
    const int64_t i = in_blocks ? blocks.begin(k) : begin + k * kSpan, left = end - i;
    const int count = in_blocks ? blocks.size(k) : static_cast<int>(left < kSpan ? left : kSpan);
    update_span<Rule, variant, T, wide>(work, i, k, count, c, layouts);
  }
}

}  // namespace fusedoptim::cuda
