// One block's piece of a step.
#pragma once

#include "../core/random_bits.h"
#include "../rules/step_element.h"
#include "codec.cuh"
#include "lanes.cuh"
#include "tuning.h"

namespace fusedoptim::cuda {

// The place of the moving average among the operands.
inline constexpr int kAverageOperand = kFirstState + kAverage;

// Where the random bits of a tensor's elements come from. The keys are for the upper half of the index that the block's
// first element has in the whole tensor, which nearly all of its elements have.
struct RandomSource {
  uint64_t stream;
  uint32_t upper;
  RandomKey key[kWords];

  // What one of kWords lanes does. begin: the block's first element in its tensor.
  __device__ void prepare(int lane, uint64_t seed, const DeviceEntry& e, double step, int64_t begin) {
    const uint64_t own = random_stream(seed, e.id, static_cast<uint64_t>(step));
    const uint32_t half = static_cast<uint32_t>(static_cast<uint64_t>(e.first_index + begin) >> 32);
    key[lane] = RandomKey::of(own, lane, half);
    if (lane == 0) {
      stream = own;
      upper = half;
    }
  }
  __device__ __noinline__ uint32_t word(int which, uint64_t index) const {
    const uint32_t half = static_cast<uint32_t>(index >> 32);
    return random_word(static_cast<uint32_t>(index), half == upper ? key[which] : RandomKey::of(stream, which, half));
  }
};

// As the block's first warp found it, in shared memory.
struct BlockWork {
  DeviceEntry entry;
  RandomSource random;  // in kernels for storages that are no dtypes
  int64_t begin, end;   // elements
  int64_t item, items;  // of the segment
  int32_t index;        // of the entry
  Work work;
  bool first;  // its states count as absent
  Transforms<float> transforms32;
  Transforms<double> transforms64;

  __device__ void set_transforms(const GroupTransforms& t) {
    transforms32 = Transforms<float>::of(t);
    transforms64 = Transforms<double>::of(t);
  }
  template <class T>
  __device__ const Transforms<T>& transforms() const {
    if constexpr (sizeof(T) == 8)
      return transforms64;
    else
      return transforms32;
  }
  __device__ bool zero_grad() const { return transforms32.zero_grad; }
  __device__ bool average() const { return (entry.kind.uses >> kAverage & 1) != 0; }
  __device__ void* data(int operand) const { return entry.operand[operand].data; }
  __device__ Storage storage(int operand) const { return entry.kind.storage[operand]; }
  // Of a storage that is one.
  __device__ DType dtype(int operand) const { return static_cast<DType>(storage(operand)); }
  __device__ bool is_stochastic() const {
    bool any = false;
    for (int k = 0; k < kOperands; ++k) any |= fusedoptim::is_stochastic(storage(k));
    return any;
  }
  __device__ bool computes_in_f64() const { return storage(kParam) == Storage::f64; }
};

// Whether a variant reads and writes an operand. The moving average is not among these.
template <class Rule, int variant>
constexpr bool uses(int operand) {
  return operand < kFirstState || (operand < kFirstState + Rule::kSlots && Rule::uses(variant, operand - kFirstState));
}

template <class Rule, int variant>
constexpr int states_of() {
  int states = 0;
  for (int k = 0; k < Rule::kSlots; ++k) states += Rule::uses(variant, k);
  return states;
}

template <class T>
__device__ __forceinline__ T& value_of(Element<T>& x, int operand) {
  return operand == kParam ? x.param : operand == kGrad ? x.grad : x.state[operand - kFirstState];
}

}  // namespace fusedoptim::cuda
