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

// What others refer to, or nothing. Held, since the functions that are asked are Python's, beside which another thread
// may replace it.
py::object borrowed(PyObject* p) { return py::reinterpret_borrow<py::object>(p); }

// Python looks closely, and says what is wrong, where the answer is an error.
template <class... Args>
bool asked(const py::object& function, Args... args) {
  try {
    return function(py::handle(args)...).template cast<bool>();
  } catch (const py::error_already_set&) {
    return false;
  }
}

}  // namespace

py::list Look::at(const py::list& params) {
  py::list found(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    py::object values = at(py::handle(params[i]).ptr());
    all_ = all_ && values.ptr() != Py_False;
    found[i] = std::move(values);
  }
  return found;
}

bool Look::all_apart() {
  ranges_.sort();
  return all_ && ranges_.apart_from(MemoryRanges());
}

py::object Look::at(PyObject* param) {
  own_ = own_tensor(param);
  if (!own_ || !dense_tensor(own_.ptr(), param_) || param_.ndim > kMaxDims) return py::bool_(false);
  writes(param_);
  const py::object values = borrowed(PyDict_GetItem(state_.ptr(), param));
  if (!grad() || (values && !states(values.ptr()))) return py::bool_(false);
  return values ? values : py::none();
}

py::object Look::own_tensor(PyObject* param) {
  object_ = param;
  spec_ = alike_ = nullptr;
  if (reader_.is_plain(param)) return borrowed(param);
  if (!shard_reader_.is_plain_dtensor(param) || !asked(shards_->can_be_stepped, param)) return {};
  spec_ = shard_reader_.peek_spec(param);
  return spec_ ? shard(param) : py::object();
}

py::object Look::its_tensor(PyObject* tensor) {
  if (!spec_) return reader_.is_plain(tensor) ? borrowed(tensor) : py::object();
  if (!shard_reader_.is_plain_dtensor(tensor)) return {};
  PyObject* const spec = shard_reader_.peek_spec(tensor);
  if (!spec) return {};
  if (spec != spec_ && spec != alike_) {
    if (!asked(shards_->is_alike, object_, tensor)) return {};
    alike_ = spec;
  }
  return shard(tensor);
}

py::object Look::shard(PyObject* dtensor) const {
  PyObject* const found = shard_reader_.peek_local(dtensor);
  return found && reader_.is_plain(found) ? borrowed(found) : py::object();
}

bool Look::grad() {
  const py::object g =
      py::reinterpret_steal<py::object>(spec_ ? reader_.grad_of_dtensor(object_) : reader_.grad(object_));
  if (!g) {
    forget_python_error();
    return false;
  }
  if (g.is_none()) return true;
  TensorView v;
  const py::object own = its_tensor(g.ptr());
  if (!own || !reader_.view(own.ptr(), v) || negated(own.ptr(), v)) return false;
  // A shard need not have the dtype that its DTensor says.
  if (spec_ && v.dtype != param_.dtype) return false;
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
    if (!state(values, name, there, missing, true, shaped)) return false;
  for (const py::object& name : names_.optional)
    if (!state(values, name, any, any, true, shaped)) return false;
  if (!state(values, names_.ema, any, any, true, average)) return false;
  if (!names_.step.is_none() && !state(values, names_.step, there, missing, false, step)) return false;
  for (const py::object& name : names_.numbers)
    if (!state(values, name, there, missing, false, number)) return false;
  for (const py::object& name : names_.optional_numbers)
    if (!state(values, name, any, any, false, number)) return false;
  return there == 0 || missing == 0;
}

template <class Fits>
bool Look::state(PyObject* values, const py::object& name, int& there, int& missing, bool placed, const Fits& fits) {
  const py::object value = borrowed(PyDict_GetItem(values, name.ptr()));
  if (!value || value.is_none()) {
    ++missing;
    return true;
  }
  ++there;
  TensorView v;
  const py::object own = placed ? its_tensor(value.ptr()) : reader_.is_plain(value.ptr()) ? value : py::object();
  if (!own || !dense_tensor(own.ptr(), v) || !fits(v)) return false;
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
