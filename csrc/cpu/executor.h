// Runs one step over a table of tensors on torch's own thread pool.
#pragma once

#include <functional>
#include <vector>

#include "../core/executor.h"
#include "../core/schedule.h"
#include "../rules/registry.h"
#include "kernels.h"

namespace fusedoptim {

class CpuExecutor : public Executor {
 public:
  explicit CpuExecutor(int rule) : rule_(rule), info_(rule_info(rule)) {}

  bool outdated() override;
  void prepare(Entry& entry, int variant) override;
  void activity_changed() override { scheduled_ = false; }
  bool takes_long(const std::vector<Entry>& entries) override;
  void run(std::vector<Entry>& entries, const std::vector<HyperRow>& rows, const OnDevice&,
           const std::function<void()>& on_caller) override;

 private:
  // A step of less than this is over before a second thread has woken up.
  static constexpr int64_t kSerialCost = 16384;
  // 8 MiB of fp32 gradients
  static constexpr int64_t kWindowElements = int64_t{2} << 20;

  // Releasing the interpreter and taking it back costs more than such a step.
  static constexpr int64_t kReleaseCost = int64_t{1} << 20;

  void reschedule(const std::vector<Entry>& entries);
  StepInputs inputs(const Entry& e, const std::vector<HyperRow>& rows, PowMemo* pow) const;
  template <class F>
  void parallel_chunks(const Window& w, const std::function<void()>* on_caller, const F& chunk) const;
  template <class F>
  void for_each_part(const std::vector<Entry>& entries, int64_t chunk, const F& part) const;
  void update_chunk(const std::vector<Entry>& entries, const std::vector<HyperRow>& rows, int64_t chunk) const;

  const int rule_;
  const RuleInfo& info_;
  const Kernels* kernels_ = nullptr;
  int threads_ = 0;
  bool scheduled_ = false;
  float unscale_ = 1;  // what all entries have
  Schedule schedule_;
  std::vector<double> partial_;         // tile sums of all gradients
  std::vector<int64_t> first_partial_;  // of each entry
};

}  // namespace fusedoptim
