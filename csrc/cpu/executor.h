// Runs one step over a table of tensors on torch's own thread pool.
#pragma once

#include <functional>
#include <vector>

#include "../core/executor.h"
#include "../rules/rule_handle.h"
#include "kernels.h"
#include "schedule.h"

namespace fusedoptim {

class CpuExecutor : public Executor {
 public:
  CpuExecutor(const RuleHandle& rule, StepSettings settings) : rule_(rule), settings_(settings) {}

  bool sync_threads_and_isa() override;
  bool prepare(Entry& entry) override;
  void activity_changed() override { scheduled_ = false; }
  bool begin_step(const StepTable& table) override;
  void run(StepTable& table, const LaunchInputs& inputs, const std::function<void()>& on_caller) override;
  void measure(StepTable& table, const LaunchInputs& inputs, int of_rule, bool reduces) override;
  void reduce(StepTable& table, const LaunchInputs& inputs) override;
  void update(StepTable& table, const LaunchInputs& inputs) override;

 private:
  using Caller = const std::function<void()>*;  // what runs beside the work; null for nothing
  void reschedule(const StepTable& table);
  bool skips(const LaunchInputs& inputs) const;
  void set_transforms(const StepTable& table, const LaunchInputs& inputs, bool of_rule);
  struct SumsOf {  // gradients, or what the rule asks for
    bool of_rule;
    int count;
  };
  // Null for a rule whose sum is that of the gradient, transformed.
  MeasureFn measure_of(const Entry& e) const;
  void sum_squares(StepTable& table, const Window& w, SumsOf which, Caller on_caller);
  // sums: whether the squares that a rule asks for are summed here, window by window.
  void update(StepTable& table, const LaunchInputs& inputs, bool sums, Caller on_caller);
  void update_windows(StepTable& table, bool sums, Caller on_caller);
  void commit(StepTable& table) const;
  void zero_gradients(const StepTable& table) const;
  template <class F>
  void parallel_chunks(const Window& w, Caller on_caller, const F& chunk) const;
  template <class F>
  void for_each_part(const std::vector<Entry>& entries, int64_t chunk, const F& part) const;
  void update_chunk(const StepTable& table, int64_t chunk) const;

  const RuleHandle rule_;
  const StepSettings settings_;
  const Kernels* kernels_ = nullptr;
  int threads_ = 0;
  bool scheduled_ = false;
  std::vector<GroupTransforms> transforms_;  // of each group
  Schedule schedule_;
  std::vector<double> partial_;         // tile sums of all tensors, for each sum that a rule asks for
  int64_t partials_ = 0;                // of one of these
  std::vector<int64_t> first_partial_;  // of each entry
};

}  // namespace fusedoptim
