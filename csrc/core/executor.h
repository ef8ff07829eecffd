// What a plan asks of a backend: to run steps over its table of tensors.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "composition.h"
#include "tensor_table.h"

namespace fusedoptim {

// Addresses on the device, as numbers.
struct OnDevice {
  int64_t stream = 0;
  int64_t grad_scale = 0;  // an fp32 number that gradients are divided by, or 0
  int64_t found_inf = 0;   // an fp32 number: nothing is to change unless it is 0. Or 0
};

class Executor {
 public:
  virtual ~Executor() = default;

  // Whether something outside the table changed (threads, instruction set), so that every entry has to be prepared
  // anew.
  virtual bool outdated() { return false; }
  // Call for an entry whose dtypes or layout changed, and for all before the first run.
  virtual void prepare(Entry& entry, int variant) = 0;
  // Call when an entry began or ceased to be active.
  virtual void activity_changed() {}

  // Whether a learning rate that is a tensor on the device is handed over by its address.
  virtual bool reads_lr_on_device() const { return false; }

  // Whether a CUDA graph may read its tables, so that it has to be kept.
  virtual bool captured() const { return false; }

  // Call before run(). Whether it may take so long that the interpreter should be released for it.
  virtual bool takes_long(const std::vector<Entry>& entries, const std::vector<HyperRow>& rows) = 0;
  // Updates all active entries and stores their step counts. on_caller runs once on the calling thread, while the work
  // goes on elsewhere.
  virtual void run(std::vector<Entry>& entries, const std::vector<HyperRow>& rows, const OnDevice& on_device,
                   const std::function<void()>& on_caller) = 0;
};

}  // namespace fusedoptim
