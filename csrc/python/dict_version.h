// CPython up to 3.12 numbers every change of any dict (PEP 509), so that a dict with the number that it had holds what
// it held: one comparison instead of one per item, and one cache line instead of four or more. Setting an item to the
// object that it is already changes nothing. 3.13 has the number, too, but writes an object's attributes into its
// __dict__ without a new one; later versions have none (PEP 699). There every item is compared, which
// costs a step of 465 groups half as much again (python -m benchmarks.host).
#pragma once

#include "pybind.h"

namespace fusedoptim {

// 0 if there is none.
inline uint64_t dict_version(PyObject* dict) {
#if PY_VERSION_HEX < 0x030D0000 && !defined(PYPY_VERSION)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#else
  (void)dict;
  return 0;
#endif
}

}  // namespace fusedoptim
