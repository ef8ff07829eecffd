#include "builtin_rules.h"

#include "kernels.h"

namespace fusedoptim {
namespace {

template <class... R>
std::vector<RuleHandle> make(RuleList<R...>) {
  std::vector<RuleHandle> rules{handle_of<R>()...};
  for (size_t i = 0; i < rules.size(); ++i) {
    rules[i].cpu[kPortable] = kPortableUpdates.of[i];
#if defined(__x86_64__)
    rules[i].cpu[kAvx2] = kAvx2Updates.of[i];
    rules[i].cpu[kAvx512] = kAvx512Updates.of[i];
#endif
  }
  return rules;
}

}  // namespace

const std::vector<RuleHandle>& builtin_rules() {
  static const std::vector<RuleHandle> rules = make(Rules{});
  return rules;
}

const RuleHandle* find_rule(const char* name) {
  for (const RuleHandle& rule : builtin_rules())
    if (std::strcmp(rule.name, name) == 0) return &rule;
  return nullptr;
}

}  // namespace fusedoptim
