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
  CpuExecutor(int rule, Settings settings) : rule_(rule), info_(rule_info(rule)), settings_(settings) {}

  bool outdated() override;
  void prepare(Entry& entry, int variant) override;
  void activity_changed() override { scheduled_ = false; }
  bool takes_long(const std::vector<Entry>& entries, const std::vector<HyperRow>& rows) override;
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
  // Sums the squares of the gradients of a window's tensors. `around` gives a group's composition.
  template <class F>
  void sum_squares(std::vector<Entry>& entries, const Window& w, const std::function<void()>* on_caller,
                   const F& around);
  double global_norm(std::vector<Entry>& entries, const Composition& unscaled);
  void compose(const std::vector<HyperRow>& rows, const Composition& unscaled, double norm, bool in_f64);
  void update(std::vector<Entry>& entries, const std::vector<HyperRow>& rows, const std::function<void()>& on_caller);
  void zero_gradients(const std::vector<Entry>& entries) const;
  template <class F>
  void parallel_chunks(const Window& w, const std::function<void()>* on_caller, const F& chunk) const;
  template <class F>
  void for_each_part(const std::vector<Entry>& entries, int64_t chunk, const F& part) const;
  void update_chunk(const std::vector<Entry>& entries, const std::vector<HyperRow>& rows, int64_t chunk) const;

  const int rule_;
  const RuleInfo& info_;
  const Settings settings_;
  const Kernels* kernels_ = nullptr;
  int threads_ = 0;
  bool scheduled_ = false;
  bool sums_ = false;                // partial_ has places for all tile sums
  bool measures_ = false;            // the step needs the norm of all gradients
  std::vector<Composition> around_;  // of each group
  Schedule schedule_;
  std::vector<double> partial_;         // tile sums of all gradients
  std::vector<int64_t> first_partial_;  // of each entry
};

}  // namespace fusedoptim
