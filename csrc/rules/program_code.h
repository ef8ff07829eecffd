// The functions that are compiled of a rule, as plain pointers: what a library of its own hands over.
#pragma once

#include "../core/tensor_table.h"
#include "common.h"

namespace fusedoptim {

inline constexpr int kMaxPrograms = 64, kMaxScalarBytes = 1024;

// The instruction sets that the CPU's kernels are compiled for, each in a file of its own.
enum CpuCapability { kPortable, kAvx2, kAvx512, kCpuCapabilities };

// Writes the rule's Scalars<float> or Scalars<double>.
using PrepareFn = void (*)(const StepInputs&, void* scalars);
using NextNumbersFn = void (*)(const StepInputs&, float* numbers);
// The loop for an entry's storages and layout; null if it is not there.
using FindLoop = UpdateFn (*)(const Entry&);

// Of one program of a rule, for one instruction set and one compute type.
struct ProgramCode {
  // What both sides must have been compiled with.
  int32_t version, entry_bytes, step_inputs_bytes, update_inputs_bytes;
  int32_t capability, wide;       // wide: computes in fp64
  int32_t states, numbers, sums;  // a bit for each state that it uses; how many the rule has
  PrepareFn prepare;
  NextNumbersFn next_numbers;  // null for a rule without numbers
  FindLoop find_linear;        // a loop for exactly the entry's storages
  FindLoop find_tiles;         // the loop over tiles, for what can have no other; null if it was left out
  MeasureFn measure;           // null for a rule without sums
};
inline constexpr int32_t kProgramVersion = 1;

}  // namespace fusedoptim
