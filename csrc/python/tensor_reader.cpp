#include "tensor_reader.h"

namespace fusedoptim {

namespace py = pybind11;

const TensorReader& TensorReader::get() {
  static const TensorReader reader;
  return reader;
}

// The references taken here live as long as the process, as the types they point at do.
TensorReader::TensorReader() {
  const py::module_ torch = py::module_::import("torch");
  py::object tensor = torch.attr("Tensor"), parameter = torch.attr("nn").attr("Parameter");
  py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  auto* api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  if (api->major != dlpack::kMajorVersion || !api->tensor_from_python)
    throw std::runtime_error(
        "this torch offers another version of the DLPack exchange API than fusedoptim was built for");
  from_tensor_ = api->tensor_from_python;
  py::object grad = torch.attr("_C").attr("TensorBase").attr("grad");
  if (Py_TYPE(grad.ptr()) != &PyGetSetDescr_Type)
    throw std::runtime_error("torch.Tensor.grad is no longer a getset descriptor");
  grad_getter_ = reinterpret_cast<PyGetSetDescrObject*>(grad.ptr())->d_getset;
  tensor_type_ = reinterpret_cast<PyTypeObject*>(tensor.release().ptr());
  parameter_type_ = reinterpret_cast<PyTypeObject*>(parameter.release().ptr());
  grad_name_ = PyUnicode_InternFromString("grad");
  is_neg_name_ = PyUnicode_InternFromString("is_neg");
  capsule.release();
  grad.release();
}

}  // namespace fusedoptim
