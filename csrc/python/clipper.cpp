#include "clipper.h"

#include <cmath>

#include "make_executor.h"
#include "tensor_facts.h"

namespace fusedoptim {

Clipper::Clipper(const py::object& launcher, int64_t norm_stats)
    : launcher_(launcher), norm_stats_(reinterpret_cast<NormStats*>(norm_stats)) {}

void Clipper::run(int64_t stream, bool measure, double max_norm, double limit) {
  Settings settings;
  settings.norm_stats = norm_stats_;
  settings.update = max_norm >= 0 || limit >= 0;
  HyperRow row;
  row.value[kMaxGradNorm] = measure && max_norm < 0 ? INFINITY : max_norm;
  row.value[kClipGradValue] = limit;
  const std::vector<HyperRow> rows(1, row);
  const std::unique_ptr<Executor> executor = make_executor(find_rule(Clip::name), launcher_, settings);
  executor->outdated();
  std::vector<Entry> entries(tensors_.size());
  std::vector<std::unique_ptr<Layout>> layouts(tensors_.size());
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const torch::stable::Tensor& t = tensors_[i];
    const auto sizes = to_vector(t.sizes()), strides = to_vector(t.strides());
    Entry& e = entries[i];
    e.param = e.grad = t.mutable_data_ptr();
    e.param_dtype = e.grad_dtype = dtype_of(t);
    e.numel = t.numel();
    e.active = true;
    if (e.numel > 1 && !row_major(sizes, strides)) {
      layouts[i] = std::make_unique<Layout>(Layout{sizes, strides, strides, {}});
      layouts[i]->simplify();
      e.sum_layout = layouts[i].get();
      if (!dense(sizes, strides)) e.layout = layouts[i].get();
    }
    executor->prepare(e, 0);
  }
  executor->activity_changed();
  const OnDevice on_device{stream, 0, 0};
  if (executor->takes_long(entries, rows)) {
    py::gil_scoped_release release;
    executor->run(entries, rows, on_device, [] {});
  } else {
    executor->run(entries, rows, on_device, [] {});
  }
}

}  // namespace fusedoptim
