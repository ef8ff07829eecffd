// A rule of whoever uses the package, from libraries that were compiled later (cpu/own_program.h).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../rules/rule_handle.h"
#include "pybind.h"

namespace fusedoptim {

// A program: its guard (core/guard.h); a bit for each state that it uses, and for each operand that it sums; the
// addresses of what its libraries' fusedoptim_program() return, which have to stay loaded.
using ProgramArgs = std::tuple<std::vector<std::pair<std::string, double>>, uint32_t, uint32_t, std::vector<int64_t>>;

// Raises ValueError for what no rule can have.
inline void check_own(const RuleHandle& rule) {
  const auto most = [&](int64_t count, int64_t limit, const char* what) {
    if (count > limit)
      throw pybind11::value_error("rule '" + rule.name + "' has " + std::to_string(count) + " " + what +
                                  ", and a rule may have " + std::to_string(limit));
  };
  most(rule.hypers() - kFirstRuleHyper, kMaxHypers - kFirstRuleHyper, "hyper-parameters");
  most(rule.slots(), kMaxSlots, "states of the parameter's shape");
  most(rule.numbers(), kMaxNumbers, "states that are a number");
  most(rule.sums, kMaxSums, "sums over whole tensors");
  most(static_cast<int64_t>(rule.programs.size()), kMaxPrograms, "programs");
  most(rule.second_moment + 1, rule.slots(), "states up to the second moment");
  for (const Program& program : rule.programs) {
    if (program.states >> rule.slots() || program.summed >> (kFirstState + rule.slots()))
      throw pybind11::value_error("a program of rule '" + rule.name + "' uses states that it does not have");
    if (!program.guard.fits(rule.hypers()))
      throw pybind11::value_error("a guard of rule '" + rule.name + "' looks at columns that its rows do not have");
  }
}

// Raises RuntimeError for code that this library cannot call.
inline void add_code(Program& program, const RuleHandle& rule, const ProgramCode* code) {
  const bool known = code && code->version == kProgramVersion && code->entry_bytes == sizeof(Entry) &&
                     code->step_inputs_bytes == sizeof(StepInputs) && code->update_inputs_bytes == sizeof(UpdateInputs);
  if (!known || code->capability < 0 || code->capability >= kCpuCapabilities)
    throw std::runtime_error("a program of rule '" + rule.name +
                             "' was compiled with another version of fusedoptim: compile it again");
  if (static_cast<uint32_t>(code->states) != program.states || code->numbers != rule.numbers() ||
      code->sums != rule.sums)
    throw std::runtime_error("a program of rule '" + rule.name + "' was compiled for other states, numbers or sums");
  if ((rule.sums > 0) != (code->measure != nullptr) || (rule.numbers() > 0) != (code->next_numbers != nullptr))
    throw std::runtime_error("a program of rule '" + rule.name + "' lacks what makes its numbers or sums");
  (code->wide ? program.prepare_f64 : program.prepare_f32) = code->prepare;
  program.next_numbers = code->next_numbers;
  auto& loops = program.loops[code->capability];
  loops.insert(loops.begin(), code->find_linear);  // before all loops over tiles
  if (code->find_tiles) loops.push_back(code->find_tiles);
  program.measure[code->capability][code->wide ? 1 : 0] = code->measure;
}

inline RuleHandle own_rule(std::string name, std::vector<std::string> hyper_names, std::vector<std::string> state_names,
                           std::vector<std::string> number_names, bool has_step, int sums, bool divides,
                           int second_moment, const std::vector<ProgramArgs>& programs) {
  RuleHandle rule;
  rule.name = std::move(name);
  rule.hyper_names = std::move(hyper_names);
  rule.state_names = std::move(state_names);
  rule.number_names = std::move(number_names);
  rule.has_step = has_step;
  rule.divides = divides;
  rule.sums = sums;
  rule.second_moment = second_moment;
  for (const auto& [guard, states, summed, codes] : programs) {
    Program program;
    program.guard = Guard(guard);
    program.states = states;
    program.summed = summed;
    for (const int64_t address : codes) add_code(program, rule, reinterpret_cast<const ProgramCode*>(address));
    rule.programs.push_back(std::move(program));
  }
  check_own(rule);
  return rule;
}

}  // namespace fusedoptim
