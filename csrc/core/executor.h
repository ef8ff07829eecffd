// What a plan asks of a backend: to run steps over its table of tensors.
#pragma once

#include <cstdint>
#include <functional>

#include "step_table.h"

namespace fusedoptim {

// What a step is told beside its table: addresses on the device, as numbers.
struct LaunchInputs {
  int64_t stream = 0;
  int64_t grad_scale = 0;  // an fp32 number that gradients are divided by, or 0
  int64_t found_inf = 0;   // an fp32 number: nothing is to change unless it is 0. Or 0
};

// Of what squares are summed: of gradients as they come out of unscaling, for their common norm; else of what the rule
// asks for with this number, counted from 0.
inline constexpr int kOfGradients = -1;

class Executor {
 public:
  virtual ~Executor() = default;

  // Looks at what is outside of the table (threads, instruction set). Whether every entry has to be prepared anew.
  virtual bool sync_threads_and_isa() { return false; }
  // Call for an entry whose storage or layout changed, and for all before the first step. False if nothing is compiled
  // that could step it.
  virtual bool prepare(Entry& entry) = 0;
  // Call when an entry began or ceased to be active.
  virtual void activity_changed() {}

  // Whether a learning rate that is a tensor on the device is handed over by its address.
  virtual bool reads_lr_on_device() const { return false; }

  // Whether a CUDA graph may read its tables, so that it has to be kept.
  virtual bool captured() const { return false; }

  // Call before a step. Whether it may take so long that the interpreter should be released for it.
  virtual bool begin_step(const StepTable& table) = 0;

  // A whole step: measures and reduces where it has to know the norm of all gradients, then updates; in one pass or
  // launch each. on_caller runs once on the calling thread, while the work goes on elsewhere.
  virtual void run(StepTable& table, const LaunchInputs& inputs, const std::function<void()>& on_caller) = 0;

  // The parts of a step, for whoever has something to do between them, as adding the sums of other processes:
  // writes every active entry's sum of squares to its row of table.sums, and 0 for all others: of gradients, or of that
  // sum of the rule, in their order from 0 on, as one pass may measure them all; reduces as well, if it is told to;
  virtual void measure(StepTable& table, const LaunchInputs& inputs, int of_rule, bool reduces) = 0;
  // makes the norm of all gradients of the first row of table.sums, and counts a step that is to be skipped for it;
  virtual void reduce(StepTable& table, const LaunchInputs& inputs) = 0;
  // updates all active entries and their step counts, with that norm, and for a rule with sums with table.sums.
  virtual void update(StepTable& table, const LaunchInputs& inputs) = 0;
};

}  // namespace fusedoptim
