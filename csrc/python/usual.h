// A quick look at parameters before Python looks at them closely: it has nothing to say about almost all of them, and
// takes fifteen times as long.
#pragma once

#include <string>
#include <vector>

#include "pybind.h"

namespace fusedoptim {

struct UsualNames {
  std::vector<pybind11::object> slots, optional;  // states with the parameter's shape: of all groups, of some
  pybind11::object step, scalar;                  // each may be None
  pybind11::object ema;
};

// A byte per parameter. 1: it is a plain dense tensor, and so are its gradient and its states, with shapes, devices and
// dtypes that a step takes as they are; all states may be missing. 0: Python has to look.
pybind11::bytes usual(const pybind11::list& params, const pybind11::dict& state, const UsualNames& names,
                      bool writes_grads);

// Whether no two of these tensors share memory, and none has gaps. False in doubt.
bool apart(const pybind11::list& tensors);

}  // namespace fusedoptim
