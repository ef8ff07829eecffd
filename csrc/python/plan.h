// A plan: the table of one optimizer's tensors on one device, kept in step with the Python objects it was made from.
//
// Making a plan takes microseconds per tensor and happens when something changed. Each step only checks that nothing
// did, by identity and address, and picks up gradients and hyper-parameters: about 100 ns per tensor. Whatever a plan
// does not recognise makes refresh() return false before anything is written; Python then validates, explains what is
// wrong or makes a new plan.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../core/executor.h"
#include "../rules/rule_handle.h"
#include "dict_version.h"
#include "memory_ranges.h"
#include "prefetch.h"
#include "pybind.h"
#include "shard_reader.h"
#include "state_snapshot.h"
#include "storage_watch.h"
#include "tensor_hand_over.h"
#include "tensor_reader.h"
#include "version_counter.h"

namespace fusedoptim {

namespace py = pybind11;

class Plan {
 public:
  // A group's key, the index into its value or -1, of how many, the least and the largest number that is accepted,
  // whether it must be whole, and the number of a group without the key, if there may be such.
  using HyperArgs = std::tuple<std::string, int, int, double, double, bool, std::optional<double>>;
  using ShardArgs = std::tuple<py::object, py::object, py::list>;
  // How a parameter and its states are stored, where that is more than their dtypes: its position among all; operands,
  // each with its storage and the tensor that it keeps beside, -1 without such, -2 if that is to come; elements in a
  // row of what is in blocks, or 0; for random bits its id, the place of its first element in the whole tensor, and
  // that tensor's strides where they are not its own.
  using OperandArgs = std::tuple<int, int, int>;
  using StoredArgs =
      std::tuple<int, std::vector<OperandArgs>, int64_t, uint64_t, int64_t, std::optional<std::vector<int64_t>>>;
  // What no program of the rule has a loop for: which program, whether it computes in fp64, the storages of parameter,
  // gradient and states, -1 for one that it does not use, and whether that takes the loop over tiles.
  using Lacking = std::tuple<int, bool, std::vector<int>, bool>;
  // hyper: all that a step reads of a group, in the order of a rule's rows, which have lr's dtype after lr; states: the
  // rule's, with the parameter's shape; numbers: those that are one number. Their names have to be the compiled rule's.
  // device: whose tensors it steps, as DLPack names it. launcher: see make_executor.h.
  // settings: the address of the optimizer's NormStats on the device, skip_nonfinite, zero_grad.
  Plan(const RuleHandle& rule, const std::vector<HyperArgs>& hyper, const std::vector<std::string>& states,
       const std::vector<std::string>& numbers, py::object increment_version, std::pair<int, int> device,
       py::object launcher, std::tuple<int64_t, bool, bool> settings);

  // groups is optimizer.param_groups, state is optimizer.state. bindings has, one after another, for each parameter
  // that this plan steps: its position among all, then indices into the list of tensors that is handed over then, or -1
  // where there is none (param, slots..., ema, step, numbers...), -2 for a number that its group does without, then 1
  // if its states count as absent in the coming step. dormant: parameters that no plan steps, for as long as they have
  // no gradient. counted: that list, to have torch's own function raise their version counters; None if they can be
  // raised here. sums, wide: see StepTable. The former is a tensor of rows with an fp64 number per parameter, and one
  // more, on the device. shards: for parameters that are DTensors: see ShardReader, and for each tensor in that list
  // its DTensor or None. watched: keys of groups whose values must stay as they are. constants: for each group a number
  // that stands for those values in guards (core/guard.h); 0 for all if there are none.
  void build(py::list groups, py::dict state, const std::vector<int>& bindings, py::list dormant,
             std::optional<py::list> counted, py::object sums, bool wide, std::optional<ShardArgs> shards,
             const std::vector<StoredArgs>& stored, py::list watched, const std::vector<double>& constants);

  // Picks up this step's gradients and hyper-parameters. False, for the given reason, if the plan no longer fits:
  // then make a new one. Where that is for want of a loop, lacking() has all that is wanted, each once.
  bool refresh(py::handle groups, py::handle state);
  // Lets go of what refresh() picked up, for a step that does not come.
  void release();
  // Steps all parameters that had a gradient in refresh(). On a GPU: the addresses of the stream and of two fp32
  // numbers on the device, each may be 0: gradients are divided by the scale, and nothing changes if found_inf is not
  // 0.
  void run(int64_t stream, int64_t grad_scale, int64_t found_inf);
  // The parts of a step (Executor's), in this order: measure() and reduce() as often as needed, update() once.
  void measure(std::optional<int> of_rule, int64_t stream, int64_t grad_scale);
  void reduce(int64_t stream);
  void update(int64_t stream, int64_t grad_scale, int64_t found_inf);

  // For Python's garbage collector: visits, or lets go of, every Python object that is held.
  int traverse(visitproc visit, void* arg) const;
  void clear();
  // Lets go of everything but the tables that a captured CUDA graph reads.
  void retire();

  const std::string& reason() const { return reason_; }
  const std::vector<Lacking>& lacking() const { return lacking_; }
  // Whether a CUDA graph has captured a step, and with it the addresses of this plan's tables.
  bool captured() const { return executor_->captured(); }
  // Under which the tensors are handed over: tensor_hand_over.h.
  int64_t number() const { return hand_over_.number(); }

 private:
  struct Member {  // a parameter, as refresh() needs it
    PyObject* param = nullptr;
    const char* memory = nullptr;              // for prefetching
    int64_t* shape = nullptr;                  // its sizes, then its strides
    PyObject* last_grad = nullptr;             // of the last step: perhaps gone, so only to be prefetched
    const int64_t* last_grad_sizes = nullptr;  // likewise
    PyObject* last_dtensor = nullptr;          // likewise, if that was one's shard
    int32_t ndim = 0;
    int64_t written_begin = 0, written_end = 0;  // in written_: what a step writes to
    PyObject* spec = nullptr;                    // of a DTensor: how it is placed
    py::object grad_spec;                        // of its last gradient, which was placed alike
    bool sharded = false;                        // a DTensor
    bool on_device = false;                      // in this plan's table
    bool dormant = false;                        // in no plan's
    bool linear = false;                         // parameter and states share one dense memory order
    bool logical = false;                        // which is the logical one
    bool prepared = false;                       // by the executor, for the gradient's dtype and layout
  };
  struct Strides {                      // of a member whose operands may differ in memory order
    std::vector<int64_t> of[kStrides];  // the parameter's are Member::shape's
    std::unique_ptr<Layout> layout;
  };
  struct Hyper {
    py::object key;
    int index;  // which of the `count` that are the key's value; -1 if that is one number
    int count;
    int column;  // of a row
    double low, high;
    bool whole;
    std::optional<double> off;
    // A NaN is in no range.
    bool accepts(double x) const { return low <= x && x <= high && (!whole || x == std::floor(x)); }
    bool none_is_off() const { return off == -1.0; }
  };
  struct Written {
    const char* object;  // see VersionCounters
    int index;           // of the tensor that was handed over; below 0, -1 - index, of its DTensor
  };
  struct Shard {
    py::object dtensor, local, spec;
    const char* object;  // the DTensor's
  };
  struct Group {
    py::object dict, params;
    int64_t begin, end;    // its members
    double constants = 0;  // see build()
    Variant variant;
    bool on_device = false;         // has members on this plan's device
    std::vector<py::object> items;  // key, value, ... of dict, if no value that matters can change in place
    // The values of watched keys, null where there is none; of dicts copies, because they may be written to.
    std::vector<py::object> watched;
    uint64_t version = 0;  // of dict
    bool unchanged();
  };

  bool refresh_all(py::handle groups, py::handle state);
  bool refresh_python(py::handle groups, py::handle state);
  bool refresh_group(Group&, HyperRow&);
  bool refresh_gradient(int64_t i, const TensorView&);
  PyObject* shard_of_gradient(int64_t i);
  py::object local_gradient(int64_t i) const;
  bool shards_unchanged() const;
  void take_shards(const ShardArgs& args);
  void writes(AtenTensorHandle tensor, int index, bool is_state);
  bool written_apart();
  bool watched_unchanged(const Group& g, bool& immutable) const;
  bool read_hyper(PyObject* dict, const Hyper&, double* row, bool& immutable);
  bool read_number(PyObject* value, const Hyper&, double* row);
  bool read_tensor(PyObject* value, const Hyper&, double* row);
  void bind(const std::vector<torch::stable::Tensor>& tensors);
  void bind_member(int64_t i, const std::vector<torch::stable::Tensor>& tensors, const std::vector<int>& binding);
  void bind_stored(const StoredArgs& stored, const std::vector<torch::stable::Tensor>& tensors);
  void prefetch_gradients(int64_t i) const;
  void raise_versions() const;
  py::list counted_by_torch() const;
  void check_names(const std::vector<HyperArgs>& hyper, const std::vector<std::string>& states,
                   const std::vector<std::string>& numbers) const;
  void note_lacking(const Entry& e);
  bool begin_part();
  template <class Run>
  void run_counted(const Run& run);
  bool stale(const char* why);  // false

  const RuleHandle rule_;
  const dlpack::Device device_;
  const bool zero_grad_;
  const bool on_cpu_;  // the CPU's kernels run the steps
  const std::unique_ptr<Executor> executor_;
  std::vector<Hyper> hyper_;
  py::object increment_version_, params_key_;

  py::object groups_, state_;
  std::vector<Group> group_;
  std::vector<Member> member_;
  std::vector<Strides> strides_;
  std::vector<int64_t> shapes_;  // what Member::shape points into
  std::vector<std::vector<int>> bindings_;
  std::vector<StoredArgs> stored_;
  std::vector<int> stored_at_;  // of each parameter, where in stored_; or -1
  std::vector<py::object> watched_keys_;
  StateSnapshot snapshot_;
  StorageWatch watch_;
  bool bound_ = false;

  StepTable table_;
  std::vector<py::object> params_, grads_;  // grads are held from refresh() to the end of run()
  std::vector<py::object> grad_shards_;     // of those that were looked at closely, likewise
  std::vector<Written> written_;
  std::optional<py::list> counted_;
  py::object counted_now_;  // what increment_version_ is told of in the coming step
  ShardReader shard_reader_;
  std::vector<Shard> shards_;  // by the tensor that was handed over; empty if there is no DTensor
  struct Watched {
    PyObject *dtensor, *local, *spec;
  };
  std::vector<Watched> watched_;  // the same side by side, of those that are any
  bool plain_ = true;             // no tensor that was handed over is of a subclass, whose sizes may be Python code
  bool activity_changed_ = true, refreshed_ = false, running_ = false;
  // For gradients that are written to. Who makes a plan has looked at those of its first step.
  bool grads_checked_ = true, grads_moved_ = false;
  MemoryRanges kept_, written_ranges_;  // parameters and states; gradients
  std::string reason_;
  std::vector<Lacking> lacking_;
  TensorHandOver hand_over_{[this](const TensorHandOver::Tensors& tensors) { bind(tensors); }};
};

// Strides of dimensions of size 1 mean nothing.
inline bool same_strides(int ndim, const int64_t* sizes, const int64_t* a, const int64_t* b) {
  for (int d = 0; d < ndim; ++d)
    if (sizes[d] != 1 && a[d] != b[d]) return false;
  return true;
}

}  // namespace fusedoptim
