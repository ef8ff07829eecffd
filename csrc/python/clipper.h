// Clips tensors that belong to no optimizer, by their common norm or by value: a step of the rule `clip`, in which each
// tensor is parameter and gradient at once. As a whole, or in parts (Executor's), where the norm has other parts, too.
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
  // sums: a tensor of fp64 numbers on the device; places: for each tensor that is handed over, which of these is its
  // own, in ascending order. wide: see StepTable.
  Clipper(const pybind11::object& launcher, int64_t norm_stats, pybind11::object sums, std::vector<int64_t> places,
          int64_t size, bool wide);

  // Under which the tensors are handed over: tensor_hand_over.h.
  int64_t number() const { return hand_over_.number(); }

  // Writes the norm of all tensors, if measures; then scales them to max_norm and holds every element within the limit.
  // Either is off if below 0; if both are, the tensors stay as they are.
  void run(int64_t stream, bool measures, double max_norm, double limit);

  void measure(int64_t stream);
  void reduce(int64_t stream);
  // found_inf: the address of an fp32 number: nothing changes unless it is 0. Or 0.
  void update(int64_t stream, double max_norm, double limit, int64_t found_inf);

 private:
  void bind(const TensorHandOver::Tensors& tensors);
  template <class F>
  void call(double max_norm, double limit, const F& part);

  const std::vector<int64_t> places_;
  std::vector<torch::stable::Tensor> tensors_;
  StepTable table_;
  std::vector<std::unique_ptr<Layout>> layouts_;
  const std::unique_ptr<Executor> executor_;
  TensorHandOver hand_over_{[this](const TensorHandOver::Tensors& tensors) { bind(tensors); }};
};

}  // namespace fusedoptim
