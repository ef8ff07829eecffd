// How a plan is made, and let go of.
#include "plan.h"

#include <unordered_set>

#include "make_executor.h"
#include "tensor_facts.h"

namespace fusedoptim {

using StableTensor = torch::stable::Tensor;

Plan::Plan(const RuleHandle& rule, const std::vector<HyperArgs>& hyper, const std::vector<std::string>& states,
           const std::vector<std::string>& numbers, py::object increment_version, std::pair<int, int> device,
           py::object launcher, std::tuple<int64_t, bool, bool> settings)
    : rule_(rule),
      device_{device.first, device.second},
      zero_grad_(std::get<2>(settings)),
      on_cpu_(launcher.is_none()),
      executor_(make_executor(
          rule_, launcher,
          {reinterpret_cast<NormStats*>(std::get<0>(settings)), std::get<1>(settings), std::get<2>(settings)})),
      increment_version_(std::move(increment_version)),
      params_key_(py::str("params")) {
  check_names(hyper, states, numbers);
  for (const auto& [key, index, count, low, high, whole, off] : hyper) {
    auto interned = py::reinterpret_steal<py::object>(PyUnicode_InternFromString(key.c_str()));
    const int at = static_cast<int>(hyper_.size());
    hyper_.push_back({std::move(interned), index, count, at < kLrDType ? at : at + 1, low, high, whole, off});
  }
}

// A rule that was compiled from another declaration would take one number for another.
void Plan::check_names(const std::vector<HyperArgs>& hyper, const std::vector<std::string>& states,
                       const std::vector<std::string>& numbers) const {
  std::vector<std::string> declared, compiled{"lr"};
  for (const auto& [key, index, count, low, high, whole, off] : hyper)
    declared.push_back(index < 0 ? key : key + "[" + std::to_string(index) + "]");
  compiled.insert(compiled.end(), std::begin(kOptionKeys), std::end(kOptionKeys));
  for (const auto* names : {&states, &numbers}) declared.insert(declared.end(), names->begin(), names->end());
  for (const auto* names : {&rule_.hyper_names, &rule_.state_names, &rule_.number_names})
    compiled.insert(compiled.end(), names->begin(), names->end());
  if (declared == compiled) return;
  const auto list = [](const std::vector<std::string>& names) {
    std::string text;
    for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
    return text;
  };
  throw py::value_error("rule '" + rule_.name + "' declares " + list(declared) + ", but was compiled with " +
                        list(compiled));
}

void Plan::build(py::list groups, py::dict state, const std::vector<int>& bindings, py::list dormant,
                 std::optional<py::list> counted, py::object sums, bool wide, std::optional<ShardArgs> shards,
                 const std::vector<StoredArgs>& stored, py::list watched, const std::vector<double>& constants) {
  if (!constants.empty() && constants.size() != groups.size())
    throw py::value_error("a plan takes the numbers of constants for each of its groups");
  for (py::handle key : watched) watched_keys_.push_back(py::reinterpret_borrow<py::object>(key));
  PythonMemory::keep_sums(table_, std::move(sums));
  table_.wide = wide;
  if (shards) take_shards(*shards);
  if (!counted && !VersionCounters::known()) throw std::runtime_error("nobody has looked for the version counters yet");
  counted_ = std::move(counted);
  groups_ = groups;
  state_ = state;
  for (py::handle g : groups) {
    Group group;
    group.dict = py::reinterpret_borrow<py::object>(g);
    group.params = g[params_key_];
    if (!constants.empty()) group.constants = constants[group_.size()];
    for (const py::object& key : watched_keys_) {
      PyObject* value = PyDict_GetItem(g.ptr(), key.ptr());
      group.watched.push_back(value && PyDict_Check(value) ? py::reinterpret_steal<py::object>(PyDict_Copy(value))
                                                           : py::reinterpret_borrow<py::object>(value));
    }
    group.begin = static_cast<int64_t>(params_.size());
    for (py::handle p : group.params) {
      params_.push_back(py::reinterpret_borrow<py::object>(p));
      Entry e;
      e.group = static_cast<int32_t>(group_.size());
      table_.entries.push_back(e);
    }
    group.end = static_cast<int64_t>(params_.size());
    group_.push_back(std::move(group));
  }
  member_.resize(params_.size());
  strides_.resize(params_.size());
  grads_.resize(params_.size());
  table_.rows.resize(group_.size());
  std::unordered_set<PyObject*> asleep;
  for (py::handle p : dormant) asleep.insert(p.ptr());
  for (size_t i = 0; i < params_.size(); ++i) {
    member_[i].param = params_[i].ptr();
    member_[i].dormant = asleep.count(params_[i].ptr()) > 0;
  }
  stored_ = stored;
  stored_at_.assign(params_.size(), -1);
  for (size_t k = 0; k < stored_.size(); ++k) stored_at_.at(std::get<0>(stored_[k])) = static_cast<int>(k);
  bindings_.resize(params_.size());
  const size_t width = 5 + rule_.slots() + rule_.numbers();
  if (bindings.size() % width != 0) throw std::runtime_error("a plan's bindings have another width");
  for (auto b = bindings.begin(); b != bindings.end(); b += width) bindings_.at(*b).assign(b + 1, b + width);
  for (size_t i = 0; i < params_.size() && !shards_.empty(); ++i)  // later the interpreter is released
    if (!bindings_[i].empty() && shards_.at(bindings_[i][0]).object)
      table_.entries[i].whole_numel = params_[i].attr("numel")().cast<int64_t>();
  for (size_t i = 0; i < group_.size(); ++i) {
    Group& g = group_[i];
    for (int64_t k = g.begin; k < g.end; ++k) g.on_device = g.on_device || !bindings_[k].empty();
    if (g.on_device && !refresh_group(g, table_.rows[i])) throw py::value_error(reason_);
  }
  snapshot_.take(state);
  const TensorReader& reader = TensorReader::get();
  const auto is_plain = [&](PyObject* x) { return reader.is_plain(x) || shard_reader_.is_dtensor(x); };
  for (const py::object& x : snapshot_.held()) plain_ = plain_ && (is_plain(x.ptr()) || !reader.is_tensor(x.ptr()));
  for (const Shard& s : shards_) plain_ = plain_ && (!s.local || reader.is_plain(s.local.ptr()));
  for (size_t i = 0; i < params_.size(); ++i) plain_ = plain_ && (bindings_[i].empty() || is_plain(params_[i].ptr()));
}

void Plan::take_shards(const ShardArgs& args) {
  const auto& [cls, align, dtensors] = args;
  shard_reader_ = ShardReader(cls, align);
  for (py::handle x : dtensors) {
    Shard s{};
    if (!x.is_none()) {
      s.dtensor = py::reinterpret_borrow<py::object>(x);
      s.local = shard_reader_.local(x.ptr());
      s.spec = shard_reader_.spec(x.ptr());
      s.object = reinterpret_cast<const char*>(x.attr("_cdata").cast<uintptr_t>());
    }
    shards_.push_back(std::move(s));
  }
  for (const Shard& s : shards_)
    if (s.object) watched_.push_back({s.dtensor.ptr(), s.local.ptr(), s.spec.ptr()});
}

// A DTensor and its shard have version counters of their own. Those of a state's shard nobody has seen.
void Plan::writes(AtenTensorHandle tensor, int index, bool is_state) {
  const bool sharded = !shards_.empty() && shards_[index].object;
  if (!sharded || !is_state) written_.push_back({VersionCounters::object(tensor), index});
  if (sharded) written_.push_back({shards_[index].object, -1 - index});
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
  Entry& e = table_.entries[i];
  const StableTensor& p = tensors.at(binding[0]);
  const auto sizes = to_vector(p.sizes()), strides = to_vector(p.strides());
  m.ndim = static_cast<int32_t>(sizes.size());
  m.shape = shapes_.data() + shapes_.size();
  shapes_.insert(shapes_.end(), sizes.begin(), sizes.end());
  shapes_.insert(shapes_.end(), strides.begin(), strides.end());
  e.numel = p.numel();
  e.param().storage = storage_of(dtype_of(p));
  e.param().data = watch_.add(p);
  if (zero_grad_) kept_.add(e.param().data, element_size(p), m.ndim, m.shape, m.shape + m.ndim);
  m.memory = tensor_memory(p.get());
  m.written_begin = static_cast<int64_t>(written_.size());
  const auto writes = [&](int at) { this->writes(tensors.at(at).get(), at, at != binding[0]); };
  writes(binding[0]);
  if (!shards_.empty() && shards_[binding[0]].object) {
    m.sharded = true;
    m.memory = shards_[binding[0]].object;
    m.spec = shards_[binding[0]].spec.ptr();
  }
  if (!m.sharded) e.whole_numel = e.numel;
  e.variant = group_[e.group].variant;
  m.linear = e.numel <= 1 || dense(sizes, strides);
  m.logical = e.numel <= 1 || row_major(sizes, strides);
  m.on_device = e.ready = true;
  for (int k = 0; k < kStates; ++k) {
    if (!rule_.uses_state(e.variant, k)) continue;
    const int at = binding[k == kAverage ? 1 + rule_.slots() : 1 + k];
    if (at < 0) {
      e.ready = false;
      continue;
    }
    const StableTensor& s = tensors.at(at);
    Operand& o = e.state(k);
    o.storage = storage_of(dtype_of(s));
    o.data = watch_.add(s);
    writes(at);
    std::vector<int64_t>& own = strides_[i].of[kFirstState + k] = to_vector(s.strides());
    if (zero_grad_) kept_.add(o.data, element_size(s), m.ndim, m.shape, own.data());
    if (e.numel > 1) m.linear = m.linear && same_strides(m.ndim, m.shape, strides.data(), own.data());
  }
  const int* const behind = binding.data() + 2 + rule_.slots();
  const int step = *behind;
  if (rule_.has_step && step < 0) e.ready = false;
  if (step >= 0) {
    e.step_dtype = dtype_of(tensors.at(step));
    // Each by itself also where all are views of one buffer, as on a GPU: giving one of them other memory (.data =)
    // leaves no trace in what they share. 4 ns each.
    e.step = watch_.add(tensors.at(step));
    writes(step);
  }
  for (int k = 0; k < rule_.numbers(); ++k) {
    const int at = behind[1 + k];
    if (at == -1) e.ready = false;
    if (at < 0) continue;
    e.numbers[k] = static_cast<float*>(watch_.add(tensors.at(at)));
    writes(at);
  }
  if (stored_at_[i] >= 0) bind_stored(stored_[stored_at_[i]], tensors);
  m.written_end = static_cast<int64_t>(written_.size());
  e.first = behind[1 + rule_.numbers()] != 0;
}

void Plan::bind_stored(const StoredArgs& stored, const std::vector<StableTensor>& tensors) {
  const auto& [i, operands, row, id, first_index, index_strides] = stored;
  Member& m = member_[i];
  Entry& e = table_.entries[i];
  for (const auto& [k, storage, extra] : operands) {
    Operand& o = e.operand[k];
    o.storage = static_cast<Storage>(storage);
    if (extra < -1) e.ready = false;
    if (extra < 0) continue;
    const StableTensor& t = tensors.at(extra);
    o.extra = watch_.add(t);
    const auto sizes = to_vector(t.sizes()), strides = to_vector(t.strides());
    if (zero_grad_) kept_.add(o.extra, element_size(t), static_cast<int>(sizes.size()), sizes.data(), strides.data());
    writes(t.get(), extra, true);
  }
  e.row = row;
  if (row) m.linear = m.linear && m.logical;
  for (const Operand& o : e.operand) e.is_stochastic = e.is_stochastic || is_stochastic(o.storage);
  if (!e.is_stochastic) return;
  if (!e.step) e.ready = false;
  e.id = id;
  e.first_index = first_index;
  // Random bits go by places in the whole tensor: these follow each other in memory, or are looked up.
  const std::vector<int64_t> sizes(m.shape, m.shape + m.ndim);
  std::vector<int64_t>& own = strides_[i].of[kIndex];
  own.resize(m.ndim);
  int64_t expected = 1;
  for (int d = m.ndim; d-- > 0; expected *= sizes[d]) own[d] = expected;
  if (index_strides) own = *index_strides;
  m.linear = m.linear && m.logical && same_strides(m.ndim, m.shape, own.data(), m.shape + m.ndim);
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
  for (const Shard& s : shards_)
    for (const py::object* x : {&s.dtensor, &s.local, &s.spec}) Py_VISIT(x->ptr());
  for (const Member& m : member_) Py_VISIT(m.grad_spec.ptr());
  if (const int stop = visit_all(params_)) return stop;
  if (const int stop = visit_all(grads_)) return stop;
  return visit_all(snapshot_.held());
}

void Plan::retire() {
  clear();
  watch_ = StorageWatch();
}

void Plan::clear() {
  bound_ = false;
  groups_ = state_ = increment_version_ = counted_now_ = py::object();
  counted_.reset();
  group_.clear();
  member_.clear();
  params_.clear();
  grads_.clear();
  grad_shards_.clear();
  written_.clear();
  shards_.clear();
  watched_.clear();
  shard_reader_ = ShardReader();
  snapshot_.clear();
}

}  // namespace fusedoptim
