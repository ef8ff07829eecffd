// Hints for the walk over many small tensors, which waits for cache misses and nothing else: without them it takes two
// to four times as long (2000 tensors, with another optimizer's step in between).
//
// All are inlined by force: GCC takes a function that only prefetches for one without effect, and drops its calls.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "../core/dtype.h"
#include "pybind.h"

namespace fusedoptim {

inline constexpr int kTensorBytes = 192;

// Where the tensor object behind a handle lies, or null. What the handle points at begins with that address; it is
// believed only where the sizes, whose address the stable ABI gives, lie inside it.
inline const char* tensor_memory(AtenTensorHandle handle) {
  int64_t* sizes = nullptr;
  if (aoti_torch_get_sizes(handle, &sizes) != 0 || !sizes) return nullptr;
  const char* memory = *reinterpret_cast<const char* const*>(handle);
  const char* inside = reinterpret_cast<const char*>(sizes);
  return inside > memory && inside < memory + kTensorBytes ? memory : nullptr;
}

FUSEDOPTIM_INLINE void prefetch_tensor(const char* memory) {
  if (!memory) return;
  for (int line = 0; line < kTensorBytes; line += 64) __builtin_prefetch(memory + line);
}

// The words of a living tensor object that today point at its storage and its autograd metadata. They are prefetched
// and never read: should they mean something else one day, the hint is wasted.
FUSEDOPTIM_INLINE void prefetch_word(const char* memory, int word) {
  if (!memory) return;
  const char* target = reinterpret_cast<const char* const*>(memory)[word];
  __builtin_prefetch(target);
  __builtin_prefetch(target + 64);
}
FUSEDOPTIM_INLINE void prefetch_storage(const char* memory) { prefetch_word(memory, 2); }
FUSEDOPTIM_INLINE void prefetch_autograd(const char* memory) { prefetch_word(memory, 3); }

FUSEDOPTIM_INLINE void prefetch_dict(PyObject* dict) { __builtin_prefetch(dict); }
FUSEDOPTIM_INLINE void prefetch_dict_keys(PyObject* dict) {
  const char* keys = reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(dict)->ma_keys);
  __builtin_prefetch(keys);
  __builtin_prefetch(keys + 64);
}

}  // namespace fusedoptim
