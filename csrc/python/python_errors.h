// Python errors that stand for an answer.
#pragma once

#include "pybind.h"

namespace fusedoptim {

// Forgets a Python error that says "not like that". An interrupt or an exit is no answer and goes on.
inline void forget_python_error() {
  if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) throw pybind11::error_already_set();
  PyErr_Clear();
}

}  // namespace fusedoptim
