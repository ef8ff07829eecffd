#include "clipper.h"

#include <cmath>

#include "../cpu/builtin_rules.h"
#include "make_executor.h"
#include "tensor_facts.h"

namespace fusedoptim {
namespace {

StepSettings settings_with(int64_t norm_stats) {
  StepSettings settings;
  settings.norm_stats = reinterpret_cast<NormStats*>(norm_stats);
  return settings;
}

}  // namespace

Clipper::Clipper(const py::object& launcher, int64_t norm_stats, py::object sums, std::vector<int64_t> places,
                 int64_t size, bool wide)
    : places_(std::move(places)),
      executor_(make_executor(*find_rule(Clip::name), launcher, settings_with(norm_stats))) {
  PythonMemory::keep_sums(table_, std::move(sums));
  table_.rows.resize(1);
  table_.entries.resize(size);
  table_.wide = wide;
}

void Clipper::bind(const TensorHandOver::Tensors& tensors) {
  tensors_ = tensors;
  executor_->sync_threads_and_isa();
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const torch::stable::Tensor& t = tensors_[i];
    const auto sizes = to_vector(t.sizes()), strides = to_vector(t.strides());
    Entry& e = table_.entries.at(places_.at(i));
    e.param() = e.grad() = {t.mutable_data_ptr(), nullptr, storage_of(dtype_of(t))};
    e.numel = e.whole_numel = t.numel();
    e.active = e.ready = true;
    if (e.numel > 1 && !row_major(sizes, strides)) {
      layouts_.push_back(std::make_unique<Layout>(Layout{sizes, {strides, strides}}));
      layouts_.back()->simplify();
      e.sum_layout = layouts_.back().get();
      if (!dense(sizes, strides)) e.layout = layouts_.back().get();
    }
    executor_->prepare(e);
  }
  executor_->activity_changed();
}

template <class F>
void Clipper::call(double max_norm, double limit, const F& part) {
  table_.rows[0].value[kMaxGradNorm] = max_norm;
  table_.rows[0].value[kClipGradValue] = limit;
  if (executor_->begin_step(table_)) {
    py::gil_scoped_release release;
    part();
  } else {
    part();
  }
}

void Clipper::run(int64_t stream, bool measures, double max_norm, double limit) {
  const bool scales = max_norm >= 0 || limit >= 0;
  call(measures && max_norm < 0 ? INFINITY : max_norm, limit, [&] {
    if (scales) return executor_->run(table_, {stream, 0, 0}, [] {});
    executor_->measure(table_, {stream, 0, 0}, kOfGradients, true);
  });
}

void Clipper::measure(int64_t stream) {
  call(INFINITY, -1, [&] { executor_->measure(table_, {stream, 0, 0}, kOfGradients, false); });
}

void Clipper::reduce(int64_t stream) {
  call(INFINITY, -1, [&] { executor_->reduce(table_, {stream, 0, 0}); });
}

void Clipper::update(int64_t stream, double max_norm, double limit, int64_t found_inf) {
  call(max_norm, limit, [&] { executor_->update(table_, {stream, 0, found_inf}); });
}

}  // namespace fusedoptim
