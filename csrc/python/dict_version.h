// CPython up to 3.13 numbers every change of any dict (PEP 509), so that a dict with the number that it had holds what
// it held: one comparison instead of one per item, and one cache line instead of four or more. Setting an item to the
// object that it is already changes nothing. Later ones have no such number (PEP 699); there every item is compared.
#pragma once

#include "pybind.h"

namespace fusedoptim {

// 0 if there is none.
inline uint64_t dict_version(PyObject* dict) {
#if PY_VERSION_HEX < 0x030E0000 && !defined(PYPY_VERSION)
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
