#include "look.h"

namespace fusedoptim {

namespace py = pybind11;

namespace {

constexpr int kMaxDims = 64;

int64_t numel(const TensorView& v) {
  int64_t n = 1;
  for (int d = 0; d < v.ndim; ++d) n *= v.sizes[d];
  return n;
}

bool is_dense(const TensorView& v) { return dense(v.ndim, v.sizes, v.strides) || numel(v) == 0; }

}  // namespace

py::list Look::at(const py::list& params) {
  py::list found(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    PyObject* values = at(py::handle(params[i]).ptr());
    all_ = all_ && values != Py_False;
    found[i] = py::handle(values);
  }
  return found;
}

bool Look::all_apart() {
  ranges_.sort();
  return all_ && ranges_.apart_from(MemoryRanges());
}

PyObject* Look::at(PyObject* param) {
  if (!reader_.is_plain(param) || !dense_tensor(param, param_) || param_.ndim > kMaxDims) return Py_False;
  writes(param_);
  PyObject* values = PyDict_GetItem(state_.ptr(), param);
  if (!grad(param) || (values && !states(values))) return Py_False;
  return values ? values : Py_None;
}

bool Look::grad(PyObject* param) {
  const py::object g = py::reinterpret_steal<py::object>(reader_.grad(param));
  if (!g) {
    forget_python_error();
    return false;
  }
  if (g.is_none()) return true;
  TensorView v;
  if (!reader_.is_plain(g.ptr()) || !reader_.view(g.ptr(), v) || negated(g.ptr(), v)) return false;
  if (!same_shape(v) || (!v.data && numel(v) > 0)) return false;
  if (!writes_grads_) return true;
  writes(v);
  return is_dense(v);
}

bool Look::states(PyObject* values) {
  if (!PyDict_CheckExact(values)) return false;
  const DType compute = param_.dtype == DType::f64 ? DType::f64 : DType::f32;
  const auto shaped = [&](const TensorView& v) { return same_shape(v); };
  const auto average = [&](const TensorView& v) { return same_shape(v) && v.dtype == compute; };
  const auto step = [&](const TensorView& v) {
    const bool placed = v.device == param_.device || v.device.type == dlpack::kCpu;
    return placed && numel(v) == 1 && (v.dtype == DType::f32 || v.dtype == DType::f64);
  };
  const auto number = [&](const TensorView& v) {
    return v.device == param_.device && numel(v) == 1 && v.dtype == DType::f32;
  };
  int there = 0, missing = 0, any = 0;
  for (const py::object& name : names_.slots)
    if (!state(values, name, there, missing, shaped)) return false;
  for (const py::object& name : names_.optional)
    if (!state(values, name, any, any, shaped)) return false;
  if (!state(values, names_.ema, any, any, average)) return false;
  if (!names_.step.is_none() && !state(values, names_.step, there, missing, step)) return false;
  for (const py::object& name : names_.numbers)
    if (!state(values, name, there, missing, number)) return false;
  for (const py::object& name : names_.optional_numbers)
    if (!state(values, name, any, any, number)) return false;
  return there == 0 || missing == 0;
}

template <class Fits>
bool Look::state(PyObject* values, const py::object& name, int& there, int& missing, const Fits& fits) {
  PyObject* value = PyDict_GetItem(values, name.ptr());
  if (!value || value == Py_None) {
    ++missing;
    return true;
  }
  ++there;
  TensorView v;
  if (!reader_.is_plain(value) || !dense_tensor(value, v) || !fits(v)) return false;
  writes(v);
  return true;
}

bool Look::dense_tensor(PyObject* t, TensorView& v) const {
  return reader_.view(t, v) && (v.data || numel(v) == 0) && is_dense(v) && !negated(t, v);
}

// What is negated lazily is every second element of a complex tensor, so that only unusual strides and single elements
// are worth the question.
bool Look::negated(PyObject* t, const TensorView& v) const {
  return (numel(v) == 1 || !row_major(v.ndim, v.sizes, v.strides)) && reader_.is_negated(t);
}

bool Look::same_shape(const TensorView& v) const {
  return v.device == param_.device && v.ndim == param_.ndim && std::equal(v.sizes, v.sizes + v.ndim, param_.sizes);
}

}  // namespace fusedoptim
