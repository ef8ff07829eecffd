// A quick look at parameters before Python looks at them closely: it has nothing to say about almost all of them, and
// takes fifteen times as long.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "memory_ranges.h"
#include "pybind.h"
#include "shard_reader.h"
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
  // What is looked at of DTensors: their class; whether a parameter's placements are such that it can be stepped;
  // whether another DTensor has its shape and placements.
  struct Shards {
    pybind11::object cls, can_be_stepped, is_alike;
  };
  // state: optimizer.state. shards: none as long as there is no such class.
  Look(pybind11::dict state, Names names, bool writes_grads, std::optional<Shards> shards)
      : state_(std::move(state)), names_(std::move(names)), writes_grads_(writes_grads), shards_(std::move(shards)) {
    if (shards_) shard_reader_ = ShardReader(shards_->cls, pybind11::none());
  }

  // For each parameter that is a plain dense tensor, or a DTensor whose shard is one, and whose gradient and states are
  // so, too, with shapes, devices and dtypes that a step takes as they are: the dict of its states, None if it has
  // none. Some or all states may be missing, but not some of those that every group needs. False for all others: Python
  // has to look.
  pybind11::list at(const pybind11::list& params);

  // Whether all so far were such, and none of the tensors that a step writes shares memory with another.
  bool all_apart();

 private:
  pybind11::object at(PyObject* param);
  // The tensor of this process, which may be the parameter itself; none if Python has to look.
  pybind11::object own_tensor(PyObject* param);
  // The same of a tensor that belongs to the parameter.
  pybind11::object its_tensor(PyObject* tensor);
  pybind11::object shard(PyObject* dtensor) const;
  bool grad();
  bool states(PyObject* values);
  // placed: as the parameter is, if that is a DTensor; else it is one number, and plain.
  template <class Fits>
  bool state(PyObject* values, const pybind11::object& name, int& there, int& missing, bool placed, const Fits& fits);
  bool dense_tensor(PyObject*, TensorView&) const;
  bool negated(PyObject*, const TensorView&) const;
  bool same_shape(const TensorView&) const;
  void writes(const TensorView& v) { ranges_.add(v.data, size_of(v.dtype), v.ndim, v.sizes, v.strides); }

  const TensorReader& reader_ = TensorReader::get();
  const pybind11::dict state_;
  const Names names_;
  const bool writes_grads_;
  const std::optional<Shards> shards_;
  ShardReader shard_reader_;
  PyObject *object_ = nullptr, *spec_ = nullptr;  // the parameter's, spec_ if it is a DTensor
  PyObject* alike_ = nullptr;                     // another spec that was found to be like spec_
  pybind11::object own_;                          // the parameter's tensor of this process
  TensorView param_{};                            // of the tensor of this process
  MemoryRanges ranges_;
  bool all_ = true;
};

}  // namespace fusedoptim
