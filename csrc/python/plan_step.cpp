// How a plan runs a step, or its parts.
#include <functional>
#include <optional>

#include "plan.h"

namespace fusedoptim {

// Of what the step writes to. Any thread may do it.
void Plan::raise_versions() const {
  constexpr int64_t kFar = 16, kNear = 8;
  const VersionRaiser raiser;
  const int64_t n = static_cast<int64_t>(written_.size());
  for (size_t i = 0; i < member_.size(); ++i) {
    if (!table_.entries[i].active) continue;
    for (int64_t k = member_[i].written_begin; k < member_[i].written_end; ++k) {
      if (k + kFar < n) raiser.prefetch_object(written_[k + kFar].object);
      if (k + kNear < n) raiser.prefetch_counter(written_[k + kNear].object);
      raiser.raise(written_[k].object);
    }
  }
}

py::list Plan::counted_by_torch() const {
  py::list all;
  for (size_t i = 0; i < table_.entries.size(); ++i) {
    if (!table_.entries[i].active) continue;
    const Member& m = member_[i];
    if (counted_)
      for (int64_t k = m.written_begin; k < m.written_end; ++k) {
        const int index = written_[k].index;
        all.append(index < 0 ? shards_[-1 - index].dtensor : py::object((*counted_)[index]));
      }
    if (zero_grad_) all.append(grads_[i]);
    if (zero_grad_ && m.sharded) all.append(local_gradient(static_cast<int64_t>(i)));
  }
  return all;
}

void Plan::release() {
  refreshed_ = false;
  for (py::object& g : grads_) g = py::object();
  grad_shards_.clear();
}

// What needs the interpreter is done beside the kernels of short steps, and before those of long ones, so that other
// Python threads can run. run(on_caller) writes.
template <class Run>
void Plan::run_counted(const Run& run) {
  if (!refreshed_) throw std::runtime_error("a step must follow a refresh() that returned True");
  refreshed_ = false;
  struct Running {  // releases what was held for the kernels
    Plan& plan;
    explicit Running(Plan& p) : plan(p) { plan.running_ = true; }
    ~Running() {
      plan.running_ = false;
      plan.release();
      if (plan.zero_grad_) plan.counted_now_ = py::object();
    }
  } running(*this);
  const bool is_long = begin_part();
  if (zero_grad_) counted_now_ = counted_by_torch();  // gradients may be other objects in the same memory
  py::object result = py::none();
  const std::function<void()> raise = [&] {
    if (!counted_) raise_versions();
  };
  if (!is_long) {
    run([&] {
      raise();
      if (counted_now_)
        result = py::reinterpret_steal<py::object>(PyObject_CallOneArg(increment_version_.ptr(), counted_now_.ptr()));
    });
    if (!result) throw py::error_already_set();
  } else {
    if (counted_now_) increment_version_(counted_now_);
    py::gil_scoped_release release;
    run(raise);
  }
}

// Whether the coming part of a step may take long.
bool Plan::begin_part() {
  if (activity_changed_) {
    executor_->activity_changed();
    if (counted_) counted_now_ = counted_by_torch();
  }
  activity_changed_ = false;
  return executor_->begin_step(table_);
}

void Plan::run(int64_t stream, int64_t grad_scale, int64_t found_inf) {
  run_counted([&](const std::function<void()>& on_caller) {
    executor_->run(table_, {stream, grad_scale, found_inf}, on_caller);
  });
}

void Plan::update(int64_t stream, int64_t grad_scale, int64_t found_inf) {
  run_counted([&](const std::function<void()>& on_caller) {
    executor_->update(table_, {stream, grad_scale, found_inf});
    on_caller();
  });
}

void Plan::measure(std::optional<int> of_rule, int64_t stream, int64_t grad_scale) {
  if (of_rule && (*of_rule < 0 || *of_rule >= rule_.sums)) throw py::value_error("the rule asks for no such sum");
  if (!refreshed_) throw std::runtime_error("measure() must follow a refresh() that returned True");
  const bool is_long = begin_part();
  running_ = true;
  struct Done {
    Plan& plan;
    ~Done() { plan.running_ = false; }
  } done{*this};
  std::optional<py::gil_scoped_release> release;
  if (is_long) release.emplace();
  executor_->measure(table_, {stream, grad_scale, 0}, of_rule.value_or(kOfGradients), false);
}

void Plan::reduce(int64_t stream) {
  if (!refreshed_) throw std::runtime_error("reduce() must follow measure()");
  executor_->reduce(table_, {stream, 0, 0});
}

}  // namespace fusedoptim