// What a plan, an executor and a device need to know of a rule: a value, which also a rule that is compiled later can
// give.
#pragma once

#include "../core/operand.h"
#include "../core/row.h"
#include "../core/tensor_table.h"
#include "common.h"

namespace fusedoptim {

inline constexpr int kMaxVariants = 4, kMaxScalarBytes = 128;

// The instruction sets that the CPU's kernels are compiled for, each in a file of its own.
enum CpuCapability { kPortable, kAvx2, kAvx512, kCpuCapabilities };

// Gives the kernel for an entry's storage and layout.
using FindUpdate = UpdateFn (*)(int variant, const Entry&);

struct RuleHandle {
  const char* name;
  // Names, in the order of their columns from kFirstRuleHyper on, and of their states.
  const char* const* hyper_names;
  const char* const* state_names;
  int hypers, slots, variants;  // columns of a row, those of every rule included; states
  bool has_step, needs_norm, divides;
  int second_moment;  // the state that is one, or -1
  // Which code, and which states, a row of hyper-parameters needs.
  int (*variant)(const double* hyper);
  bool (*uses)(int variant, int slot);
  // Writes the rule's Scalars<float> or Scalars<double>.
  void (*prepare_f32)(const StepInputs&, void* scalars);
  void (*prepare_f64)(const StepInputs&, void* scalars);
  float (*next_scalar_state)(const StepInputs&);  // null for a rule without one
  FindUpdate cpu[kCpuCapabilities];               // null where it was not compiled for one

  Variant variant_of(const double* hyper) const {
    return {static_cast<uint8_t>(variant(hyper)), hyper[kEmaDecay] >= 0};
  }
  bool uses_state(Variant v, int state) const {
    return state == kAverage ? v.average : state < slots && uses(v.code, state);
  }
};

}  // namespace fusedoptim
