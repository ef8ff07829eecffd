// The rules as a run-time table: what the host needs to know of each, by index in the list of rules.
#pragma once

#include <cstring>
#include <type_traits>

#include "all.h"

namespace fusedoptim {

struct RuleInfo {
  const char* name;
  int hypers, slots;
  bool has_step, needs_norm;
  // Which code and which states a row of hyper-parameters needs: the rule's variant, with kWithEma added.
  int (*variant)(const double* hyper);
  bool (*uses)(int variant, int state);
  // Writes the rule's Scalars<float> or Scalars<double>.
  void (*prepare_f32)(const StepInputs&, void* scalars);
  void (*prepare_f64)(const StepInputs&, void* scalars);
  float (*next_scalar_state)(const StepInputs&);  // null for a rule without one
};

template <class Rule, class T>
void prepare_into(const StepInputs& in, void* out) {
  using Scalars = typename Rule::template Scalars<T>;
  static_assert(sizeof(Scalars) <= kMaxScalarBytes && std::is_trivially_copyable_v<Scalars>);
  const Scalars c = Rule::template prepare<T>(in);
  std::memcpy(out, &c, sizeof(c));
}

template <class Rule>
RuleInfo info_of() {
  static_assert(Rule::kHypers <= kMaxHypers && Rule::kSlots <= kMaxSlots && Rule::variants <= kMaxVariants);
  RuleInfo r{Rule::name,
             Rule::kHypers,
             Rule::kSlots,
             Rule::has_step,
             Rule::needs_norm,
             [](const double* h) { return Rule::variant(h) + (h[kEmaDecay] >= 0 ? kWithEma : 0); },
             [](int variant, int state) {
               if (state == kEma) return variant >= kWithEma;
               return state < Rule::kSlots && Rule::uses(variant % kWithEma, state);
             },
             prepare_into<Rule, float>,
             prepare_into<Rule, double>,
             nullptr};
  if constexpr (Rule::needs_norm)
    r.next_scalar_state = [](const StepInputs& in) { return Rule::next_scalar_state(in); };
  return r;
}

template <class... R>
const RuleInfo* rule_table(RuleList<R...>) {
  static const RuleInfo table[] = {info_of<R>()...};
  return table;
}

inline const RuleInfo& rule_info(int rule) { return rule_table(Rules{})[rule]; }

// The rule's index, or -1.
inline int find_rule(const char* name) {
  for (int i = 0; i < Rules::size; ++i)
    if (std::strcmp(rule_info(i).name, name) == 0) return i;
  return -1;
}

}  // namespace fusedoptim
