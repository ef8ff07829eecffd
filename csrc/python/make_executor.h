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

// launcher: None for the CPU's kernels, the index of a device for those of _C_cuda, else an object with the functions
// that python_launcher.h calls.
inline std::unique_ptr<Executor> make_executor(int rule, const py::object& launcher, const Settings& settings) {
  if (launcher.is_none()) return std::make_unique<CpuExecutor>(rule, settings);
  std::unique_ptr<cuda::Launcher> made;
  if (py::isinstance<py::int_>(launcher))
    made = std::make_unique<cuda::LibraryLauncher>(launcher.cast<int>());
  else
    made = std::make_unique<PythonLauncher>(launcher);
  return std::make_unique<cuda::GpuExecutor>(rule, std::move(made), settings);
}

}  // namespace fusedoptim
