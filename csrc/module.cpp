// The pybind11 module fusedoptim._C.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include "cpu/capability.h"
#include "python/plan.h"

namespace py = pybind11;
using namespace fusedoptim;

PYBIND11_MODULE(_C, m) {
  py::class_<Plan>(m, "Plan")
      .def(py::init<const std::string&, const std::vector<std::pair<std::string, int>>&, py::object>())
      .def("build", &Plan::build)
      .def("refresh", &Plan::refresh)
      .def("run", &Plan::run)
      .def_property_readonly("reason", &Plan::reason)
      .def_property_readonly("address", &Plan::address);
  m.def("cpu_capabilities", &cpu_capabilities);
  m.def("cpu_capability", [] { return std::string(cpu_kernels().name); });
  m.def("set_cpu_capability", &set_cpu_capability);
  m.def("rules", [] {
    std::vector<std::string> names;
    for (int i = 0; i < Rules::size; ++i) names.push_back(rule_info(i).name);
    return names;
  });
  m.attr("compiler") = __VERSION__;
  m.attr("torch_version") = TORCH_VERSION;
}
