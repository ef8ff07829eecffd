// Memory on a device from torch's allocator: fusedoptim/_device_memory.py. The interpreter must be held.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>

#include "../gpu/device.h"
#include "pybind.h"

namespace fusedoptim {

namespace py = pybind11;

class PythonMemory {
 public:
  explicit PythonMemory(py::object functions) : functions_(std::move(functions)) {}

  gpu::Memory allocate(int64_t bytes) const {
    auto tensor = std::make_shared<py::object>(functions_.attr("allocate")(std::max<int64_t>(bytes, 16)));
    gpu::Memory memory;
    memory.address = reinterpret_cast<char*>(tensor->attr("data_ptr")().cast<uintptr_t>());
    memory.owner = std::move(tensor);
    return memory;
  }
  void used_on(const gpu::Memory& memory, void* stream) const {
    functions_.attr("used_on")(tensor(memory), reinterpret_cast<uintptr_t>(stream));
  }
  // A tensor with rows of an fp64 number per entry, and perhaps more.
  static void keep_sums(StepTable& table, py::object tensor) {
    table.sums = reinterpret_cast<double*>(tensor.attr("data_ptr")().cast<uintptr_t>());
    table.sums_stride = tensor.attr("shape")[py::int_(-1)].cast<int64_t>();
    table.sums_owner = std::make_shared<py::object>(std::move(tensor));
  }
  static const py::object& tensor(const gpu::Memory& memory) { return *static_cast<py::object*>(memory.owner.get()); }

 private:
  const py::object functions_;
};

}  // namespace fusedoptim
