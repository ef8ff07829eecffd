#include "usual.h"

#include "memory_ranges.h"
#include "tensor_facts.h"
#include "tensor_reader.h"

namespace fusedoptim {

namespace py = pybind11;

namespace {

constexpr int kMaxDims = 64;

class Look {
 public:
  Look(const py::dict& state, const UsualNames& names, bool writes_grads)
      : state_(state), names_(names), writes_grads_(writes_grads) {}

  bool param(PyObject* p) {
    if (!reader_.is_plain(p) || !dense_tensor(p, param_) || param_.ndim > kMaxDims) return false;
    compute_ = param_.dtype == DType::f64 ? DType::f64 : DType::f32;
    return grad(p) && states(p);
  }

 private:
  bool grad(PyObject* p) {
    const py::object g = py::reinterpret_steal<py::object>(reader_.grad(p));
    if (!g) {
      forget_python_error();
      return false;
    }
    if (g.is_none()) return true;
    TensorView v;
    if (!reader_.is_plain(g.ptr()) || !reader_.view(g.ptr(), v) || reader_.is_negated(g.ptr())) return false;
    return same_shape(v) && (v.data || numel(v) == 0) && (!writes_grads_ || is_dense(v));
  }

  bool states(PyObject* p) {
    PyObject* values = PyDict_GetItemWithError(state_.ptr(), p);
    if (!values) return !PyErr_Occurred();
    if (!PyDict_CheckExact(values)) return false;
    const auto shaped = [&](const TensorView& v) { return same_shape(v); };
    const auto average = [&](const TensorView& v) { return same_shape(v) && v.dtype == compute_; };
    int there = 0, missing = 0, any = 0;
    for (const py::object& name : names_.slots)
      if (!state(values, name, there, missing, shaped)) return false;
    for (const py::object& name : names_.optional)
      if (!state(values, name, any, any, shaped)) return false;
    if (!state(values, names_.ema, any, any, average)) return false;
    const auto step = [&](const TensorView& v) {
      const bool placed = v.device == param_.device || v.device.type == dlpack::kCpu;
      return placed && numel(v) == 1 && (v.dtype == DType::f32 || v.dtype == DType::f64);
    };
    if (!names_.step.is_none() && !state(values, names_.step, there, missing, step)) return false;
    const auto scalar = [&](const TensorView& v) {
      return v.device == param_.device && numel(v) == 1 && v.dtype == DType::f32;
    };
    if (!names_.scalar.is_none() && !state(values, names_.scalar, there, missing, scalar)) return false;
    return there == 0 || missing == 0;
  }

  template <class Fits>
  bool state(PyObject* values, const py::object& name, int& there, int& missing, const Fits& fits) {
    PyObject* value = PyDict_GetItem(values, name.ptr());
    if (!value || value == Py_None) {
      ++missing;
      return true;
    }
    ++there;
    TensorView v;
    return reader_.is_plain(value) && dense_tensor(value, v) && fits(v);
  }

  bool dense_tensor(PyObject* t, TensorView& v) const {
    return reader_.view(t, v) && is_dense(v) && !reader_.is_negated(t);
  }

  bool is_dense(const TensorView& v) const {
    return dense({v.sizes, v.sizes + v.ndim}, {v.strides, v.strides + v.ndim}) || numel(v) == 0;
  }

  bool same_shape(const TensorView& v) const {
    return v.device == param_.device && v.ndim == param_.ndim && std::equal(v.sizes, v.sizes + v.ndim, param_.sizes);
  }

  static int64_t numel(const TensorView& v) {
    int64_t n = 1;
    for (int d = 0; d < v.ndim; ++d) n *= v.sizes[d];
    return n;
  }

  const TensorReader& reader_ = TensorReader::get();
  const py::dict& state_;
  const UsualNames& names_;
  const bool writes_grads_;
  TensorView param_{};
  DType compute_ = DType::f32;
};

}  // namespace

py::bytes usual(const py::list& params, const py::dict& state, const UsualNames& names, bool writes_grads) {
  Look look(state, names, writes_grads);
  std::string found;
  for (py::handle p : params) found.push_back(look.param(p.ptr()) ? 1 : 0);
  return found;
}

bool apart(const py::list& tensors) {
  MemoryRanges ranges;
  for (py::handle t : tensors) {
    TensorView v;
    if (!TensorReader::get().is_tensor(t.ptr()) || !TensorReader::get().view(t.ptr(), v)) return false;
    ranges.add(v.data, v.dtype, {v.sizes, v.sizes + v.ndim}, {v.strides, v.strides + v.ndim});
  }
  ranges.sort();
  return ranges.apart_from(MemoryRanges());
}

}  // namespace fusedoptim
