// A launcher written in Python: fusedoptim/triton_kernels/launcher.py.
#pragma once

#include <utility>

#include "../cuda/launcher.h"
#include "../rules/registry.h"
#include "pybind.h"
#include "python_memory.h"

namespace fusedoptim {

namespace py = pybind11;

class PythonLauncher : public cuda::Launcher {
 public:
  explicit PythonLauncher(py::object functions) : functions_(functions), memory_(std::move(functions)) {}
  bool by_value() const override { return false; }

  cuda::Memory allocate(int64_t bytes) override { return memory_.allocate(bytes); }
  void used_on(const cuda::Memory& memory, void* stream) override { memory_.used_on(memory, stream); }

  void upload(const cuda::Memory& to, int64_t offset, const void* from, int64_t bytes, void*) override {
    functions_.attr("upload")(PythonMemory::tensor(to), offset, view(from, bytes));
  }

  void write(const cuda::Memory& to, const void* from, int64_t bytes, void*) override {
    functions_.attr("write")(PythonMemory::tensor(to), view(from, bytes));
  }

  bool capturing(void*) override { return functions_.attr("capturing")().cast<bool>(); }
  int64_t l2_bytes() override { return functions_.attr("l2_bytes")().cast<int64_t>(); }

  void prepare(int rule, const std::vector<uint64_t>& kinds) override {
    functions_.attr("prepare")(name_of(rule), as_tuple(kinds));
  }

  void step(const cuda::Launch& launch, const cuda::StepArgs&, const cuda::StepHeader* header) override {
    functions_.attr("step")(name_of(launch.rule), as_tuple(launch.kinds), reinterpret_cast<uintptr_t>(header),
                            launch.blocks);
  }

 private:
  static py::object name_of(int rule) {
    return rule == cuda::kNormOfAll ? py::none() : py::object(py::str(rule_info(rule).name));
  }
  static py::tuple as_tuple(const std::vector<uint64_t>& kinds) {
    py::tuple out(kinds.size());
    for (size_t i = 0; i < kinds.size(); ++i) out[i] = kinds[i];
    return out;
  }
  static py::memoryview view(const void* from, int64_t bytes) {
    return py::memoryview::from_memory(const_cast<void*>(from), bytes);  // torch warns of read-only ones
  }

  const py::object functions_;
  const PythonMemory memory_;
};

}  // namespace fusedoptim
