// Clips tensors that belong to no optimizer, by their common norm or by value: a step of the rule `clip`, in which each
// tensor is parameter and gradient at once.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <vector>

#include "../core/executor.h"
#include "pybind.h"
#include "tensor_hand_over.h"

namespace fusedoptim {

class Clipper {
 public:
  // launcher: see make_executor.h. norm_stats: the address of a NormStats on the tensors' device.
  // sums: a tensor of an fp64 number for each that is handed over.
  Clipper(const pybind11::object& launcher, int64_t norm_stats, pybind11::object sums);

  // Under which the tensors are handed over: tensor_hand_over.h.
  int64_t number() const { return hand_over_.number(); }

  // Writes the norm of all tensors, if measure; then scales them to max_norm and holds every element within the limit.
  // Either is off if below 0; if both are, the tensors stay as they are.
  void run(int64_t stream, bool measure, double max_norm, double limit);

 private:
  const pybind11::object launcher_;
  NormStats* const norm_stats_;
  const pybind11::object sums_;
  std::vector<torch::stable::Tensor> tensors_;
  TensorHandOver hand_over_{[this](const TensorHandOver::Tensors& tensors) { tensors_ = tensors; }};
};

}  // namespace fusedoptim
