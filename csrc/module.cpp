// The pybind11 module fusedoptim._C.
#include <torch/headeronly/version.h>

#include <optional>

#include "core/storage_names.h"
#include "cpu/builtin_rules.h"
#include "cpu/capability.h"
#include "cuda/cuda_device.h"
#include "fusedoptim_sources.h"  // made by setup.py
#include "gpu/table_layout.h"
#include "gpu/tuning.h"
#include "python/clipper.h"
#include "python/look.h"
#include "python/own_rule.h"
#include "python/plan.h"
#include "python/pybind.h"
#include "python/version_probe.h"

namespace py = pybind11;
using namespace fusedoptim;

namespace {

// A plan holds the groups and the state of an optimizer that holds the plan: the garbage collector has to see that.
void collect_plans(PyHeapTypeObject* heap_type) {
  PyTypeObject& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    return py::detail::is_holder_constructed(self) ? py::cast<Plan&>(py::handle(self)).traverse(visit, arg) : 0;
  };
  type.tp_clear = [](PyObject* self) {
    if (py::detail::is_holder_constructed(self)) py::cast<Plan&>(py::handle(self)).clear();
    return 0;
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::class_<Plan>(m, "Plan", py::custom_type_setup(collect_plans))
      .def(py::init<const RuleHandle&, const std::vector<Plan::HyperArgs>&, const std::vector<std::string>&,
                    const std::vector<std::string>&, py::object, std::pair<int, int>, py::object,
                    std::tuple<int64_t, bool, bool>>())
      .def("build", &Plan::build)
      .def("refresh", &Plan::refresh)
      .def("release", &Plan::release)
      .def("run", &Plan::run, py::arg("stream") = 0, py::arg("grad_scale") = 0, py::arg("found_inf") = 0)
      .def("measure", &Plan::measure, py::arg("of_rule"), py::arg("stream") = 0, py::arg("grad_scale") = 0)
      .def("reduce", &Plan::reduce, py::arg("stream") = 0)
      .def("update", &Plan::update, py::arg("stream") = 0, py::arg("grad_scale") = 0, py::arg("found_inf") = 0)
      .def("retire", &Plan::retire)
      .def_property_readonly("reason", &Plan::reason)
      .def_property_readonly("lacking", &Plan::lacking)
      .def_property_readonly("number", &Plan::number)
      .def_property_readonly("captured", &Plan::captured);
  py::class_<Clipper>(m, "Clipper")
      .def(py::init<const py::object&, int64_t, py::object, std::vector<int64_t>, int64_t, bool>())
      .def("run", &Clipper::run)
      .def("measure", &Clipper::measure)
      .def("reduce", &Clipper::reduce)
      .def("update", &Clipper::update)
      .def_property_readonly("number", &Clipper::number);
  py::class_<VersionProbe>(m, "VersionProbe")
      .def(py::init<>())
      .def("find", &VersionProbe::find)
      .def("raise_", &VersionProbe::raise)
      .def("adopt", &VersionProbe::adopt)
      .def_property_readonly("number", &VersionProbe::number);
  py::class_<Look>(m, "Look")
      .def(py::init([](py::dict state, std::vector<py::object> slots, std::vector<py::object> optional,
                       std::vector<py::object> numbers, std::vector<py::object> optional_numbers, py::object step,
                       py::object ema, bool writes_grads,
                       std::optional<std::tuple<py::object, py::object, py::object>> shards) {
        Look::Names names{std::move(slots), std::move(optional), std::move(numbers), std::move(optional_numbers),
                          std::move(step),  std::move(ema)};
        std::optional<Look::Shards> of_shards;
        if (shards) of_shards = {std::get<0>(*shards), std::get<1>(*shards), std::get<2>(*shards)};
        return Look(std::move(state), std::move(names), writes_grads, std::move(of_shards));
      }))
      .def("at", py::overload_cast<const py::list&>(&Look::at))
      .def("all_apart", &Look::all_apart);
  m.def("compiled_cpu_capabilities", &compiled_cpu_capabilities);
  m.def("cpu_capabilities", &cpu_capabilities);
  m.def("cpu_capability", [] { return std::string(cpu_kernels().name); });
  m.def("set_cpu_capability", &set_cpu_capability);
  // Hands over the functions of _C_cuda, by the address that its fusedoptim_cuda_api() returns.
  m.def("set_cuda_api", [](int64_t address) {
    const auto* found = reinterpret_cast<const cuda::Api*>(address);
    if (found && (found->version != cuda::kApiVersion || found->argument_bytes != sizeof(gpu::StepArgs) ||
                  found->entry_bytes != sizeof(gpu::TableEntry)))
      throw std::runtime_error("_C_cuda was built from another version of fusedoptim");
    cuda::api = found;
  });
  // Why the CUDA kernels cannot run on a device; None if they can.
  m.def("cuda_problem", [](int device) -> std::optional<std::string> {
    const char* problem = cuda::api ? cuda::api->check(device) : "the library is not loaded";
    return problem ? std::optional<std::string>(problem) : std::nullopt;
  });
  m.def("cuda_on_host", [] { return cuda::api && cuda::api->on_host; });
  // Sets a choice of gpu/tuning.h for what is made or stepped from now on. Returns the value before.
  m.def("tune", [](const std::string& name, int64_t value) {
    int64_t* choice = gpu::tuning.find(name.c_str());
    if (!choice) throw py::value_error("there is no choice called " + name);
    std::swap(*choice, value);
    return value;
  });
  // Where the fields of the tables on the device lie, in bytes, and their constants.
  m.def("table_layout", &gpu::table_layout);
  // What an operand can be stored as, by name.
  m.def("storages", [] {
    std::map<std::string, int> numbers;
    for (const auto& [name, s] : storage_names()) numbers[name] = static_cast<int>(s);
    return numbers;
  });
  // What is compiled of a rule. Python holds it, and hands it to plans.
  py::class_<RuleHandle>(m, "RuleHandle")
      .def(py::init(&own_rule), py::arg("name"), py::arg("hyper_names"), py::arg("state_names"),
           py::arg("number_names"), py::arg("has_step"), py::arg("sums"), py::arg("divides"), py::arg("second_moment"),
           py::arg("programs"))
      .def_readonly("name", &RuleHandle::name)
      .def_readonly("divides", &RuleHandle::divides)
      .def_readonly("sums", &RuleHandle::sums)
      .def_property_readonly("numbers", &RuleHandle::numbers)
      .def_property_readonly("halves",
                             [](const RuleHandle& rule) {
                               std::vector<int> halves;
                               for (int k = 0; k < rule.slots(); ++k)
                                 halves.push_back(half_of_slot(k, rule.second_moment));
                               return halves;
                             })
      // Of each program a bit for each operand that its sums depend on.
      .def_property_readonly("summed",
                             [](const RuleHandle& rule) {
                               std::vector<uint32_t> summed;
                               for (const Program& p : rule.programs) summed.push_back(p.summed);
                               return summed;
                             })
      .def_property_readonly("states_of_variants",
                             [](const RuleHandle& rule) {
                               std::vector<int> states;
                               for (const Program& p : rule.programs) states.push_back(__builtin_popcount(p.states));
                               return states;
                             })
      // Which of its programs a row of hyper-parameters needs (see fusedoptim/_rule.py for its order, with lr's dtype
      // after lr); None if none is there.
      .def(
          "program_of",
          [](const RuleHandle& rule, const std::vector<double>& row, double constants) -> std::optional<int> {
            if (static_cast<int>(row.size()) != rule.hypers())
              throw py::value_error("a row of rule '" + rule.name + "' has " + std::to_string(rule.hypers()) +
                                    " numbers, but these are " + std::to_string(row.size()));
            Variant found;
            if (!rule.find_variant(row.data(), constants, found)) return std::nullopt;
            return found.program;
          },
          py::arg("row"), py::arg("constants") = 0.0);
  m.def("find_rule", &find_rule, py::return_value_policy::reference);
  m.def("rules", [] {
    std::vector<std::string> names;
    for (const RuleHandle& rule : builtin_rules()) names.push_back(rule.name);
    return names;
  });
  m.attr("compiler") = __VERSION__;
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("sources") = FUSEDOPTIM_SOURCES;
}
