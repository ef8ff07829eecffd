// A device whose kernels are Triton's: fusedoptim/triton_kernels/device.py.
#pragma once

#include <utility>

#include "../gpu/device.h"
#include "pybind.h"
#include "python_memory.h"

namespace fusedoptim {

namespace py = pybind11;

class TritonDevice : public gpu::Device {
 public:
  explicit TritonDevice(py::object functions) : functions_(functions), memory_(std::move(functions)) {}
  bool by_value() const override { return false; }

  gpu::Memory allocate(int64_t bytes) override { return memory_.allocate(bytes); }
  void used_on(const gpu::Memory& memory, void* stream) override { memory_.used_on(memory, stream); }

  void upload(const gpu::Memory& to, int64_t offset, const void* from, int64_t bytes, void*) override {
    functions_.attr("upload")(PythonMemory::tensor(to), offset, view(from, bytes));
  }

  void write(const gpu::Memory& to, const void* from, int64_t bytes, void*) override {
    functions_.attr("write")(PythonMemory::tensor(to), view(from, bytes));
  }

  bool capturing(void*) override { return functions_.attr("capturing")().cast<bool>(); }
  int64_t l2_bytes() override { return functions_.attr("l2_bytes")().cast<int64_t>(); }
  int64_t multiprocessors() override { return functions_.attr("multiprocessors")().cast<int64_t>(); }

  // The program is what prepare() returns: a function of the header's address and the number of blocks.
  gpu::Program prepare(gpu::Purpose purpose, const RuleHandle& rule, bool,
                       const std::vector<gpu::Kind>& kinds) override {
    const char* name = purpose == gpu::Purpose::measure  ? "measure"
                       : purpose == gpu::Purpose::reduce ? "reduce"
                                                         : "update";
    py::object made = functions_.attr("prepare")(name, py::cast(rule), as_tuple(kinds));
    return {made.release().ptr(), [](const void* program) { Py_DECREF(object(program)); }};
  }

  void launch(const gpu::Program& program, uint32_t blocks, const gpu::StepArgs&, const gpu::StepHeader* header, bool,
              void*) override {
    py::handle(object(program.get()))(reinterpret_cast<uintptr_t>(header), blocks);
  }

 private:
  static PyObject* object(const void* program) { return static_cast<PyObject*>(const_cast<void*>(program)); }

  // Of each kind the storages of all operands, the dtype of the step, the variant, and which states it uses.
  static py::tuple as_tuple(const std::vector<gpu::Kind>& kinds) {
    py::tuple out(kinds.size());
    for (size_t i = 0; i < kinds.size(); ++i) {
      const gpu::Kind& kind = kinds[i];
      py::tuple storages(kOperands);
      for (int k = 0; k < kOperands; ++k) storages[k] = static_cast<int>(kind.storage[k]);
      out[i] = py::make_tuple(storages, static_cast<int>(kind.step_dtype), kind.variant, kind.uses);
    }
    return out;
  }
  static py::memoryview view(const void* from, int64_t bytes) {
    return py::memoryview::from_memory(const_cast<void*>(from), bytes);  // torch warns of read-only ones
  }

  const py::object functions_;
  const PythonMemory memory_;
};

}  // namespace fusedoptim
