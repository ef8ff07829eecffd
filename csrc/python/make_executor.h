// The executor of a device.
#pragma once

#include <memory>
#include <utility>

#include "../cpu/executor.h"
#include "../cuda/executor.h"
#include "../cuda/library_launcher.h"
#include "pybind.h"
#include "python_launcher.h"

namespace fusedoptim {

// launcher: None for the CPU's kernels; else an object with the functions that python_memory.h calls, and unless it is
// `compiled`, for the kernels of _C_cuda, with those of python_launcher.h.
inline std::unique_ptr<Executor> make_executor(int rule, const py::object& launcher, const Settings& settings) {
  if (launcher.is_none()) return std::make_unique<CpuExecutor>(rule, settings);
  std::unique_ptr<cuda::Launcher> made;
  if (!launcher.attr("compiled").cast<bool>()) {
    made = std::make_unique<PythonLauncher>(launcher);
  } else {
    const PythonMemory memory(launcher);
    made = std::make_unique<cuda::LibraryLauncher>(
        launcher.attr("index").cast<int>(), [memory](int64_t bytes) { return memory.allocate(bytes); },
        [memory](const cuda::Memory& m, void* stream) { memory.used_on(m, stream); });
  }
  return std::make_unique<cuda::GpuExecutor>(rule, std::move(made), settings);
}

}  // namespace fusedoptim
