// What a step on a GPU does once its tables are made.
#include <cstring>

#include "executor.h"
#include "tuning.h"

namespace fusedoptim::gpu {

// Called for every step: a step may come on another stream than the one before.
void GpuExecutor::note_use(Memory& memory, void* stream) {
  if (!memory.owner || memory.stream == stream) return;
  for (void* known : memory.elsewhere)
    if (known == stream) return;
  device_->used_on(memory, stream);
  memory.elsewhere.push_back(stream);
}

void GpuExecutor::gather_words(const StepTable& table) {
  const int64_t n = static_cast<int64_t>(table.entries.size()), width = rule_.hypers();
  words_.resize(n + static_cast<int64_t>(table.rows.size()) * width);
  for (int64_t i = 0; i < n; ++i) {
    const Entry& e = table.entries[i];
    words_[i] = e.active ? kActive | (e.first ? kFirst : 0) | reinterpret_cast<uintptr_t>(e.grad().data) : 0;
  }
  for (size_t r = 0; r < table.rows.size(); ++r) std::memcpy(&words_[n + r * width], table.rows[r].value, width * 8);
  args_.tables = tables_;
  args_.row_words = static_cast<int32_t>(width);
}

// Words too many for the arguments, in device memory. Uploaded if they changed; a captured step gets a table of its
// own, whose values the graph keeps.
const uint64_t* GpuExecutor::table_of_words(std::vector<uint64_t>& last, const uint64_t* words, int64_t count,
                                            int64_t offset, void* stream) {
  if (capturing_) {
    captured_.push_back(allocate(count * 8, stream));
    device_->write(captured_.back(), words, count * 8, stream);
    return reinterpret_cast<const uint64_t*>(captured_.back().at(0));
  }
  if (static_cast<int64_t>(last.size()) != count || std::memcmp(last.data(), words, count * 8) != 0) {
    last.clear();
    device_->upload(words_memory_, offset * 8, words, count * 8, stream);
    last.assign(words, words + count);
  }
  return reinterpret_cast<const uint64_t*>(words_memory_.at(offset * 8));
}

// What is small goes by value, the gradients first: they change most often.
void GpuExecutor::pack_by_value(int64_t entries, void* stream) {
  int64_t used = 0;
  const auto place = [&](int64_t begin, int64_t end, int32_t& start, std::vector<uint64_t>& last) -> const uint64_t* {
    const int64_t count = end - begin;
    if (used + count > kInlineWords) return table_of_words(last, words_.data() + begin, count, begin, stream);
    std::memcpy(args_.words + used, words_.data() + begin, count * 8);
    start = static_cast<int32_t>(used);
    used += count;
    return nullptr;
  };
  args_.grads = place(0, entries, args_.inline_grads, uploaded_grads_);
  args_.rows = place(entries, static_cast<int64_t>(words_.size()), args_.inline_rows, uploaded_rows_);
}

// All words, then a header for each launch, as one table. Returns where its headers are.
const StepHeader* GpuExecutor::pack_in_memory(int64_t entries, void* stream) {
  constexpr int64_t kHeaderWords = sizeof(StepHeader) / 8;
  const int64_t count = static_cast<int64_t>(words_.size());
  if (capturing_) captured_.push_back(allocate((count + kLaunches * kHeaderWords) * 8, stream));
  const Memory& memory = capturing_ ? captured_.back() : words_memory_;
  args_.grads = reinterpret_cast<const uint64_t*>(memory.at(0));
  args_.rows = reinterpret_cast<const uint64_t*>(memory.at(entries * 8));
  words_.resize(count + kLaunches * kHeaderWords);
  for (int k = 0; k < kLaunches; ++k) {
    choose(ready_[k]);
    std::memcpy(words_.data() + count + k * kHeaderWords, static_cast<StepHeader*>(&args_), sizeof(StepHeader));
  }
  const int64_t bytes = static_cast<int64_t>(words_.size()) * 8;
  if (capturing_) {
    device_->write(memory, words_.data(), bytes, stream);
  } else if (words_ != uploaded_grads_) {
    uploaded_grads_.clear();
    device_->upload(memory, 0, words_.data(), bytes, stream);
    uploaded_grads_ = words_;
  }
  return reinterpret_cast<const StepHeader*>(memory.at(count * 8));
}

void GpuExecutor::choose(const Ready& ready) {
  args_.tables.first_item = ready.first_item;
  args_.tables.segments = ready.segments;
  args_.tables.segment_of = ready.segment_of;
  args_.items = static_cast<uint32_t>(ready.list.items);
}

// A launch that fails may leave counters of the one before as no other step may find them.
void GpuExecutor::launch(std::initializer_list<Launch> launches, const StepHeader* headers, void* stream) {
  try {
    for (const Launch k : launches) {
      const Ready& ready = ready_[k];
      if (ready.list.items == 0) continue;
      choose(ready);
      const bool overlaps = (args_.flags & kOverlap) && (k == kUpdate || k == kUpdateWide);
      device_->launch(ready.program, static_cast<uint32_t>(ready.list.items), args_, headers ? headers + k : nullptr,
                      overlaps, stream);
    }
  } catch (...) {
    tables_valid_ = false;
    tables_.control = nullptr;
    throw;
  }
}

// Makes ready for the launches of a step, or of a part of one. Returns the headers of launches, null where arguments go
// by value.
const StepHeader* GpuExecutor::begin(StepTable& table, const LaunchInputs& inputs, bool measures, int32_t flags,
                                     int32_t sum) {
  void* stream = reinterpret_cast<void*>(inputs.stream);
  capturing_ = device_->capturing(stream);
  args_.grad_scale = reinterpret_cast<const float*>(inputs.grad_scale);
  args_.found_inf = reinterpret_cast<const float*>(inputs.found_inf);
  args_.norm_stats = settings_.norm_stats;
  args_.sum = sum;
  if (capturing_) flags &= ~kOverlap;  // a graph's launches follow each other closely
  args_.flags = flags | (settings_.skip_nonfinite ? kSkipNonfinite : 0) | (settings_.zero_grad ? kZeroGrad : 0) |
                (table.norm_in_f64() ? kNormInF64 : 0);
  tables_valid_ = tables_valid_ && (measures_ || !measures);
  measures_ = measures_ || measures;
  if (!tables_valid_) make_tables(table, stream);
  captured_any_ = captured_any_ || capturing_;
  if (sums_memory_.owner != table.sums_owner)
    sums_memory_ = {table.sums_owner, reinterpret_cast<char*>(table.sums), stream, {}};
  for (Memory* memory : {&table_memory_, &control_memory_, &words_memory_, &sums_memory_}) {
    note_use(*memory, stream);
    if (capturing_) note_use(*memory, nullptr);  // where a graph is usually replayed
  }
  gather_words(table);
  const int64_t n = static_cast<int64_t>(table.entries.size());
  if (!device_->by_value()) return pack_in_memory(n, stream);
  pack_by_value(n, stream);
  return nullptr;
}

void GpuExecutor::run(StepTable& table, const LaunchInputs& inputs, const std::function<void()>& on_caller) {
  void* stream = reinterpret_cast<void*>(inputs.stream);
  if (table.needs_global_norm(settings_)) {
    const StepHeader* headers = begin(table, inputs, true, kReduces | kOverlap);
    launch({kMeasure, kMeasureWide, kUpdate, kUpdateWide}, headers, stream);
  } else {
    launch({kUpdate, kUpdateWide}, begin(table, inputs, false, 0), stream);
  }
  on_caller();
  for (Entry& e : table.entries)
    if (e.active) e.first = false;
}

void GpuExecutor::measure(StepTable& table, const LaunchInputs& inputs, int of_rule, bool reduces) {
  const int32_t flags = (of_rule != kOfGradients ? kTransformed : 0) | (reduces ? kReduces : 0);
  const StepHeader* headers = begin(table, inputs, true, flags, of_rule != kOfGradients ? of_rule : 0);
  launch({kMeasure, kMeasureWide}, headers, reinterpret_cast<void*>(inputs.stream));
}

void GpuExecutor::reduce(StepTable& table, const LaunchInputs& inputs) {
  launch({kReduce}, begin(table, inputs, true, 0), reinterpret_cast<void*>(inputs.stream));
}

void GpuExecutor::update(StepTable& table, const LaunchInputs& inputs) {
  launch({kUpdate, kUpdateWide}, begin(table, inputs, false, kSumsGiven), reinterpret_cast<void*>(inputs.stream));
  for (Entry& e : table.entries)
    if (e.active) e.first = false;
}

}  // namespace fusedoptim::gpu
