// Looks for autograd's version counters (version_counter.h) on tensors made for it, in memory that is known to be
// theirs. What might be an address is read through a pipe first, by the kernel, which refuses where a read would end
// the process.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "tensor_hand_over.h"
#include "version_counter.h"

namespace fusedoptim {

class VersionProbe {
 public:
  // Tensors of one dimension, handed over in threes: one; another with its memory and counter (x.detach()); a third
  // with its memory, but a counter of its own (x.data). versions: of the first of each three, none like another's. True
  // if the place is found, and the one found before with other versions.
  bool find(const std::vector<uint32_t>& versions);
  // Raises a tensor's counter.
  void raise(size_t tensor) const;
  // Plans that are made from now on can raise counters in this way.
  void adopt() const { VersionCounters::layout() = layout_.value(); }

  int64_t number() const { return hand_over_.number(); }

 private:
  std::optional<int> find_pointer() const;
  std::optional<int> find_number(int pointer, const std::vector<uint32_t>& versions) const;

  std::vector<torch::stable::Tensor> tensors_;
  std::optional<VersionLayout> layout_;
  TensorHandOver hand_over_{[this](const TensorHandOver::Tensors& tensors) { tensors_ = tensors; }};
};

}  // namespace fusedoptim
