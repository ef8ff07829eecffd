// The list of rules. A rule is its header and one name here.
#pragma once

#include "adagrad.h"
#include "adam.h"
#include "clip.h"
#include "norm_adaptive.h"
#include "rmsprop.h"
#include "sgd.h"

namespace fusedoptim {

template <class... R>
struct RuleList {
  static constexpr int size = sizeof...(R);
};
using Rules = RuleList<Adam, SGD, RMSprop, Adagrad, NormAdaptive, Clip>;

inline constexpr int kMaxHypers = 16, kMaxSlots = 3, kMaxVariants = 4, kMaxScalarBytes = 128;

// States with the parameter's shape: the rule's slots, then the moving average that any rule can have.
inline constexpr int kEma = kMaxSlots, kStates = kMaxSlots + 1;
// Added to a variant where that average is kept.
inline constexpr int kWithEma = 64;

}  // namespace fusedoptim
