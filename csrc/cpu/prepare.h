// A rule's functions of numbers as plain functions.
#pragma once

#include <cstring>
#include <type_traits>

#include "../rules/program_code.h"

namespace fusedoptim {

template <class Rule>
constexpr void check_sizes() {
  static_assert(Rule::kSlots <= kMaxSlots && Rule::kNumbers <= kMaxNumbers && Rule::sums <= kMaxSums);
}

template <class Rule, class T>
void prepare_into(const StepInputs& in, void* out) {
  using Scalars = typename Rule::template Scalars<T>;
  static_assert(sizeof(Scalars) <= kMaxScalarBytes && std::is_trivially_copyable_v<Scalars>);
  const Scalars c = Rule::template prepare<T>(in);
  std::memcpy(out, &c, sizeof(c));
}

template <class Rule>
constexpr NextNumbersFn next_numbers_of() {
  if constexpr (Rule::kNumbers > 0)
    return [](const StepInputs& in, float* out) { Rule::next_numbers(in, out); };
  else
    return nullptr;
}

}  // namespace fusedoptim
