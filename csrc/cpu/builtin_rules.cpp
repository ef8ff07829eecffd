#include "builtin_rules.h"

#include "kernels.h"
#include "prepare.h"

namespace fusedoptim {
namespace {

template <size_t n>
constexpr int count_names(const char* const (&names)[n]) {
  return names[0] ? static_cast<int>(n) : 0;
}

template <size_t n>
std::vector<std::string> list(const char* const (&names)[n]) {
  return {names, names + count_names(names)};
}

template <class Rule>
Program program_of(int variant, int rule) {
  Program p;
  for (int k = 0; k < Rule::kSlots; ++k) p.states |= Rule::uses(variant, k) << k;
  p.prepare_f32 = prepare_into<Rule, float>;
  p.prepare_f64 = prepare_into<Rule, double>;
  p.next_numbers = next_numbers_of<Rule>();
  p.loops[kPortable] = {kPortableUpdates.of[rule][variant]};
#if defined(__x86_64__) && !defined(FUSEDOPTIM_WITHOUT_AVX2)
  p.loops[kAvx2] = {kAvx2Updates.of[rule][variant]};
#endif
#if defined(__x86_64__) && !defined(FUSEDOPTIM_WITHOUT_AVX512)
  p.loops[kAvx512] = {kAvx512Updates.of[rule][variant]};
#endif
  return p;
}

template <class Rule>
RuleHandle handle_of(int rule) {
  check_sizes<Rule>();
  static_assert(Rule::kHypers <= kMaxHypers && Rule::sums <= 1);  // which is that of the gradient
  static_assert(kFirstRuleHyper + count_names(Rule::hyper_names) == Rule::kHypers, "a name for each, in order");
  static_assert(count_names(Rule::state_names) == Rule::kSlots, "a name for each, in order");
  static_assert(count_names(Rule::number_names) == Rule::kNumbers, "a name for each, in order");
  RuleHandle r;
  r.name = Rule::name;
  r.hyper_names = list(Rule::hyper_names);
  r.state_names = list(Rule::state_names);
  r.number_names = list(Rule::number_names);
  r.has_step = Rule::has_step;
  r.divides = Rule::divides;
  r.sums = Rule::sums;
  r.second_moment = Rule::second_moment;
  for (int k = 0; k < Rule::variants; ++k) r.programs.push_back(program_of<Rule>(k, rule));
  r.variant = Rule::variant;
  return r;
}

template <class... R>
std::vector<RuleHandle> make(RuleList<R...>) {
  int rule = 0;
  return {handle_of<R>(rule++)...};
}

}  // namespace

const std::vector<RuleHandle>& builtin_rules() {
  static const std::vector<RuleHandle> rules = make(Rules{});
  return rules;
}

const RuleHandle* find_rule(const std::string& name) {
  for (const RuleHandle& rule : builtin_rules())
    if (rule.name == name) return &rule;
  return nullptr;
}

}  // namespace fusedoptim
