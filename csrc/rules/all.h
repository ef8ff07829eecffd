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

}  // namespace fusedoptim
