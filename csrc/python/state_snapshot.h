// The identity of everything in optimizer.state: which dicts, which keys, which tensors.
#pragma once

#include <vector>

#include "dict_version.h"
#include "prefetch.h"
#include "pybind.h"

namespace fusedoptim {

class StateSnapshot {
 public:
  void take(const pybind11::dict& state) {
    state_version_ = dict_version(state.ptr());
    for (auto item : state) {
      add(item.first);
      add(item.second);
      if (!PyDict_Check(item.second.ptr())) {  // somebody else's entry
        dicts_.push_back(state.ptr());
        sizes_.push_back(-1);
        versions_.push_back(0);
        continue;
      }
      dicts_.push_back(item.second.ptr());
      versions_.push_back(dict_version(item.second.ptr()));
      const auto inner = pybind11::reinterpret_borrow<pybind11::dict>(item.second);
      sizes_.push_back(PyDict_Size(inner.ptr()));
      for (auto pair : inner) {
        add(pair.first);
        add(pair.second);
      }
    }
  }

  bool matches(PyObject* state) {
    if (versions_match(state)) return true;
    if (!items_match(state)) return false;
    state_version_ = dict_version(state);
    for (size_t i = 0; i < dicts_.size(); ++i)
      if (sizes_[i] >= 0) versions_[i] = dict_version(dicts_[i]);
    return true;
  }

  const std::vector<pybind11::object>& held() const { return held_; }
  void clear() {
    std::vector<pybind11::object>().swap(held_);
    dicts_.clear();
    sizes_.clear();
    versions_.clear();
    state_version_ = 0;
  }

 private:
  void add(pybind11::handle x) { held_.push_back(pybind11::reinterpret_borrow<pybind11::object>(x)); }

  // An entry that is no dict belongs to the state alone.
  bool versions_match(PyObject* state) const {
    if (state_version_ == 0 || dict_version(state) != state_version_) return false;
    for (size_t i = 0; i < dicts_.size(); ++i) {
      if (i + kFar < dicts_.size()) prefetch_dict(dicts_[i + kFar]);
      if (sizes_[i] >= 0 && dict_version(dicts_[i]) != versions_[i]) return false;
    }
    return true;
  }

  // Items are compared in the dicts' own order, which hashes nothing (Tensor.__hash__ is a Python function). A dict and
  // its table of keys are asked for ahead of time (see prefetch.h).
  bool items_match(PyObject* state) const {
    if (PyDict_Size(state) != static_cast<Py_ssize_t>(dicts_.size())) return false;
    const pybind11::object* expected = held_.data();
    PyObject *key, *value;
    Py_ssize_t at = 0;
    for (size_t i = 0; PyDict_Next(state, &at, &key, &value); ++i) {
      if (i + kFar < dicts_.size()) prefetch_dict(dicts_[i + kFar]);
      if (i + kNear < dicts_.size()) prefetch_dict_keys(dicts_[i + kNear]);
      if (key != (expected++)->ptr() || value != (expected++)->ptr() ||
          (sizes_[i] >= 0 && PyDict_Size(value) != sizes_[i]))
        return false;
      if (sizes_[i] < 0) continue;
      PyObject *name, *tensor;
      Py_ssize_t inner_at = 0;
      while (PyDict_Next(value, &inner_at, &name, &tensor))
        if (name != (expected++)->ptr() || tensor != (expected++)->ptr()) return false;
    }
    return true;
  }

  static constexpr size_t kFar = 16, kNear = 8;

  std::vector<pybind11::object> held_;  // key, value, then the items of value; held, so that no address is used again
  std::vector<PyObject*> dicts_;
  std::vector<Py_ssize_t> sizes_;
  std::vector<uint64_t> versions_;  // of the dicts
  uint64_t state_version_ = 0;
};

}  // namespace fusedoptim
