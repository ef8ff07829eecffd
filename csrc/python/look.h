// A quick look at parameters before Python looks at them closely: it has nothing to say about almost all of them, and
// takes fifteen times as long.
#pragma once

#include <utility>
#include <vector>

#include "memory_ranges.h"
#include "pybind.h"
#include "tensor_reader.h"

namespace fusedoptim {

class Look {
 public:
  struct Names {
    std::vector<pybind11::object> slots, optional;  // states with the parameter's shape: of all groups, of some
    std::vector<pybind11::object> numbers, optional_numbers;  // states that are one number, likewise
    pybind11::object step;                                    // may be None
    pybind11::object ema;
  };
  // state: optimizer.state.
  Look(pybind11::dict state, Names names, bool writes_grads)
      : state_(std::move(state)), names_(std::move(names)), writes_grads_(writes_grads) {}

  // For each parameter that is a plain dense tensor, and whose gradient and states are so, too, with shapes, devices
  // and dtypes that a step takes as they are: the dict of its states, None if it has none. Some or all states may be
  // missing, but not some of those that every group needs. False for all others: Python has to look.
  pybind11::list at(const pybind11::list& params);

  // Whether all so far were such, and none of the tensors that a step writes shares memory with another.
  bool all_apart();

 private:
  PyObject* at(PyObject* param);
  bool grad(PyObject* param);
  bool states(PyObject* values);
  template <class Fits>
  bool state(PyObject* values, const pybind11::object& name, int& there, int& missing, const Fits& fits);
  bool dense_tensor(PyObject*, TensorView&) const;
  bool negated(PyObject*, const TensorView&) const;
  bool same_shape(const TensorView&) const;
  void writes(const TensorView& v) { ranges_.add(v.data, size_of(v.dtype), v.ndim, v.sizes, v.strides); }

  const TensorReader& reader_ = TensorReader::get();
  const pybind11::dict state_;
  const Names names_;
  const bool writes_grads_;
  TensorView param_{};
  MemoryRanges ranges_;
  bool all_ = true;
};

}  // namespace fusedoptim
