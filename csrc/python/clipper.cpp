#include "clipper.h"

#include <cmath>

#include "../cpu/builtin_rules.h"
#include "make_executor.h"
#include "tensor_facts.h"

namespace fusedoptim {

Clipper::Clipper(const py::object& launcher, int64_t norm_stats, py::object sums)
    : launcher_(launcher), norm_stats_(reinterpret_cast<NormStats*>(norm_stats)), sums_(std::move(sums)) {}

void Clipper::run(int64_t stream, bool measure, double max_norm, double limit) {
  StepSettings settings;
  settings.norm_stats = norm_stats_;
  const bool scales = max_norm >= 0 || limit >= 0;
  StepTable table;
  PythonMemory::keep_sums(table, sums_);
  table.rows.resize(1);
  table.rows[0].value[kMaxGradNorm] = measure && max_norm < 0 ? INFINITY : max_norm;
  table.rows[0].value[kClipGradValue] = limit;
  const std::unique_ptr<Executor> executor = make_executor(*find_rule(Clip::name), launcher_, settings);
  executor->sync_threads_and_isa();
  table.entries.resize(tensors_.size());
  std::vector<std::unique_ptr<Layout>> layouts(tensors_.size());
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const torch::stable::Tensor& t = tensors_[i];
    const auto sizes = to_vector(t.sizes()), strides = to_vector(t.strides());
    Entry& e = table.entries[i];
    e.param() = e.grad() = {t.mutable_data_ptr(), nullptr, dtype_of(t)};
    e.numel = t.numel();
    e.active = true;
    if (e.numel > 1 && !row_major(sizes, strides)) {
      layouts[i] = std::make_unique<Layout>(Layout{sizes, {strides, strides}});
      layouts[i]->simplify();
      e.sum_layout = layouts[i].get();
      if (!dense(sizes, strides)) e.layout = layouts[i].get();
    }
    executor->prepare(e, {});
  }
  executor->activity_changed();
  const LaunchInputs inputs{stream, 0, 0};
  const auto clip = [&] {
    if (scales) return executor->run(table, inputs, [] {});
    executor->measure(table, inputs, Gradients::unscaled, true);
  };
  if (executor->begin_step(table)) {
    py::gil_scoped_release release;
    clip();
  } else {
    clip();
  }
}

}  // namespace fusedoptim
