// The border between the two libraries: functions that _C_cuda offers to _C. _C_cuda knows nothing of torch or Python,
// so that it loads or fails apart from everything else. Functions return null, or a text that says what went wrong.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../gpu/table.h"

namespace fusedoptim::cuda {

inline constexpr int32_t kApiVersion = 7;

// In place of a rule's name: the kernels that measure and reduce.
inline constexpr const char *kMeasure = "(measure)", *kReduce = "(reduce)";

struct Api {
  int32_t version;
  // The kernels were compiled for the host, for tests: device memory is memory.
  int32_t on_host;
  // What both libraries must have been built with.
  int32_t argument_bytes, entry_bytes;
  // Whether this library's kernels can run on a device.
  const char* (*check)(int32_t device);
  // A rule's kernel, as launch() takes it; null if there is none. wide: there may be operands of 64 bits. stored: there
  // may be storages that are no dtypes.
  const void* (*find)(const char* rule, int32_t wide, int32_t stored);
  // overlaps: it may begin while the launch before still runs, for which it waits itself.
  const char* (*launch)(int32_t device, const void* kernel, const gpu::StepArgs& args, uint32_t blocks,
                        int32_t overlaps, void* stream);
  // Copies host memory to the device in the stream's order, and has read it when it returns. Staged in pinned memory:
  // waits for nothing unless the device is several copies behind.
  const char* (*upload)(int32_t device, void* to, const void* from, size_t bytes, void* stream);
  // The same through kernel arguments, whose values a captured graph keeps. bytes is a multiple of 8.
  const char* (*write)(int32_t device, void* to, const void* from, size_t bytes, void* stream);
  int32_t (*capturing)(void* stream);
  int64_t (*l2_bytes)(int32_t device);
  int64_t (*multiprocessors)(int32_t device);
};

}  // namespace fusedoptim::cuda
