// The table a step works on: one entry per parameter tensor, one row of hyper-parameters per group. Plain structs.
#pragma once

#include <cstdint>

#include "layout.h"
#include "operand.h"
#include "random_bits.h"
#include "row.h"
#include "step_count.h"
#include "transforms.h"

namespace fusedoptim {

struct Entry;
// What the elements of a tensor have in common in one step.
struct UpdateInputs {
  const void* scalars;  // the rule's Scalars<T>
  const GroupTransforms& transforms;
  uint64_t stream;  // of random bits
  // For a loop that leaves it to others to encode its parameters: where it puts them; and words 0, if they are wanted.
  void* params = nullptr;
  uint32_t* words = nullptr;
};
// Updates elements [begin, end) of a tensor.
using UpdateFn = void (*)(const Entry&, int64_t begin, int64_t end, const UpdateInputs&);
// The sum of squares of elements [1024*tile, 1024*(tile+1)) of the gradient, transformed.
using TileSumFn = double (*)(const Entry&, int64_t tile, const GroupTransforms&);
// The sums of squares that a rule asks for, of the same elements: one behind the other.
using MeasureFn = void (*)(const Entry&, int64_t tile, const UpdateInputs&, double* sums);

// Four cache lines. What a plan looks at in every step comes first, parameter and gradient included: two of them.
struct alignas(64) Entry {
  int64_t numel = 0;
  const Layout* layout = nullptr;      // null: all operands share one dense memory order
  const Layout* sum_layout = nullptr;  // for sums over a whole tensor; null: its operands lie in logical order
  UpdateFn update = nullptr;
  int32_t group = 0;
  DType step_dtype = DType::f32;
  bool active = false;         // has a gradient in this step
  bool first = false;          // its states were created for this step
  bool is_stochastic = false;  // some operand takes random bits
  void* step = nullptr;        // 0-dim, fp32 or fp64; null for a rule without a step
  Variant variant;             // of its group
  bool ready = false;          // all that a step needs of it is there
  Operand operand[kOperands] = {};
  float* numbers[kMaxNumbers] = {};  // the rule's states that are one; null for one that its group does without
  int64_t whole_numel = 0;           // of the whole tensor that this one may be a shard of
  int64_t first_index = 0;           // of its first element, in the whole tensor
  uint64_t id = 0;                   // of the parameter, for its random bits
  int64_t row = 0;                   // elements in one row of what is stored in blocks; 0 where nothing is

  Operand& param() { return operand[kParam]; }
  Operand& grad() { return operand[kGrad]; }
  Operand& state(int k) { return operand[kFirstState + k]; }
  FUSEDOPTIM_HD const Operand& param() const { return operand[kParam]; }
  FUSEDOPTIM_HD const Operand& grad() const { return operand[kGrad]; }
  FUSEDOPTIM_HD const Operand& state(int k) const { return operand[kFirstState + k]; }
  FUSEDOPTIM_HD DType compute_dtype() const { return compute_dtype_of(param().storage); }
};
static_assert(sizeof(Entry) == 4 * 64);

}  // namespace fusedoptim
