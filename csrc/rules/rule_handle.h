// What a plan, an executor and a device need to know of a rule: a value, made of what is compiled with the package or
// of libraries that were compiled later.
#pragma once

#include <string>
#include <vector>

#include "../core/guard.h"
#include "../core/operand.h"
#include "../core/row.h"
#include "program_code.h"

namespace fusedoptim {

// What is compiled of a rule for one combination of a group's values.
struct Program {
  Guard guard;                    // of rows that it is for, unless RuleHandle::variant says so
  uint32_t states = 0;            // a bit for each that it uses
  uint32_t summed = 1u << kGrad;  // a bit for each operand that its sums depend on
  PrepareFn prepare_f32 = nullptr, prepare_f64 = nullptr;
  NextNumbersFn next_numbers = nullptr;  // null for a rule without numbers
  // In the order in which they are asked.
  std::vector<FindLoop> loops[kCpuCapabilities];
  // By instruction set, and whether it computes in fp64. Null for a rule whose sum is that of the gradient.
  MeasureFn measure[kCpuCapabilities][2] = {};
};

struct RuleHandle {
  std::string name;
  // Names, in the order of their columns from kFirstRuleHyper on, of states, and of states that are numbers.
  std::vector<std::string> hyper_names, state_names, number_names;
  bool has_step = false, divides = false;
  int sums = 0;
  int second_moment = -1;  // the state that is one
  std::vector<Program> programs;
  // Which of them a row of hyper-parameters needs. Null: the first whose guard holds.
  int (*variant)(const double* hyper) = nullptr;

  int hypers() const { return kFirstRuleHyper + static_cast<int>(hyper_names.size()); }
  int slots() const { return static_cast<int>(state_names.size()); }
  int numbers() const { return static_cast<int>(number_names.size()); }

  // constants: see Guard. False if none is there for these values.
  bool find_variant(const double* hyper, double constants, Variant& found) const {
    int program = variant ? variant(hyper) : 0;
    const int count = static_cast<int>(programs.size());
    while (!variant && program < count && !programs[program].guard.holds(hyper, constants)) ++program;
    if (program >= count) return false;
    found = {static_cast<uint8_t>(program), hyper[kEmaDecay] >= 0};
    return true;
  }
  bool uses_state(Variant v, int state) const {
    return state == kAverage ? v.average : (programs[v.program].states >> state & 1) != 0;
  }
};

}  // namespace fusedoptim
