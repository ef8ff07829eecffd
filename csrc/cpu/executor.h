// Runs one step over a table of tensors on torch's own thread pool.
#pragma once

#include <functional>
#include <vector>

#include "../core/schedule.h"
#include "../core/tensor_table.h"
#include "../rules/registry.h"

namespace fusedoptim {

class CpuExecutor {
 public:
  explicit CpuExecutor(int rule) : rule_(rule_info(rule)) {}

  // Call when the set of active entries or their sizes and layouts change. Allocates; run() does not.
  void reschedule(const std::vector<Entry>& entries);

  // Updates all active entries and stores their step counts. on_caller runs once on the calling thread, while the
  // other threads already work.
  void run(std::vector<Entry>& entries, const std::vector<HyperRow>& rows, const std::function<void()>& on_caller);

  int64_t cost() const { return schedule_.cost; }

 private:
  // A step of less than this is over before a second thread has woken up.
  static constexpr int64_t kSerialCost = 16384;
  // 8 MiB of fp32 gradients
  static constexpr int64_t kWindowElements = int64_t{2} << 20;

  StepInputs inputs(const Entry& e, const std::vector<HyperRow>& rows, PowMemo* pow) const;
  template <class F>
  void parallel_chunks(const Window& w, const std::function<void()>* on_caller, const F& chunk) const;
  template <class F>
  void for_each_part(const std::vector<Entry>& entries, int64_t chunk, const F& part) const;
  void update_chunk(const std::vector<Entry>& entries, const std::vector<HyperRow>& rows, int64_t chunk) const;

  const RuleInfo& rule_;
  Schedule schedule_;
  std::vector<double> partial_;         // tile sums of all gradients
  std::vector<int64_t> first_partial_;  // of each entry
};

}  // namespace fusedoptim
