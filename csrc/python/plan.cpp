// How a plan is made, and let go of.
#include "plan.h"

#include <unordered_set>

#include "make_executor.h"
#include "tensor_facts.h"

namespace fusedoptim {

using StableTensor = torch::stable::Tensor;

Plan::Plan(const std::string& rule, const std::vector<std::pair<std::string, int>>& hyper, py::object increment_version,
           std::pair<int, int> device, py::object launcher, std::tuple<int64_t, bool, bool> settings)
    : rule_(find_rule(rule.c_str())),
      info_(rule_ >= 0 ? rule_info(rule_) : throw py::value_error("no compiled rule is called '" + rule + "'")),
      device_{device.first, device.second},
      zero_grad_(std::get<2>(settings)),
      on_cpu_(launcher.is_none()),
      executor_(make_executor(
          rule_, launcher,
          {reinterpret_cast<NormStats*>(std::get<0>(settings)), std::get<1>(settings), std::get<2>(settings)})),
      increment_version_(std::move(increment_version)),
      params_key_(py::str("params")),
      lr_key_(py::str("lr")) {
  if (static_cast<int>(hyper.size()) + kFirstRuleHyper != info_.hypers)
    throw py::value_error("rule '" + rule + "' was compiled with another number of hyper-parameters");
  const auto interned = [](const char* key) {
    return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(key));
  };
  for (const auto& [key, index] : hyper) hyper_.emplace_back(interned(key.c_str()), index);
  for (const char* key : {"max_grad_norm", "clip_grad_value", "ema_decay"}) option_keys_.push_back(interned(key));
}

void Plan::build(py::list groups, py::dict state, const std::vector<int>& bindings, py::list dormant,
                 std::optional<py::list> counted) {
  if (!counted && !VersionCounters::known()) throw std::runtime_error("nobody has looked for the version counters yet");
  counted_ = std::move(counted);
  groups_ = groups;
  state_ = state;
  for (py::handle g : groups) {
    Group group;
    group.dict = py::reinterpret_borrow<py::object>(g);
    group.params = g[params_key_];
    group.begin = static_cast<int64_t>(params_.size());
    for (py::handle p : group.params) {
      params_.push_back(py::reinterpret_borrow<py::object>(p));
      Entry e;
      e.group = static_cast<int32_t>(group_.size());
      entries_.push_back(e);
    }
    group.end = static_cast<int64_t>(params_.size());
    group_.push_back(std::move(group));
  }
  member_.resize(params_.size());
  strides_.resize(params_.size());
  grads_.resize(params_.size());
  rows_.resize(group_.size());
  std::unordered_set<PyObject*> asleep;
  for (py::handle p : dormant) asleep.insert(p.ptr());
  for (size_t i = 0; i < params_.size(); ++i) {
    member_[i].param = params_[i].ptr();
    member_[i].dormant = asleep.count(params_[i].ptr()) > 0;
  }
  bindings_.resize(params_.size());
  const size_t width = 6 + info_.slots;
  if (bindings.size() % width != 0) throw std::runtime_error("a plan's bindings have another width");
  for (auto b = bindings.begin(); b != bindings.end(); b += width) bindings_.at(*b).assign(b + 1, b + width);
  for (size_t i = 0; i < group_.size(); ++i) {
    Group& g = group_[i];
    for (int64_t k = g.begin; k < g.end; ++k) g.ours = g.ours || !bindings_[k].empty();
    if (g.ours && !refresh_group(g, rows_[i])) throw py::value_error(reason_);
  }
  snapshot_.take(state);
  const TensorReader& reader = TensorReader::get();
  for (const py::object& x : snapshot_.held())
    plain_ = plain_ && (reader.is_plain(x.ptr()) || !reader.is_tensor(x.ptr()));
  for (size_t i = 0; i < params_.size(); ++i)
    plain_ = plain_ && (bindings_[i].empty() || reader.is_plain(params_[i].ptr()));
}

void Plan::bind(const std::vector<StableTensor>& tensors) {
  size_t dims = 0;
  for (const auto& b : bindings_)
    if (!b.empty()) dims += 2 * static_cast<size_t>(tensors.at(b[0]).dim());
  shapes_.reserve(dims);  // members point into it
  for (size_t i = 0; i < member_.size(); ++i)
    if (!bindings_[i].empty()) bind_member(static_cast<int64_t>(i), tensors, bindings_[i]);
  kept_.sort();
  bound_ = true;
}

void Plan::bind_member(int64_t i, const std::vector<StableTensor>& tensors, const std::vector<int>& binding) {
  Member& m = member_[i];
  Entry& e = entries_[i];
  const StableTensor& p = tensors.at(binding[0]);
  const auto sizes = to_vector(p.sizes()), strides = to_vector(p.strides());
  m.ndim = static_cast<int32_t>(sizes.size());
  m.shape = shapes_.data() + shapes_.size();
  shapes_.insert(shapes_.end(), sizes.begin(), sizes.end());
  shapes_.insert(shapes_.end(), strides.begin(), strides.end());
  e.numel = p.numel();
  e.param_dtype = dtype_of(p);
  e.param = addresses_.add(p);
  if (zero_grad_) kept_.add(e.param, e.param_dtype, m.ndim, m.shape, m.shape + m.ndim);
  m.memory = tensor_memory(p.get());
  m.written_begin = static_cast<int64_t>(written_.size());
  const auto writes = [&](int at) { written_.push_back({VersionCounters::object(tensors.at(at).get()), at}); };
  writes(binding[0]);
  const int variant = group_[e.group].variant;
  m.linear = e.numel <= 1 || dense(sizes, strides);
  m.logical = e.numel <= 1 || row_major(sizes, strides);
  m.ours = m.ready = true;
  for (int k = 0; k < kStates; ++k) {
    if (!info_.uses(variant, k)) continue;
    const int at = binding[k == kEma ? 1 + info_.slots : 1 + k];
    if (at < 0) {
      m.ready = false;
      continue;
    }
    const StableTensor& s = tensors.at(at);
    e.state_dtype[k] = dtype_of(s);
    e.state[k] = addresses_.add(s);
    writes(at);
    strides_[i].state[k] = to_vector(s.strides());
    if (zero_grad_) kept_.add(e.state[k], e.state_dtype[k], m.ndim, m.shape, strides_[i].state[k].data());
    if (e.numel > 1) m.linear = m.linear && same_strides(m.ndim, m.shape, strides.data(), strides_[i].state[k].data());
  }
  const int step = binding[2 + info_.slots], scalar = binding[3 + info_.slots];
  if (info_.has_step && step < 0) m.ready = false;
  if (info_.next_scalar_state && scalar < 0) m.ready = false;
  if (info_.has_step && step >= 0) {
    e.step_dtype = dtype_of(tensors.at(step));
    // Each by itself also where all are views of one buffer, as on a GPU: giving one of them other memory (.data =)
    // leaves no trace in what they share. 4 ns each.
    e.step = addresses_.add(tensors.at(step));
    writes(step);
  }
  if (info_.next_scalar_state && scalar >= 0) {
    e.scalar_state = static_cast<float*>(addresses_.add(tensors.at(scalar)));
    writes(scalar);
  }
  m.written_end = static_cast<int64_t>(written_.size());
  e.first = binding[4 + info_.slots] != 0;
}

int Plan::traverse(visitproc visit, void* arg) const {
  const auto visit_all = [&](const std::vector<py::object>& objects) {
    for (const py::object& x : objects) Py_VISIT(x.ptr());
    return 0;
  };
  for (const py::object* x : {&groups_, &state_, &increment_version_, &counted_now_}) Py_VISIT(x->ptr());
  for (const Group& g : group_) {
    Py_VISIT(g.dict.ptr());
    Py_VISIT(g.params.ptr());
    if (const int stop = visit_all(g.items)) return stop;
  }
  if (counted_) Py_VISIT(counted_->ptr());
  if (const int stop = visit_all(params_)) return stop;
  if (const int stop = visit_all(grads_)) return stop;
  return visit_all(snapshot_.held());
}

void Plan::retire() {
  clear();
  addresses_ = AddressBook();
}

void Plan::clear() {
  bound_ = false;
  groups_ = state_ = increment_version_ = counted_now_ = py::object();
  counted_.reset();
  group_.clear();
  member_.clear();
  params_.clear();
  grads_.clear();
  written_.clear();
  snapshot_.clear();
}

}  // namespace fusedoptim
