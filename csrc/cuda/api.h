// The border between the two libraries: functions that _C_cuda offers to _C. _C_cuda knows nothing of torch or Python,
// so that it loads or fails apart from everything else. Functions return null, or a text that says what went wrong.
#pragma once

#include <cstddef>
#include <cstdint>

#include "table.h"

namespace fusedoptim::cuda {

inline constexpr int32_t kApiVersion = 4;

struct Api {
  int32_t version;
  // The kernels were compiled for the host, for tests: device memory is memory.
  int32_t on_host;
  // What both libraries must have been built with.
  int32_t argument_bytes, entry_bytes, rules;
  // Whether this library's kernels can run on a device.
  const char* (*check)(int32_t device);
  // One launch, of a rule's kernel or of the one for the norm of all gradients (rule kNormOfAll). mixed: the table may
  // hold operands of 64 bits.
  const char* (*step)(int32_t device, int32_t rule, int32_t mixed, const StepArgs& args, uint32_t blocks, void* stream);
  // Copies host memory to the device in the stream's order, and has read it when it returns. Staged in pinned memory:
  // waits for nothing unless the device is several copies behind.
  const char* (*upload)(int32_t device, void* to, const void* from, size_t bytes, void* stream);
  // The same through kernel arguments, whose values a captured graph keeps. bytes is a multiple of 8.
  const char* (*write)(int32_t device, void* to, const void* from, size_t bytes, void* stream);
  int32_t (*capturing)(void* stream);
  int64_t (*l2_bytes)(int32_t device);
};

}  // namespace fusedoptim::cuda
