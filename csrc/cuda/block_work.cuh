// One block's piece of a step.
#pragma once

#include "../rules/step_element.h"
#include "codec.cuh"
#include "lanes.cuh"
#include "tuning.h"

namespace fusedoptim::cuda {

// The place of the moving average among the operands.
inline constexpr int kAverageOperand = kFirstState + kAverage;

// As the block's first warp found it, in shared memory.
struct BlockWork {
  DeviceEntry entry;
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
  __device__ DType storage(int operand) const { return entry.kind.storage[operand]; }
  __device__ bool computes_in_f64() const { return storage(kParam) == DType::f64; }
};

}  // namespace fusedoptim::cuda
