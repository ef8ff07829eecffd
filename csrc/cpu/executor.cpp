#include "executor.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "../core/strided.h"
#include "capability.h"
#include "lanes_portable.h"

namespace fusedoptim {
namespace {

double step_number(const Entry& e) {
  if (!e.step) return 0;
  return e.step_dtype == DType::f64 ? *static_cast<const double*>(e.step) + 1.0
                                    : static_cast<double>(*static_cast<const float*>(e.step) + 1.0f);
}

// Asks for the first lines of a tensor that comes soon: the hardware follows addresses within a page, and cannot know
// where the next tensor lies. (Forced inline: see python/prefetch.h.)
FUSEDOPTIM_HD void prefetch_data(const Entry& e) {
  constexpr int64_t kBytes = 256;
  const auto ask = [](const void* base) {
    for (int64_t at = 0; at < kBytes; at += 64) __builtin_prefetch(static_cast<const char*>(base) + at, 1);
  };
  ask(e.param);
  ask(e.grad);
  for (void* state : e.state)
    if (state) ask(state);
  __builtin_prefetch(e.step, 1);
}

}  // namespace

StepInputs CpuExecutor::inputs(const Entry& e, const std::vector<HyperRow>& rows, PowMemo* pow) const {
  return {rows[e.group].value, step_number(e), e.first, e.sum_of_squares, e.scalar_state ? *e.scalar_state : 0.0f, pow};
}

bool CpuExecutor::outdated() {
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  scheduled_ = scheduled_ && threads == threads_;
  threads_ = threads;
  const Kernels *current = &cpu_kernels(), *before = kernels_;
  kernels_ = current;
  return before && before != current;
}

void CpuExecutor::prepare(Entry& entry, int variant) {
  entry.update = kernels_->update(rule_, variant, entry);
  entry.tile_sum = kernels_->tile_sum(entry);
  scheduled_ = false;
}

void CpuExecutor::reschedule(const std::vector<Entry>& entries) {
  schedule_.build(entries, torch::stable::get_num_threads(), info_.needs_norm ? kWindowElements : INT64_MAX / 2);
  if (!sums_) return;
  first_partial_.resize(entries.size());
  int64_t total = 0;
  for (size_t i = 0; i < entries.size(); ++i) {
    first_partial_[i] = total;
    if (entries[i].active) total += tiles(entries[i].numel);
  }
  partial_.resize(total);
}

bool CpuExecutor::takes_long(const std::vector<Entry>& entries, const std::vector<HyperRow>& rows) {
  measures_ = needs_global_norm(rows, settings_);
  const bool sums = info_.needs_norm || measures_;
  scheduled_ = scheduled_ && sums == sums_;
  sums_ = sums;
  if (!scheduled_) reschedule(entries);
  scheduled_ = true;
  return schedule_.cost >= kReleaseCost;
}

// Threads take chunks from a counter, so that a thread that the machine slows down takes fewer.
template <class F>
void CpuExecutor::parallel_chunks(const Window& w, const std::function<void()>* on_caller, const F& chunk) const {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), w.chunk_end - w.chunk_begin);
  if (threads <= 1 || schedule_.cost < kSerialCost) {
    if (on_caller) (*on_caller)();
    for (int64_t k = w.chunk_begin; k < w.chunk_end; ++k) chunk(k);
    return;
  }
  std::atomic<int64_t> next{w.chunk_begin};
  const std::thread::id caller = std::this_thread::get_id();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    if (on_caller && std::this_thread::get_id() == caller) (*on_caller)();
    for (int64_t k; (k = next.fetch_add(1, std::memory_order_relaxed)) < w.chunk_end;) chunk(k);
  });
}

// Calls part(entry index, begin, end) for every piece of a tensor in the chunk.
template <class F>
void CpuExecutor::for_each_part(const std::vector<Entry>& entries, int64_t chunk, const F& part) const {
  const Mark from = schedule_.marks[chunk], to = schedule_.marks[chunk + 1];
  const int64_t last = to.offset > 0 ? to.entry : to.entry - 1;
  for (int64_t i = from.entry; i <= last; ++i) {
    const Entry& e = entries[i];
    if (!e.active) continue;
    const int64_t begin = i == from.entry ? from.offset : 0, end = i == to.entry ? to.offset : e.numel;
    if (begin < end) part(i, begin, end);
  }
}

void CpuExecutor::update_chunk(const std::vector<Entry>& entries, const std::vector<HyperRow>& rows,
                               int64_t chunk) const {
  alignas(64) unsigned char scalars[kMaxScalarBytes];
  // Neighbours usually agree in everything that scalars depend on.
  const Entry* prepared = nullptr;
  double prepared_step = 0;
  PowMemo pow;
  for_each_part(entries, chunk, [&](int64_t i, int64_t begin, int64_t end) {
    const Entry& e = entries[i];
    const StepInputs in = inputs(e, rows, &pow);
    const bool same = prepared && !info_.needs_norm && prepared->group == e.group && prepared->first == e.first &&
                      prepared->compute_dtype() == e.compute_dtype() && prepared_step == in.step;
    if (!same) {
      (e.compute_dtype() == DType::f64 ? info_.prepare_f64 : info_.prepare_f32)(in, scalars);
      prepared = &e;
      prepared_step = in.step;
    }
    constexpr int64_t kAhead = 4, kSmall = 4096;
    if (e.numel < kSmall && i + kAhead < static_cast<int64_t>(entries.size())) prefetch_data(entries[i + kAhead]);
    e.update(e, begin, end, scalars, around_[e.group]);
  });
}

template <class F>
void CpuExecutor::sum_squares(std::vector<Entry>& entries, const Window& w, const std::function<void()>* on_caller,
                              const F& around) {
  parallel_chunks(w, on_caller, [&](int64_t chunk) {
    for_each_part(entries, chunk, [&](int64_t i, int64_t begin, int64_t end) {
      const Entry& e = entries[i];
      double* out = partial_.data() + first_partial_[i];
      for (int64_t t = begin / kTile; t < tiles(end); ++t) out[t] = e.tile_sum(e, t, around(e));
    });
  });
  for (int64_t i = w.entry_begin; i < w.entry_end; ++i)
    if (entries[i].active)
      entries[i].sum_of_squares = reduce_tile_sums(partial_.data() + first_partial_[i], tiles(entries[i].numel));
}

// Of the sums of all tensors, added in the order of the parameters.
double CpuExecutor::global_norm(std::vector<Entry>& entries, const Composition& unscaled) {
  double sum = 0;
  for (const Window& w : schedule_.windows)
    sum_squares(entries, w, nullptr, [&](const Entry&) -> const Composition& { return unscaled; });
  for (const Entry& e : entries)
    if (e.active) sum += e.sum_of_squares;
  return norm_of(sum, any_f64(entries));
}

void CpuExecutor::compose(const std::vector<HyperRow>& rows, const Composition& unscaled, double norm, bool in_f64) {
  around_.assign(rows.size(), unscaled);
  for (size_t i = 0; i < rows.size(); ++i) {
    const double* h = rows[i].value;
    Composition& c = around_[i];
    if (h[kMaxGradNorm] >= 0) c.coefficient = clip_coefficient(h[kMaxGradNorm], norm, in_f64);
    if (h[kClipGradValue] >= 0) c.limit = h[kClipGradValue];
    c.ema_decay = h[kEmaDecay];
    c.zero_grad = settings_.zero_grad;
  }
}

void CpuExecutor::run(std::vector<Entry>& entries, const std::vector<HyperRow>& rows, const OnDevice& on_device,
                      const std::function<void()>& on_caller) {
  const auto* found_inf = reinterpret_cast<const float*>(on_device.found_inf);
  bool skip = found_inf && *found_inf != 0;
  const auto unscaled = Composition::unscaled(unscale_by(reinterpret_cast<const float*>(on_device.grad_scale)));
  double norm = 0;
  if (measures_) {
    norm = settings_.norm_stats->norm = global_norm(entries, unscaled);
    if (settings_.skip_nonfinite && !is_finite(norm)) {
      settings_.norm_stats->skipped += 1;
      skip = true;
    }
  }
  if (!settings_.update) return;
  if (!skip) {
    compose(rows, unscaled, norm, any_f64(entries));
    update(entries, rows, on_caller);
  } else if (settings_.zero_grad) {
    on_caller();
    zero_gradients(entries);
  }
}

void CpuExecutor::update(std::vector<Entry>& entries, const std::vector<HyperRow>& rows,
                         const std::function<void()>& on_caller) {
  const std::function<void()>* once = &on_caller;
  for (const Window& w : schedule_.windows) {
    if (info_.needs_norm) {
      sum_squares(entries, w, once, [&](const Entry& e) -> const Composition& { return around_[e.group]; });
      once = nullptr;
    }
    parallel_chunks(w, once, [&](int64_t chunk) { update_chunk(entries, rows, chunk); });
    once = nullptr;
  }
  for (Entry& e : entries) {
    if (!e.active) continue;
    if (e.scalar_state) *e.scalar_state = info_.next_scalar_state(inputs(e, rows, nullptr));
    if (e.step) {
      if (e.step_dtype == DType::f64)
        *static_cast<double*>(e.step) += 1.0;
      else
        *static_cast<float*>(e.step) += 1.0f;
    }
    e.first = false;
  }
}

// For a step that is skipped.
void CpuExecutor::zero_gradients(const std::vector<Entry>& entries) const {
  for (const Window& w : schedule_.windows)
    parallel_chunks(w, nullptr, [&](int64_t chunk) {
      for_each_part(entries, chunk, [&](int64_t i, int64_t begin, int64_t end) {
        const Entry& e = entries[i];
        const int64_t size = size_of(e.grad_dtype);
        if (!e.layout)
          std::memset(static_cast<char*>(e.grad) + begin * size, 0, (end - begin) * size);
        else
          fill_with_zeros<portable::F32>(e.grad, e.grad_dtype, e.layout->sizes, e.layout->grad, begin, end - begin);
      });
    });
}

}  // namespace fusedoptim
