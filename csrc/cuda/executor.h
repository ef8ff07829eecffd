// Runs steps on a GPU: keeps the kernels' tables in its memory and hands each step's gradients and hyper-parameters
// over, by value where they fit.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "../core/executor.h"
#include "../rules/registry.h"
#include "launcher.h"

namespace fusedoptim::cuda {

// The segments of one launch.
struct Grid {
  bool norms = false, mixed = false;  // it sums squares for the norm of all gradients; may hold operands of 64 bits

  std::vector<Segment> segments;
  std::vector<uint64_t> kinds;  // of the entries, each once, in order
  std::vector<uint32_t> first_item{0}, segment_of;
  int64_t items = 0;

  void add(int32_t entry, Work work, int64_t count);
  void add_kind(uint64_t kind);
};

class GpuExecutor : public Executor {
 public:
  GpuExecutor(int rule, std::unique_ptr<Launcher> launcher, Settings settings);

  void prepare(Entry&, int) override { tables_valid_ = false; }
  bool reads_lr_on_device() const override { return true; }
  bool captured() const override { return captured_any_; }
  bool takes_long(const std::vector<Entry>&, const std::vector<HyperRow>&) override { return false; }
  void run(std::vector<Entry>& entries, const std::vector<HyperRow>& rows, const OnDevice& on_device,
           const std::function<void()>& on_caller) override;

 private:
  void make_control(const std::vector<Entry>& entries, void* stream);
  Memory allocate(int64_t bytes, void* stream);
  void note_use(Memory& memory, void* stream);
  void make_tables(const std::vector<Entry>& entries, const std::vector<HyperRow>& rows, void* stream);
  void make_elementwise_grids(const std::vector<Entry>& entries);
  void make_norm_grids(const std::vector<Entry>& entries);
  void make_global_norm_grids(const std::vector<Entry>& entries);
  bool steppable(const Entry& e, int variant) const;
  bool mixed(const Entry& e, int variant) const;
  int64_t add_layout(const Layout& l, int variant);
  void gather_words(const std::vector<Entry>& entries, const std::vector<HyperRow>& rows);
  void pack_by_value(int64_t entries, void* stream);
  const StepHeader* pack_in_memory(int64_t entries, void* stream);
  void choose_grid(size_t g);
  void launch_all(const StepHeader* headers, void* stream);
  const uint64_t* table_of_words(std::vector<uint64_t>& last, const uint64_t* words, int64_t count, int64_t offset,
                                 void* stream);

  const int rule_;
  const RuleInfo& info_;
  const std::unique_ptr<Launcher> launcher_;
  const Settings settings_;

  bool tables_valid_ = false;
  bool sums_all_ = false;          // the tables serve the norm of all gradients as well
  bool control_sums_all_ = false;  // and so do the counters
  Tables tables_{};
  Memory table_memory_, control_memory_, words_memory_;
  bool capturing_ = false, captured_any_ = false;
  std::vector<Memory> captured_;        // tables of captured steps, which a graph may read as long as this lives
  std::vector<int64_t> first_partial_;  // of each entry, in elements
  std::vector<int32_t> first_node_;
  std::vector<int> variant_;
  std::vector<int64_t> layouts_;
  // In the order of their launches: those of norms first, tensors of up to 32 bits before those with operands of 64.
  static constexpr size_t kGrids = 4;
  Grid grid_[kGrids];
  const uint32_t *first_item_[kGrids] = {}, *segment_of_[kGrids] = {};
  const Segment* segments_[kGrids] = {};

  std::vector<uint64_t> words_;                           // a step's gradients, then its hyper-parameters
  std::vector<uint64_t> uploaded_grads_, uploaded_rows_;  // or all of `words_` in the first, if none go by value
  StepArgs args_{};
};

}  // namespace fusedoptim::cuda
