// The tensors that a step reads and writes for one parameter: its operands.
#pragma once

#include <cstdint>

#include "storage.h"

namespace fusedoptim {

// States with the parameter's shape: the rule's own, then the moving average of the parameter that any rule can have.
inline constexpr int kMaxSlots = 3, kAverage = kMaxSlots, kStates = kMaxSlots + 1;

// States that are one fp32 number per tensor; sums of squares over whole tensors that a rule may ask for.
inline constexpr int kMaxNumbers = 3, kMaxSums = 2;

enum OperandIndex { kParam, kGrad, kFirstState };
inline constexpr int kOperands = kFirstState + kStates;
// In a layout: the place of an element in the whole tensor, of which this one may be a shard.
inline constexpr int kIndex = kOperands, kStrides = kOperands + 1;

// Where an operand's numbers are, and how they are stored.
struct Operand {
  void* data;
  void* extra;  // what the storage keeps beside the elements; a dtype keeps nothing
  Storage storage;
};

// Which of its rule's programs a row of hyper-parameters needs, and whether the moving average is kept.
struct Variant {
  uint8_t program = 0;
  bool average = false;

  bool operator==(const Variant& other) const { return program == other.program && average == other.average; }
  bool operator!=(const Variant& other) const { return !(*this == other); }
};

}  // namespace fusedoptim
