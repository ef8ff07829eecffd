// How a plan sees, before every step, that nothing has changed, and picks up gradients.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <exception>
#include <thread>

#include "../cpu/mixes.h"
#include "plan.h"

namespace fusedoptim {

bool Plan::stale(const char* why) {
  reason_ = why;
  return false;
}

// Items are compared by identity, which for numbers and tuples of them means equality.
bool Plan::Group::unchanged() {
  if (items.empty()) return false;
  const uint64_t now = dict_version(dict.ptr());
  if (now != 0 && now == version) return true;
  if (PyDict_Size(dict.ptr()) * 2 != static_cast<Py_ssize_t>(items.size())) return false;
  const py::object* expected = items.data();
  PyObject *key, *value;
  Py_ssize_t at = 0;
  while (PyDict_Next(dict.ptr(), &at, &key, &value))
    if (key != (expected++)->ptr() || value != (expected++)->ptr()) return false;
  version = now;
  return true;
}

bool Plan::refresh_gradient(int64_t i, const TensorView& g) {
  Member& m = member_[i];
  Entry& e = table_.entries[i];
  if (!e.ready) return stale("a parameter has a gradient for the first time");
  if (!(g.device == device_)) return stale("a gradient is on another device");
  if (!g.data && e.numel > 0) return stale("a gradient has no memory");
  if (g.ndim != m.ndim) return stale("a gradient's shape differs from its parameter's");
  for (int d = 0; d < g.ndim; ++d)
    if (g.sizes[d] != m.shape[d]) return stale("a gradient's shape differs from its parameter's");
  const bool linear = m.linear && (e.numel <= 1 || same_strides(m.ndim, m.shape, g.strides, m.shape + m.ndim));
  const bool plain = linear && m.logical;
  std::unique_ptr<Layout>& layout = strides_[i].layout;
  bool changed = !m.prepared || e.grad().storage != storage_of(g.dtype) || linear != (e.layout == nullptr);
  std::vector<int64_t>& strides = strides_[i].of[kGrad];
  changed = changed || (!plain && !same_strides(g.ndim, g.sizes, g.strides, strides.data()));
  grads_moved_ = grads_moved_ || changed || e.grad().data != g.data;
  if (!plain && changed) {
    layout = std::make_unique<Layout>();
    strides.assign(g.strides, g.strides + g.ndim);
    layout->sizes.assign(m.shape, m.shape + m.ndim);
    for (int k = 0; k < kStrides; ++k) layout->strides[k] = strides_[i].of[k];
    layout->strides[kParam].assign(m.shape + m.ndim, m.shape + 2 * m.ndim);
    layout->simplify();
  }
  e.grad().data = g.data;
  if (changed) {
    e.grad().storage = storage_of(g.dtype);
    e.layout = linear ? nullptr : layout.get();
    e.sum_layout = plain ? nullptr : layout.get();
    m.prepared = executor_->prepare(e);
    if (!m.prepared) note_lacking(e);
  }
  return true;
}

void Plan::note_lacking(const Entry& e) {
  const uint32_t states = rule_.programs[e.variant.program].states;
  std::vector<int> storages{static_cast<int>(e.param().storage), static_cast<int>(e.grad().storage)};
  for (int k = 0; k < rule_.slots(); ++k)
    storages.push_back(states >> k & 1 ? static_cast<int>(e.state(k).storage) : -1);
  Lacking lacking{e.variant.program, e.compute_dtype() == DType::f64, std::move(storages),
                  needs_tiles(e, states, rule_.second_moment)};
  if (std::find(lacking_.begin(), lacking_.end(), lacking) == lacking_.end()) lacking_.push_back(std::move(lacking));
}

// Of a DTensor's gradient as its parameter is placed; what comes in another way is replaced by such. Held by grads_.
// Null if it cannot be.
PyObject* Plan::shard_of_gradient(int64_t i) {
  Member& m = member_[i];
  py::object& grad = grads_[i];
  const TensorReader& reader = TensorReader::get();
  if (!shard_reader_.is_dtensor(grad.ptr())) return nullptr;
  PyObject* const known = shard_reader_.local_if(grad.ptr(), m.spec, m.grad_spec.ptr());
  if (known && reader.is_plain(known)) return known;
  py::object aligned = shard_reader_.align(m.param, grad.ptr());
  if (!shard_reader_.is_dtensor(aligned.ptr())) return nullptr;
  if (aligned.ptr() != grad.ptr()) {
    reader.set_grad(m.param, aligned.ptr());
    grad = std::move(aligned);
  }
  m.grad_spec = shard_reader_.spec(grad.ptr());
  grad_shards_.push_back(shard_reader_.local(grad.ptr()));
  return grad_shards_.back().ptr();
}

py::object Plan::local_gradient(int64_t i) const {
  return member_[i].sharded ? shard_reader_.local(grads_[i].ptr()) : grads_[i];
}

bool Plan::shards_unchanged() const {
  constexpr size_t kFar = 16;
  const size_t n = watched_.size();
  for (size_t i = 0; i < n; ++i) {
    if (i + kFar < n) shard_reader_.prefetch(watched_[i + kFar].dtensor);
    const Watched& w = watched_[i];
    if (!shard_reader_.has(w.dtensor, w.local, w.spec)) return false;
  }
  return true;
}

// What is written to may share no memory with anything else.
bool Plan::written_apart() {
  written_ranges_.clear();
  for (size_t i = 0; i < member_.size(); ++i) {
    if (!table_.entries[i].active) continue;
    TensorView g;
    if (!TensorReader::get().view(local_gradient(static_cast<int64_t>(i)).ptr(), g)) return false;
    written_ranges_.add(g.data, size_of(g.dtype), g.ndim, g.sizes, g.strides);
  }
  written_ranges_.sort();
  return written_ranges_.apart_from(kept_);
}

// Gradients are usually where they were at the last step. See prefetch.h.
FUSEDOPTIM_INLINE void Plan::prefetch_gradients(int64_t i) const {
  constexpr int64_t kFar = 16, kNear = 8;
  const int64_t n = static_cast<int64_t>(member_.size());
  if (i + kFar < n) {
    const Member& m = member_[i + kFar];
    __builtin_prefetch(m.param);
    prefetch_tensor(m.memory);
    __builtin_prefetch(m.last_grad);
    if (m.last_dtensor) shard_reader_.prefetch(m.last_dtensor);
    __builtin_prefetch(m.last_grad_sizes);
    if (m.last_grad_sizes) __builtin_prefetch(reinterpret_cast<const char*>(m.last_grad_sizes) - 64);
    __builtin_prefetch(&table_.entries[i + kFar]);
    __builtin_prefetch(reinterpret_cast<const char*>(&table_.entries[i + kFar]) + 64);
  }
  if (i + kNear < n) prefetch_autograd(member_[i + kNear].memory);
}

bool Plan::refresh_python(py::handle groups, py::handle state) {
  if (groups.ptr() != groups_.ptr() || state.ptr() != state_.ptr() || !PyList_Check(groups.ptr()) ||
      PyList_GET_SIZE(groups.ptr()) != static_cast<Py_ssize_t>(group_.size()))
    return stale("the groups or the state were replaced");
  if (!snapshot_.matches(state.ptr())) return stale("a state was replaced");
  if (!shards_unchanged()) return stale("a DTensor has another shard");
  if (executor_->sync_threads_and_isa())
    for (Member& m : member_) m.prepared = false;
  const TensorReader& reader = TensorReader::get();
  const WithoutTorchFunction of_dtensors(!shards_.empty());
  for (size_t gi = 0; gi < group_.size(); ++gi) {
    Group& g = group_[gi];
    if (gi + 4 < group_.size()) prefetch_dict(group_[gi + 4].dict.ptr());
    if (gi + 2 < group_.size()) prefetch_dict_keys(group_[gi + 2].dict.ptr());
    if (PyList_GET_ITEM(groups.ptr(), gi) != g.dict.ptr()) return stale("a group was replaced");
    PyObject* const params = g.params.ptr();
    const bool unchanged = g.unchanged();  // the item "params" included
    if ((!unchanged && PyDict_GetItem(g.dict.ptr(), params_key_.ptr()) != params) || !PyList_Check(params) ||
        PyList_GET_SIZE(params) != g.end - g.begin)
      return stale("a group's parameters changed");
    if (!unchanged && g.on_device && !refresh_group(g, table_.rows[gi])) return false;
    for (int64_t i = g.begin; i < g.end; ++i) {
      prefetch_gradients(i);
      Member& m = member_[i];
      Entry& e = table_.entries[i];
      if (PyList_GET_ITEM(params, i - g.begin) != m.param) return stale("a group's parameters changed");
      if (!m.on_device && !m.dormant) continue;
      grads_[i] = py::reinterpret_steal<py::object>(m.sharded ? reader.grad_of_dtensor(m.param) : reader.grad(m.param));
      if (!grads_[i]) {
        forget_python_error();
        return stale("a parameter's gradient cannot be read");
      }
      m.last_grad = grads_[i].ptr();
      const bool active = !grads_[i].is_none();
      if (m.dormant) {
        if (active) return stale("a parameter that was left alone has a gradient");
        continue;
      }
      if (active) {
        TensorView view;
        if (m.sharded) {
          PyObject* const shard = shard_of_gradient(i);
          if (!shard) return stale("a gradient is no DTensor on its parameter's mesh");
          m.last_dtensor = m.last_grad;
          m.last_grad = shard;
        }
        if (!reader.view(m.last_grad, view)) return stale("a gradient is not a strided tensor of a supported dtype");
        m.last_grad_sizes = view.sizes;
        // Such gradients are every second element of a complex tensor, so only unusual strides are worth the question.
        const bool usual =
            e.numel > 1 && view.ndim == m.ndim && std::equal(view.strides, view.strides + m.ndim, m.shape + m.ndim);
        if (!usual && reader.is_negated(m.last_grad)) return stale("a gradient is negated lazily");
        if (!refresh_gradient(i, view)) return false;
      }
      if (active != e.active) {
        e.active = active;
        activity_changed_ = true;
      }
    }
  }
  return true;
}

bool Plan::refresh(py::handle groups, py::handle state) {
  if (!bound_) throw std::runtime_error("refresh() must follow build() and the hand-over of the tensors");
  if (running_) throw std::runtime_error("step() was called while another thread is in step() of the same optimizer");
  struct Running {  // gradients may have to be placed anew, which lets other threads run
    bool& flag;
    explicit Running(bool& f) : flag(f) { flag = true; }
    ~Running() { flag = false; }
  } running(running_);
  return refresh_all(groups, state);
}

bool Plan::refresh_all(py::handle groups, py::handle state) {
  refreshed_ = false;
  grad_shards_.clear();
  lacking_.clear();
  // Checking addresses needs no interpreter. With many tensors a second thread does it meanwhile, one that the update
  // will need anyway. In a loop that works on a GPU it would be asleep, and waking it may take as long as a time slice.
  constexpr size_t kManyMembers = 256;
  bool addresses_checked = false, unchanged = false, python_checked = false, fits = false;
  if (on_cpu_ && plain_ && member_.size() >= kManyMembers && torch::stable::get_num_threads() > 1) {
    const std::thread::id caller = std::this_thread::get_id();
    std::exception_ptr error;
    torch::stable::parallel_for(0, 2, 1, [&](int64_t, int64_t) {
      if (std::this_thread::get_id() == caller) {
        python_checked = true;
        try {
          fits = refresh_python(groups, state);
        } catch (...) {
          error = std::current_exception();
        }
      } else {
        unchanged = watch_.unchanged();
        addresses_checked = true;
      }
    });
    if (error) std::rethrow_exception(error);
  }
  if (!python_checked) fits = refresh_python(groups, state);
  if (!fits) {
    lacking_.clear();
    return false;
  }
  if (!lacking_.empty()) return stale("no loop is compiled for what some tensors are stored as");
  if (!addresses_checked) unchanged = watch_.unchanged();
  if (!unchanged) return stale("a parameter or a state has new memory, strides or dtype");
  if (zero_grad_ && grads_moved_ && !grads_checked_ && !written_apart())
    return stale("gradients that are written to may share memory");
  refreshed_ = true;
  grads_checked_ = grads_moved_ = false;
  return true;
}

}  // namespace fusedoptim
