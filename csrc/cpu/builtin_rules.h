// The rules that are compiled with the package.
#pragma once

#include <string>
#include <vector>

#include "../rules/rule_handle.h"

namespace fusedoptim {

const std::vector<RuleHandle>& builtin_rules();
// Null if there is none of that name.
const RuleHandle* find_rule(const std::string& name);

}  // namespace fusedoptim
