// What a plan reads of groups: their numbers.
#include <cstring>

#include "plan.h"

namespace fusedoptim {
namespace {

bool is_immutable(PyObject* x) {
  if (PyTuple_CheckExact(x)) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(x); ++i)
      if (!is_immutable(PyTuple_GET_ITEM(x, i))) return false;
    return true;
  }
  return PyFloat_CheckExact(x) || PyLong_CheckExact(x) || PyBool_Check(x) || x == Py_None;
}

// Such values are the same if they are equal; all others but dicts, if they are one object.
bool is_plain(PyObject* x) { return PyUnicode_CheckExact(x) || PyLong_CheckExact(x) || PyBool_Check(x); }

}  // namespace

// As fusedoptim/_values.py does it for the reference.
bool Plan::read_hyper(PyObject* dict, const Hyper& hyper, double* row, bool& immutable) {
  PyObject* value = PyDict_GetItem(dict, hyper.key.ptr());
  if (!value) {
    if (!hyper.off) return stale("a group lacks a hyper-parameter");
    row[hyper.column] = *hyper.off;
    return true;
  }
  immutable = immutable && is_immutable(value);
  if (hyper.index < 0) {
    if (hyper.none_is_off() && value == Py_None) {
      row[hyper.column] = -1;
      return true;
    }
    return read_number(value, hyper, row);
  }
  const auto index = py::reinterpret_steal<py::object>(PyLong_FromLong(hyper.index));
  const Py_ssize_t size = PyObject_Size(value);
  const auto item =
      py::reinterpret_steal<py::object>(size == hyper.count ? PyObject_GetItem(value, index.ptr()) : nullptr);
  if (!item) {
    if (PyErr_Occurred()) forget_python_error();
    return stale("a hyper-parameter is not one of as many as its rule has");
  }
  return read_number(item.ptr(), hyper, row);
}

bool Plan::read_number(PyObject* value, const Hyper& hyper, double* row) {
  if (hyper.column == kLr) row[kLrDType] = static_cast<double>(LrDType::python);
  double& out = row[hyper.column];
  if (hyper.whole && PyBool_Check(value)) return stale("a hyper-parameter is a bool");
  if (PyFloat_CheckExact(value)) {
    out = PyFloat_AS_DOUBLE(value);
  } else if (TensorReader::get().is_tensor(value)) {
    return read_tensor(value, hyper, row);
  } else {
    out = PyFloat_AsDouble(value);
    if (out == -1.0 && PyErr_Occurred()) {
      forget_python_error();
      return stale("a hyper-parameter is not a number");
    }
  }
  return hyper.accepts(out) || stale("a hyper-parameter is out of its range");
}

bool Plan::read_tensor(PyObject* value, const Hyper& hyper, double* row) {
  double& out = row[hyper.column];
  const bool is_lr = hyper.column == kLr;
  TensorView v;
  if (!TensorReader::get().view(value, v) || !v.data) return stale("a hyper-parameter is a tensor that cannot be read");
  for (int d = 0; d < v.ndim; ++d)
    if (v.sizes[d] != 1) return stale("a hyper-parameter is a tensor of several elements");
  const bool on_host = v.device.type == dlpack::kCpu;
  const bool by_address = is_lr && executor_->reads_lr_on_device() && v.device == device_;
  if (!on_host && !by_address) return stale("a hyper-parameter is a tensor on another device");
  if (on_host) {
    out = load_element<double>(v.data, v.dtype, 0);
    if (!hyper.accepts(out)) return stale("a hyper-parameter is out of its range");
  }
  if (is_lr) {
    row[kLrDType] = static_cast<double>(lr_dtype_of(v.dtype)) + (by_address ? kLrOnDevice : 0);
  }
  if (by_address) std::memcpy(&out, &v.data, sizeof(out));
  return true;
}

bool Plan::watched_unchanged(const Group& g, bool& immutable) const {
  for (size_t k = 0; k < watched_keys_.size(); ++k) {
    PyObject *value = PyDict_GetItem(g.dict.ptr(), watched_keys_[k].ptr()), *before = g.watched[k].ptr();
    const bool is_dict = value && PyDict_Check(value);
    if (is_dict)
      immutable = false;
    else if (value == before)
      continue;
    const bool comparable = value && before && (is_dict || (is_plain(value) && Py_TYPE(value) == Py_TYPE(before)));
    const int same = comparable ? PyObject_RichCompareBool(value, before, Py_EQ) : 0;
    if (same < 0) forget_python_error();
    if (same != 1) return false;
  }
  return true;
}

bool Plan::refresh_group(Group& g, HyperRow& row) {
  PyObject* dict = g.dict.ptr();
  double* h = row.value;
  bool immutable = true;
  if (!watched_unchanged(g, immutable)) return stale("how a group's parameters and states are stored has changed");
  for (const Hyper& hyper : hyper_)
    if (!read_hyper(dict, hyper, h, immutable)) return false;
  Variant variant;
  if (!rule_.find_variant(h, g.constants, variant)) return stale("no program is there for a group's values");
  if (variant != g.variant) {
    g.variant = variant;
    if (bound_) return stale("a group's options changed which states it needs");
  }
  g.items.clear();
  g.version = dict_version(dict);
  if (immutable)
    for (auto item : py::reinterpret_borrow<py::dict>(g.dict)) {
      g.items.push_back(py::reinterpret_borrow<py::object>(item.first));
      g.items.push_back(py::reinterpret_borrow<py::object>(item.second));
    }
  return true;
}

}  // namespace fusedoptim
