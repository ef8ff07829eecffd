#include "plan.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "../cpu/capability.h"

namespace fusedoptim {
namespace {

using torch::headeronly::ScalarType;
using StableTensor = torch::stable::Tensor;

DType dtype_of(const StableTensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: return DType::unsupported;
  }
}

template <class Range>
std::vector<int64_t> to_vector(const Range& r) {
  return {r.begin(), r.end()};
}

// Strides of dimensions of size 1 mean nothing.
bool same_strides(const std::vector<int64_t>& sizes, const int64_t* a, const int64_t* b) {
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1 && a[d] != b[d]) return false;
  return true;
}

bool row_major(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  int64_t expected = 1;
  for (int d = static_cast<int>(sizes.size()) - 1; d >= 0; --d) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// Fills its memory without gaps or overlaps, in some order of the dimensions.
bool dense(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  std::vector<std::pair<int64_t, int64_t>> by_stride;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1) by_stride.push_back({strides[d], sizes[d]});
  std::sort(by_stride.begin(), by_stride.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : by_stride) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

}  // namespace

Plan::Plan(const std::string& rule, const std::vector<std::pair<std::string, int>>& hyper, py::object increment_version)
    : rule_(find_rule(rule.c_str())),
      info_(rule_ >= 0 ? rule_info(rule_) : throw py::value_error("no compiled rule is called '" + rule + "'")),
      executor_(rule_),
      increment_version_(std::move(increment_version)),
      params_key_(py::str("params")),
      lr_key_(py::str("lr")) {
  if (static_cast<int>(hyper.size()) + kFirstRuleHyper != info_.hypers)
    throw py::value_error("rule '" + rule + "' was compiled with another number of hyper-parameters");
  for (const auto& [key, index] : hyper)
    hyper_.emplace_back(py::reinterpret_steal<py::object>(PyUnicode_InternFromString(key.c_str())), index);
}

bool Plan::no(const char* why) {
  reason_ = why;
  return false;
}

void Plan::build(py::list groups, py::dict state, py::list bindings) {
  groups_ = groups;
  state_ = state;
  int64_t at = 0;
  for (py::handle g : groups) {
    Group group;
    group.dict = py::reinterpret_borrow<py::object>(g);
    group.params = g[params_key_];
    group.begin = at;
    for (py::handle p : group.params) {
      Member m;
      m.param = py::reinterpret_borrow<py::object>(p);
      member_.push_back(std::move(m));
      Entry e;
      e.group = static_cast<int32_t>(group_.size());
      entries_.push_back(e);
      ++at;
    }
    group.end = at;
    group_.push_back(std::move(group));
  }
  rows_.resize(group_.size());
  for (size_t i = 0; i < group_.size(); ++i)
    if (!refresh_group(group_[i], rows_[i])) throw py::value_error(reason_);
  for (py::handle b : bindings) bindings_.push_back(b.cast<std::vector<int>>());
  for (auto item : state) {
    state_items_.push_back({py::reinterpret_borrow<py::object>(item.first), py::reinterpret_borrow<py::object>(item.second)});
    std::vector<StateItem> inner;
    for (auto pair : py::reinterpret_borrow<py::dict>(item.second))
      inner.push_back({py::reinterpret_borrow<py::object>(pair.first), py::reinterpret_borrow<py::object>(pair.second)});
    tensor_items_.push_back(std::move(inner));
  }
  grads_.resize(member_.size());
}

void Plan::bind(std::vector<StableTensor> tensors) {
  if (bindings_.size() != member_.size()) throw std::runtime_error("a plan needs one binding per parameter");
  for (size_t i = 0; i < member_.size(); ++i)
    if (!bindings_[i].empty()) bind_member(static_cast<int64_t>(i), tensors, bindings_[i]);
}

void Plan::bind_member(int64_t i, const std::vector<StableTensor>& tensors, const std::vector<int>& binding) {
  Member& m = member_[i];
  Entry& e = entries_[i];
  const StableTensor& p = tensors.at(binding[0]);
  m.sizes = to_vector(p.sizes());
  m.strides = to_vector(p.strides());
  e.numel = p.numel();
  e.param_dtype = dtype_of(p);
  operands_.push_back({p, &e.param, e.numel});
  const int variant = group_[e.group].variant;
  m.linear = e.numel <= 1 || (dense(m.sizes, m.strides) && (!info_.needs_norm || row_major(m.sizes, m.strides)));
  m.ours = m.ready = true;
  for (int k = 0; k < info_.slots; ++k) {
    if (!info_.uses(variant, k)) continue;
    if (binding[1 + k] < 0) {
      m.ready = false;
      continue;
    }
    const StableTensor& s = tensors.at(binding[1 + k]);
    e.state_dtype[k] = dtype_of(s);
    m.state_strides[k] = to_vector(s.strides());
    if (e.numel > 1) m.linear = m.linear && same_strides(m.sizes, m.strides.data(), m.state_strides[k].data());
    operands_.push_back({s, &e.state[k], e.numel});
  }
  const int step = binding[1 + info_.slots], scalar = binding[2 + info_.slots];
  if (info_.has_step && step < 0) m.ready = false;
  if (info_.next_scalar_state && scalar < 0) m.ready = false;
  if (info_.has_step && step >= 0) {
    e.step_dtype = dtype_of(tensors.at(step));
    operands_.push_back({tensors.at(step), &e.step, 1});
  }
  if (info_.next_scalar_state && scalar >= 0)
    operands_.push_back({tensors.at(scalar), reinterpret_cast<void**>(&e.scalar_state), 1});
  e.first = binding[3 + info_.slots] != 0;
}

bool Plan::read_hyper(PyObject* value, double& out, LrDType* lr_dtype) {
  if (PyFloat_CheckExact(value)) {
    out = PyFloat_AS_DOUBLE(value);
    return true;
  }
  if (TensorReader::get().is_tensor(value)) {
    GradientView v;
    if (!TensorReader::get().view(value, v) || !v.on_cpu) return no("a hyper-parameter is a tensor that cannot be read on the CPU");
    for (int d = 0; d < v.ndim; ++d)
      if (v.sizes[d] != 1) return no("a hyper-parameter is a tensor of several elements");
    out = load_element<double>(v.data, v.dtype, 0);
    static constexpr LrDType kOf[] = {LrDType::f32, LrDType::f64, LrDType::bf16, LrDType::f16};
    if (lr_dtype) *lr_dtype = kOf[static_cast<int>(v.dtype)];
    return true;
  }
  out = PyFloat_AsDouble(value);
  if (out == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    return no("a hyper-parameter is not a number");
  }
  return true;
}

bool Plan::refresh_group(Group& g, HyperRow& row) {
  PyObject* dict = g.dict.ptr();
  double* h = row.value;
  LrDType lr_dtype = LrDType::python;
  PyObject* lr = PyDict_GetItem(dict, lr_key_.ptr());
  if (!lr) return no("a group has no 'lr'");
  if (!read_hyper(lr, h[kLr], &lr_dtype)) return false;
  h[kLrDType] = static_cast<double>(lr_dtype);
  bool nan = std::isnan(h[kLr]);
  for (size_t k = 0; k < hyper_.size(); ++k) {
    PyObject* value = PyDict_GetItem(dict, hyper_[k].first.ptr());
    if (!value) return no("a group lacks a hyper-parameter");
    double& out = h[kFirstRuleHyper + k];
    if (hyper_[k].second >= 0) {
      py::object item = py::reinterpret_steal<py::object>(PySequence_GetItem(value, hyper_[k].second));
      if (!item) {
        PyErr_Clear();
        return no("a hyper-parameter has too few items");
      }
      if (!read_hyper(item.ptr(), out, nullptr)) return false;
    } else if (!read_hyper(value, out, nullptr)) {
      return false;
    }
    nan = nan || std::isnan(out);
  }
  if (nan) return no("a hyper-parameter is NaN");
  const int variant = info_.variant(h);
  if (variant != g.variant) {
    g.variant = variant;
    if (kernels_) return no("a group's options changed which states it needs");
  }
  return true;
}

// Dicts are compared item by item in their own order, which hashes nothing.
bool Plan::same_state(py::handle state) const {
  if (PyDict_Size(state.ptr()) != static_cast<Py_ssize_t>(state_items_.size())) return false;
  PyObject *key, *value;
  Py_ssize_t pos = 0;
  for (size_t i = 0; PyDict_Next(state.ptr(), &pos, &key, &value); ++i) {
    if (key != state_items_[i].key.ptr() || value != state_items_[i].value.ptr()) return false;
    const std::vector<StateItem>& inner = tensor_items_[i];
    if (PyDict_Size(value) != static_cast<Py_ssize_t>(inner.size())) return false;
    PyObject *name, *tensor;
    Py_ssize_t inner_pos = 0;
    for (size_t k = 0; PyDict_Next(value, &inner_pos, &name, &tensor); ++k)
      if (name != inner[k].key.ptr() || tensor != inner[k].value.ptr()) return false;
  }
  return true;
}

bool Plan::same_addresses() {
  for (Operand& o : operands_) {
    int64_t numel = 0;
    void* data = nullptr;
    if (aoti_torch_get_data_ptr(o.tensor.get(), &data) != 0 || aoti_torch_get_numel(o.tensor.get(), &numel) != 0 ||
        numel != o.numel)
      return false;
    if (data != *o.target) {
      if (kernels_) return false;
      *o.target = data;
    }
  }
  return true;
}

bool Plan::refresh_gradient(int64_t i, const GradientView& g) {
  Member& m = member_[i];
  Entry& e = entries_[i];
  if (!m.ready) return no("a parameter has a gradient for the first time");
  if (!g.on_cpu) return no("a gradient is not on the CPU");
  if (static_cast<size_t>(g.ndim) != m.sizes.size()) return no("a gradient's shape differs from its parameter's");
  for (int d = 0; d < g.ndim; ++d)
    if (g.sizes[d] != m.sizes[d]) return no("a gradient's shape differs from its parameter's");
  const bool linear = m.linear && (e.numel <= 1 || same_strides(m.sizes, g.strides, m.strides.data()));
  bool changed = !e.update || e.grad_dtype != g.dtype || linear != (e.layout == nullptr);
  if (!linear && (changed || !std::equal(g.strides, g.strides + g.ndim, m.layout->grad.begin()))) {
    m.layout = std::make_unique<Layout>();
    m.layout->sizes = m.sizes;
    m.layout->param = m.strides;
    m.layout->grad.assign(g.strides, g.strides + g.ndim);
    for (int k = 0; k < info_.slots; ++k) m.layout->state[k] = m.state_strides[k];
    changed = true;
  }
  e.grad = g.data;
  if (changed) {
    rescheduling_ = rescheduling_ || linear != (e.layout == nullptr);
    e.grad_dtype = g.dtype;
    e.layout = linear ? nullptr : m.layout.get();
    e.update = kernels_->update(rule_, group_[e.group].variant, e);
    e.tile_sum = kernels_->tile_sum(e);
  }
  return true;
}

bool Plan::refresh(py::handle groups, py::handle state) {
  refreshed_ = false;
  if (groups.ptr() != groups_.ptr() || state.ptr() != state_.ptr() ||
      PyList_GET_SIZE(groups.ptr()) != static_cast<Py_ssize_t>(group_.size()))
    return no("the groups or the state were replaced");
  if (!same_state(state)) return no("a state was replaced");
  if (!same_addresses()) return no("a parameter or a state has new memory or a new size");
  if (const Kernels* current = &cpu_kernels(); kernels_ != current) {
    kernels_ = current;
    for (Entry& e : entries_) e.update = nullptr;
  }
  if (const int threads = static_cast<int>(torch::stable::get_num_threads()); threads_ != threads) {
    threads_ = threads;
    rescheduling_ = true;
  }
  const TensorReader& reader = TensorReader::get();
  for (size_t gi = 0; gi < group_.size(); ++gi) {
    Group& g = group_[gi];
    if (PyList_GET_ITEM(groups.ptr(), gi) != g.dict.ptr()) return no("a group was replaced");
    PyObject* params = PyDict_GetItem(g.dict.ptr(), params_key_.ptr());
    if (params != g.params.ptr() || PyList_GET_SIZE(params) != g.end - g.begin) return no("a group's parameters changed");
    if (!refresh_group(g, rows_[gi])) return false;
    for (int64_t i = g.begin; i < g.end; ++i) {
      Entry& e = entries_[i];
      PyObject* p = member_[i].param.ptr();
      if (PyList_GET_ITEM(params, i - g.begin) != p) return no("a group's parameters changed");
      if (!member_[i].ours) continue;
      grads_[i] = py::reinterpret_steal<py::object>(reader.grad(p));
      if (!grads_[i]) throw py::error_already_set();
      const bool active = !grads_[i].is_none();
      if (active) {
        GradientView view;
        if (!reader.view(grads_[i].ptr(), view)) return no("a gradient is not a strided tensor of a supported dtype");
        if (!refresh_gradient(i, view)) return false;
      }
      if (active != e.active) {
        e.active = active;
        rescheduling_ = true;
      }
    }
  }
  refreshed_ = true;
  return true;
}

void Plan::run() {
  if (!refreshed_) throw std::runtime_error("run() must follow a refresh() that returned True");
  refreshed_ = false;
  struct Release {  // what was held for the kernels
    std::vector<py::object>& grads;
    ~Release() {
      for (py::object& g : grads) g = py::object();
    }
  } release_grads{grads_};
  if (rescheduling_) {
    executor_.reschedule(entries_);
    py::list active;
    for (size_t i = 0; i < entries_.size(); ++i)
      if (entries_[i].active) active.append(member_[i].param);
    active_params_ = active;
    rescheduling_ = false;
  }
  // Autograd's version counters, so that a backward pass through overwritten parameters is noticed. It needs the
  // interpreter: short steps do it beside the kernels, long ones before, so that other Python threads can run.
  constexpr int64_t kReleaseCost = int64_t{1} << 20;
  if (executor_.cost() < kReleaseCost) {
    py::object result = py::none();
    executor_.run(entries_, rows_, [&] {
      result = py::reinterpret_steal<py::object>(PyObject_CallOneArg(increment_version_.ptr(), active_params_.ptr()));
    });
    if (!result) throw py::error_already_set();
  } else {
    increment_version_(active_params_);
    py::gil_scoped_release release;
    executor_.run(entries_, rows_, [] {});
  }
}

}  // namespace fusedoptim
