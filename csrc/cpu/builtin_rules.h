// The rules that are compiled with the package.
#pragma once

#include <cstring>
#include <type_traits>
#include <vector>

#include "../rules/all.h"
#include "../rules/rule_handle.h"

namespace fusedoptim {

template <class Rule, class T>
void prepare_into(const StepInputs& in, void* out) {
  using Scalars = typename Rule::template Scalars<T>;
  static_assert(sizeof(Scalars) <= kMaxScalarBytes && std::is_trivially_copyable_v<Scalars>);
  const Scalars c = Rule::template prepare<T>(in);
  std::memcpy(out, &c, sizeof(c));
}

template <size_t n>
constexpr int count_names(const char* const (&names)[n]) {
  return names[0] ? static_cast<int>(n) : 0;
}

// But for the kernels.
template <class Rule>
RuleHandle handle_of() {
  static_assert(Rule::kHypers <= kMaxHypers && Rule::kSlots <= kMaxSlots && Rule::variants <= kMaxVariants);
  static_assert(count_names(Rule::hyper_names) == Rule::kHypers - kFirstRuleHyper, "a name for each, in order");
  static_assert(count_names(Rule::state_names) == Rule::kSlots, "a name for each, in order");
  RuleHandle r{};
  r.name = Rule::name;
  r.hyper_names = Rule::hyper_names;
  r.state_names = Rule::state_names;
  r.hypers = Rule::kHypers;
  r.slots = Rule::kSlots;
  r.variants = Rule::variants;
  r.has_step = Rule::has_step;
  r.needs_norm = Rule::needs_norm;
  r.divides = Rule::divides;
  r.second_moment = Rule::second_moment;
  r.variant = Rule::variant;
  r.uses = Rule::uses;
  r.prepare_f32 = prepare_into<Rule, float>;
  r.prepare_f64 = prepare_into<Rule, double>;
  if constexpr (Rule::needs_norm)
    r.next_scalar_state = [](const StepInputs& in) { return Rule::next_scalar_state(in); };
  return r;
}

const std::vector<RuleHandle>& builtin_rules();
// Null if there is none of that name.
const RuleHandle* find_rule(const char* name);

}  // namespace fusedoptim
