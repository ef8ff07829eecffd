// Runs steps on a GPU: keeps the kernels' tables in its memory and hands each step's gradients and hyper-parameters
// over, by value where they fit.
#pragma once

#include <initializer_list>
#include <memory>
#include <utility>
#include <vector>

#include "../core/executor.h"
#include "device.h"
#include "work_list.h"

namespace fusedoptim::gpu {

class GpuExecutor : public Executor {
 public:
  GpuExecutor(const RuleHandle& rule, std::unique_ptr<Device> device, StepSettings settings)
      : rule_(rule), device_(std::move(device)), settings_(settings) {}

  bool prepare(Entry&) override {
    tables_valid_ = false;
    return true;  // what is missing is compiled when tables are made
  }
  bool reads_lr_on_device() const override { return true; }
  bool captured() const override { return captured_any_; }
  bool begin_step(const StepTable&) override { return false; }
  void run(StepTable& table, const LaunchInputs& inputs, const std::function<void()>& on_caller) override;
  void measure(StepTable& table, const LaunchInputs& inputs, int of_rule, bool reduces) override;
  void reduce(StepTable& table, const LaunchInputs& inputs) override;
  void update(StepTable& table, const LaunchInputs& inputs) override;

 private:
  // Of tensors with operands of up to 32 bits and of those with 64, what measures and what updates; and what reduces.
  enum Launch { kMeasure, kMeasureWide, kUpdate, kUpdateWide, kReduce, kLaunches };
  struct Ready {  // a launch that is ready
    WorkList list;
    Program program;
    const uint32_t *first_item = nullptr, *segment_of = nullptr;  // on the device
    const Segment* segments = nullptr;
  };

  // ---- executor.cpp: tables, made when something changed ----
  void make_tables(const StepTable& table, void* stream);
  void make_control(const std::vector<Entry>& entries, void* stream);
  void find_kinds(const std::vector<Entry>& entries);
  void make_work_lists(const std::vector<Entry>& entries);
  TableEntry table_entry(const Entry& e, size_t i);
  int64_t add_layout(const Layout& l, Variant variant);
  Kind kind_of(const Entry& e) const;
  int64_t summed_bytes(const Entry& e) const;
  Memory allocate(int64_t bytes, void* stream);

  // ---- executor_step.cpp: every step ----
  const StepHeader* begin(StepTable& table, const LaunchInputs& inputs, bool measures, int32_t flags, int32_t sum = 0);
  void note_use(Memory& memory, void* stream);
  void gather_words(const StepTable& table);
  void pack_by_value(int64_t entries, void* stream);
  const StepHeader* pack_in_memory(int64_t entries, void* stream);
  const uint64_t* table_of_words(std::vector<uint64_t>& last, const uint64_t* words, int64_t count, int64_t offset,
                                 void* stream);
  void choose(const Ready& ready);
  void launch(std::initializer_list<Launch> launches, const StepHeader* headers, void* stream);

  const RuleHandle rule_;
  const std::unique_ptr<Device> device_;
  const StepSettings settings_;

  bool tables_valid_ = false;
  bool measures_ = false;          // the tables serve what measures, too
  bool control_measures_ = false;  // and so do the counters
  Tables tables_{};
  Memory table_memory_, control_memory_, words_memory_, sums_memory_;
  bool capturing_ = false, captured_any_ = false;
  std::vector<Memory> captured_;        // tables of captured steps, which a graph may read as long as this lives
  std::vector<int64_t> first_partial_;  // of each entry, in elements
  std::vector<int32_t> first_node_;
  std::vector<char> wide_;      // of each entry: whether an operand has 64 bits
  std::vector<Kind> kinds_[2];  // of entries of up to 32 bits and of 64, each once, in order
  std::vector<int64_t> layouts_;
  Ready ready_[kLaunches];

  std::vector<uint64_t> words_;                           // a step's gradients, then its hyper-parameters
  std::vector<uint64_t> uploaded_grads_, uploaded_rows_;  // or all of `words_` in the first, if none go by value
  StepArgs args_{};
};

}  // namespace fusedoptim::gpu
