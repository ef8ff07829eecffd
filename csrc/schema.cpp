// Every operator's schema.
#include <torch/csrc/stable/library.h>

#include "python/clipper.h"
#include "python/plan.h"

namespace fusedoptim {
namespace {

// These hand a plan or a clipper its tensors: the one way from a Python tensor to a handle of the stable ABI.
void bind_plan(std::vector<torch::stable::Tensor> tensors, int64_t plan) {
  reinterpret_cast<Plan*>(plan)->bind(tensors);
}

void bind_clipper(std::vector<torch::stable::Tensor> tensors, int64_t clipper) {
  reinterpret_cast<Clipper*>(clipper)->bind(tensors);
}

}  // namespace
}  // namespace fusedoptim

STABLE_TORCH_LIBRARY(fusedoptim, m) {
  m.def("_bind_plan(Tensor[] tensors, int plan) -> ()");
  m.def("_bind_clipper(Tensor[] tensors, int clipper) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusedoptim, CompositeExplicitAutograd, m) {
  m.impl("_bind_plan", TORCH_BOX(&fusedoptim::bind_plan));
  m.impl("_bind_clipper", TORCH_BOX(&fusedoptim::bind_clipper));
}
