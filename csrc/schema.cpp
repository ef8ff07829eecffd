// Every operator's schema.
#include <torch/csrc/stable/library.h>

#include "python/tensor_hand_over.h"

namespace fusedoptim {
namespace {

void hand_over(std::vector<torch::stable::Tensor> tensors, int64_t number) { TensorHandOver::to(number, tensors); }

}  // namespace
}  // namespace fusedoptim

STABLE_TORCH_LIBRARY(fusedoptim, m) { m.def("_hand_over(Tensor[] tensors, int number) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(fusedoptim, CompositeExplicitAutograd, m) {
  m.impl("_hand_over", TORCH_BOX(&fusedoptim::hand_over));
}
