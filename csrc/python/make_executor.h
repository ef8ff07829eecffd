// The executor of a device.
#pragma once

#include <memory>
#include <utility>

#include "../cpu/executor.h"
#include "../cuda/cuda_device.h"
#include "../gpu/executor.h"
#include "pybind.h"
#include "triton_device.h"

namespace fusedoptim {

// launcher: None for the CPU's kernels; else an object with the functions that python_memory.h calls, and unless it is
// `compiled`, for the kernels of _C_cuda, with those of triton_device.h.
inline std::unique_ptr<Executor> make_executor(const RuleHandle& rule, const py::object& launcher,
                                               const StepSettings& settings) {
  if (launcher.is_none()) return std::make_unique<CpuExecutor>(rule, settings);
  std::unique_ptr<gpu::Device> device;
  if (!launcher.attr("compiled").cast<bool>()) {
    device = std::make_unique<TritonDevice>(launcher);
  } else {
    const PythonMemory memory(launcher);
    device = std::make_unique<cuda::CudaDevice>(
        launcher.attr("index").cast<int>(), [memory](int64_t bytes) { return memory.allocate(bytes); },
        [memory](const gpu::Memory& m, void* stream) { memory.used_on(m, stream); });
  }
  return std::make_unique<gpu::GpuExecutor>(rule, std::move(device), settings);
}

}  // namespace fusedoptim
