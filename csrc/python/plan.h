// A plan: the table of one optimizer's tensors on one device, kept in step with the Python objects it was made from.
//
// Making a plan takes microseconds per tensor and happens when something changed. Each step only checks that nothing
// did, by identity and address, and picks up gradients and hyper-parameters: tens of nanoseconds per tensor. Whatever
// a plan does not recognise makes refresh() return false before anything is written; Python then validates, explains
// what is wrong or makes a new plan.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <string>
#include <vector>

#include "../core/tensor_table.h"
#include "../cpu/executor.h"
#include "../cpu/kernels.h"
#include "gradient.h"

namespace fusedoptim {

namespace py = pybind11;

class Plan {
 public:
  // hyper: (group key, index into its value or -1) for each hyper-parameter of the rule after lr and its dtype.
  Plan(const std::string& rule, const std::vector<std::pair<std::string, int>>& hyper, py::object increment_version);

  // groups is optimizer.param_groups, state is optimizer.state. bindings has one tuple per parameter, in order:
  // indices into the list of tensors given to bind(), or -1 where there is none: (param, slots..., step,
  // scalar_state), then 1 if its states count as absent in the coming step. An empty tuple: not this plan's.
  void build(py::list groups, py::dict state, py::list bindings);
  void bind(std::vector<torch::stable::Tensor> tensors);

  // Picks up this step's gradients and hyper-parameters. False, for the given reason, if the plan no longer fits:
  // then make a new one.
  bool refresh(py::handle groups, py::handle state);
  // Steps all parameters that had a gradient in refresh().
  void run();

  const std::string& reason() const { return reason_; }
  int64_t address() const { return reinterpret_cast<int64_t>(this); }

 private:
  struct Operand {  // a tensor whose address is looked up at every step
    torch::stable::Tensor tensor;
    void** target;
    int64_t numel;
  };
  struct Member {  // what belongs to one parameter
    py::object param;
    std::vector<int64_t> sizes, strides;
    bool ours = false;    // on this plan's device
    bool ready = false;   // its states exist
    bool linear = false;  // parameter and states share one dense memory order
    std::vector<int64_t> state_strides[kMaxSlots];
    std::unique_ptr<Layout> layout;
    std::vector<int64_t> grad_strides;  // of the layout in use
  };
  struct Group {
    py::object dict, params;
    int64_t begin, end;  // its members
    int variant = 0;
  };
  struct StateItem {  // one (key, value) pair, held so that its address cannot be used again
    py::object key, value;
  };

  bool refresh_group(Group&, HyperRow&);
  bool same_state(py::handle state) const;
  bool same_addresses();
  bool refresh_gradient(int64_t i, const GradientView&);
  bool read_hyper(PyObject* value, double& out, LrDType* lr_dtype);
  void bind_member(int64_t i, const std::vector<torch::stable::Tensor>& tensors, const std::vector<int>& binding);
  bool no(const char* why);

  const int rule_;
  const RuleInfo& info_;
  CpuExecutor executor_;
  std::vector<std::pair<py::object, int>> hyper_;
  py::object increment_version_, params_key_, lr_key_;

  py::object groups_, state_;
  std::vector<Group> group_;
  std::vector<Member> member_;
  std::vector<std::vector<int>> bindings_;
  std::vector<StateItem> state_items_;               // of the outer dict
  std::vector<std::vector<StateItem>> tensor_items_;  // of each inner dict
  std::vector<Operand> operands_;

  std::vector<Entry> entries_;
  std::vector<HyperRow> rows_;
  std::vector<py::object> grads_;  // held while a step runs
  py::object active_params_;
  const Kernels* kernels_ = nullptr;
  int threads_ = 0;
  bool rescheduling_ = true, refreshed_ = false;
  std::string reason_;
};

}  // namespace fusedoptim
