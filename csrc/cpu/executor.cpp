#include "executor.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "../core/random_bits.h"
#include "../core/step_count.h"
#include "../core/strided.h"
#include "capability.h"
#include "lanes_portable.h"
#include "tensor_scalars.h"

namespace fusedoptim {
namespace {

// Asks for the first lines of a tensor that comes soon: the hardware follows addresses within a page, and cannot know
// where the next tensor lies. (Forced inline: see python/prefetch.h.)
FUSEDOPTIM_INLINE void prefetch_data(const Entry& e) {
  for (const Operand& o : e.operand)
    if (o.data)
      for (int64_t at = 0; at < tuning::kPrefetchBytes; at += 64)
        __builtin_prefetch(static_cast<const char*>(o.data) + at, 1);
  __builtin_prefetch(e.step, 1);
}

// Of random bits, in this step.
uint64_t stream_of(const StepTable& table, const Entry& e) {
  return random_stream(static_cast<uint64_t>(table.rows[e.group].value[kRoundingSeed]), e.id,
                       static_cast<uint64_t>(next_step(e.step, e.step_dtype)));
}

const float* number(int64_t address) { return reinterpret_cast<const float*>(address); }

}  // namespace

// ---- before a step ----

bool CpuExecutor::sync_threads_and_isa() {
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  scheduled_ = scheduled_ && threads == threads_;
  threads_ = threads;
  const Kernels *current = &cpu_kernels(), *before = kernels_;
  kernels_ = current;
  return before && before != current;
}

bool CpuExecutor::prepare(Entry& entry) {
  const Program& program = rule_.programs[entry.variant.program];
  const CpuCapability isa = kernels_->capability;
  entry.update = nullptr;
  for (const FindLoop find : program.loops[isa])
    if (!entry.update) entry.update = find(entry);
  scheduled_ = false;
  return entry.update != nullptr;
}

bool CpuExecutor::begin_step(const StepTable& table) {
  if (!scheduled_) reschedule(table);
  scheduled_ = true;
  return schedule_.cost >= tuning::kReleaseCost;
}

MeasureFn CpuExecutor::measure_of(const Entry& e) const {
  return rule_.programs[e.variant.program].measure[kernels_->capability][e.compute_dtype() == DType::f64];
}

void CpuExecutor::reschedule(const StepTable& table) {
  int64_t window = rule_.sums > 0 ? tuning::kWindowElements : INT64_MAX / 2;
  const auto measures = [this](const Entry& e) { return measure_of(e) != nullptr; };
  if (std::any_of(table.entries.begin(), table.entries.end(), measures)) window /= kFirstState + rule_.slots();
  schedule_.build(table.entries, torch::stable::get_num_threads(), window);
  first_partial_.clear();  // made when they are needed
}

// ---- chunks and threads ----

// Threads take chunks from a counter, so that a thread that the machine slows down takes fewer.
template <class F>
void CpuExecutor::parallel_chunks(const Window& w, Caller on_caller, const F& chunk) const {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), w.chunk_end - w.chunk_begin);
  if (threads <= 1 || schedule_.cost < tuning::kSerialCost) {
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

// ---- measure ----

void CpuExecutor::set_transforms(const StepTable& table, const LaunchInputs& inputs, bool of_rule) {
  const float unscale = unscale_by(number(inputs.grad_scale));
  transforms_.assign(table.rows.size(), GroupTransforms::unscaled(unscale));
  if (!of_rule) return;
  const bool in_f64 = table.needs_global_norm(settings_) && table.norm_in_f64();
  for (size_t i = 0; i < table.rows.size(); ++i) {
    const double* h = table.rows[i].value;
    transforms_[i] = GroupTransforms::of({h[kMaxGradNorm], h[kClipGradValue], h[kEmaDecay]}, unscale,
                                         settings_.norm_stats->norm, in_f64, settings_.zero_grad);
  }
}

void CpuExecutor::sum_squares(StepTable& table, const Window& w, SumsOf which, Caller on_caller) {
  const std::vector<Entry>& entries = table.entries;
  if (first_partial_.empty()) {
    partials_ = 0;
    for (const Entry& e : entries) {
      first_partial_.push_back(partials_);
      if (e.active) partials_ += tiles(e.numel);
    }
    partial_.resize(partials_ * std::max(rule_.sums, 1));
  }
  parallel_chunks(w, on_caller, [&](int64_t chunk) {
    TensorScalars scalars(rule_, table, false);
    for_each_part(entries, chunk, [&](int64_t i, int64_t begin, int64_t end) {
      const Entry& e = entries[i];
      double* out = partial_.data() + first_partial_[i];
      const MeasureFn measure = which.of_rule ? measure_of(e) : nullptr;
      if (!measure) {
        const TileSumFn sum = kernels_->tile_sum(e);
        for (int64_t t = begin / kTile; t < tiles(end); ++t) out[t] = sum(e, t, transforms_[e.group]);
        return;
      }
      const UpdateInputs in{scalars.of(e), transforms_[e.group], 0};
      for (int64_t t = begin / kTile; t < tiles(end); ++t) {
        double sums[kMaxSums];
        measure(e, t, in, sums);
        for (int k = 0; k < rule_.sums; ++k) out[k * partials_ + t] = sums[k];
      }
    });
  });
  for (int64_t i = w.entry_begin; i < w.entry_end; ++i)
    for (int k = 0; k < which.count; ++k) {
      double* const partial = partial_.data() + k * partials_ + first_partial_[i];
      table.sums_row(k)[i] = entries[i].active ? reduce_tile_sums(partial, tiles(entries[i].numel)) : 0;
    }
}

void CpuExecutor::measure(StepTable& table, const LaunchInputs& inputs, int of_rule, bool reduces) {
  const bool is_rules = of_rule != kOfGradients;
  if (is_rules && of_rule > 0) return;  // one pass sums all that a rule asks for: the first
  set_transforms(table, inputs, is_rules);
  for (const Window& w : schedule_.windows) sum_squares(table, w, {is_rules, is_rules ? rule_.sums : 1}, nullptr);
  if (reduces) reduce(table, inputs);
}

// ---- reduce ----

// The sums of all tensors are added in the order of the parameters, those without a gradient here as well.
void CpuExecutor::reduce(StepTable& table, const LaunchInputs&) {
  double sum = 0;
  for (size_t i = 0; i < table.entries.size(); ++i) sum += table.sums[i];
  settings_.norm_stats->norm = norm_of(sum, table.norm_in_f64());
  if (settings_.skip_nonfinite && !is_finite(settings_.norm_stats->norm)) settings_.norm_stats->skipped += 1;
}

// ---- update ----

bool CpuExecutor::skips(const LaunchInputs& inputs) const {
  if (inputs.found_inf && *number(inputs.found_inf) != 0) return true;
  return settings_.skip_nonfinite && !is_finite(settings_.norm_stats->norm);
}

void CpuExecutor::run(StepTable& table, const LaunchInputs& inputs, const std::function<void()>& on_caller) {
  if (table.needs_global_norm(settings_)) measure(table, inputs, kOfGradients, true);
  update(table, inputs, rule_.sums > 0, &on_caller);
}

void CpuExecutor::update(StepTable& table, const LaunchInputs& inputs) { update(table, inputs, false, nullptr); }

void CpuExecutor::update(StepTable& table, const LaunchInputs& inputs, bool sums, Caller on_caller) {
  if (!skips(inputs)) {
    set_transforms(table, inputs, true);
    update_windows(table, sums, on_caller);
    commit(table);
  } else if (settings_.zero_grad) {
    if (on_caller) (*on_caller)();
    zero_gradients(table);
  }
}

void CpuExecutor::update_windows(StepTable& table, bool sums, Caller on_caller) {
  for (const Window& w : schedule_.windows) {
    if (sums) {
      sum_squares(table, w, {true, rule_.sums}, on_caller);
      on_caller = nullptr;
    }
    parallel_chunks(w, on_caller, [&](int64_t chunk) { update_chunk(table, chunk); });
    on_caller = nullptr;
  }
}

void CpuExecutor::update_chunk(const StepTable& table, int64_t chunk) const {
  const std::vector<Entry>& entries = table.entries;
  TensorScalars scalars(rule_, table, true);
  for_each_part(entries, chunk, [&](int64_t i, int64_t begin, int64_t end) {
    const Entry& e = entries[i];
    const void* const prepared = scalars.of(e);
    if (e.numel < tuning::kSmall && i + tuning::kAhead < static_cast<int64_t>(entries.size()))
      prefetch_data(entries[i + tuning::kAhead]);
    const uint64_t stream = e.is_stochastic ? stream_of(table, e) : 0;
    e.update(e, begin, end, {prepared, transforms_[e.group], stream});
  });
}

// Counts the step, once no thread reads the numbers from before it.
void CpuExecutor::commit(StepTable& table) const {
  TensorScalars scalars(rule_, table, true);
  const bool has_numbers = rule_.numbers() > 0;
  for (Entry& e : table.entries) {
    if (!e.active) continue;
    if (has_numbers) scalars.step_numbers(e);
    store_step(e.step, e.step_dtype, next_step(e.step, e.step_dtype));
    e.first = false;
  }
}

// For a step that is skipped.
void CpuExecutor::zero_gradients(const StepTable& table) const {
  for (const Window& w : schedule_.windows)
    parallel_chunks(w, nullptr, [&](int64_t chunk) {
      for_each_part(table.entries, chunk, [&](int64_t i, int64_t begin, int64_t end) {
        const Entry& e = table.entries[i];
        const int64_t size = size_of(e.grad().storage);
        if (!e.layout)
          std::memset(static_cast<char*>(e.grad().data) + begin * size, 0, (end - begin) * size);
        else
          fill_with_zeros<portable::F32>(e.grad(), e.layout->sizes, e.layout->strides[kGrad], begin, end - begin);
      });
    });
}

}  // namespace fusedoptim
