// The tables of steps on a GPU.
#include "executor.h"

#include <algorithm>
#include <stdexcept>

#include "packer.h"
#include "tuning.h"

namespace fusedoptim::gpu {

Kind GpuExecutor::kind_of(const Entry& e) const {
  Kind kind{};
  kind.storage[kParam] = e.param().storage;
  kind.storage[kGrad] = e.grad().storage;
  for (int k = 0; k < kStates; ++k) {
    if (!rule_.uses_state(e.variant, k)) continue;
    kind.storage[kFirstState + k] = e.state(k).storage;
    kind.uses |= 1 << k;
  }
  kind.step_dtype = e.step_dtype;
  kind.variant = e.variant.program;
  return kind;
}

// Of what is not ready there has been no gradient yet.
void GpuExecutor::find_kinds(const std::vector<Entry>& entries) {
  wide_.assign(entries.size(), false);
  for (auto& kinds : kinds_) kinds.clear();
  for (size_t i = 0; i < entries.size(); ++i) {
    if (!entries[i].ready) continue;
    const Kind kind = kind_of(entries[i]);
    for (Storage d : kind.storage) wide_[i] = wide_[i] || d == Storage::f64;
    auto& kinds = kinds_[wide_[i] ? 1 : 0];
    const auto at = std::lower_bound(kinds.begin(), kinds.end(), kind);
    if (at == kinds.end() || kind < *at) kinds.insert(at, kind);
  }
}

int64_t GpuExecutor::summed_bytes(const Entry& e) const {
  int64_t bytes = 0;
  for (int k = 0; k < kOperands; ++k)
    if (rule_.programs[e.variant.program].summed >> k & 1)
      bytes += size_of(e.operand[k].storage) + extra_size_of(e.operand[k].storage);
  return bytes * e.numel;
}

void GpuExecutor::make_work_lists(const std::vector<Entry>& entries) {
  std::vector<Sized> sized[2], others;
  int64_t elements = 0;
  for (size_t i = 0; i < entries.size(); ++i) {
    const Entry& e = entries[i];
    elements += e.numel;
    const auto index = static_cast<int32_t>(i);
    if (e.ready)
      sized[wide_[i] ? 1 : 0].push_back({index, e.numel, summed_bytes(e)});
    else
      others.push_back({index, 0, 0});
  }
  args_.chunk = kSmallestChunk;
  while (args_.chunk < kLargestChunk && elements / args_.chunk > device_->multiprocessors() * kChunksPerMultiprocessor)
    args_.chunk *= 2;
  args_.entries = static_cast<int32_t>(entries.size());
  args_.tensors = static_cast<int32_t>(entries.size());
  for (Ready& ready : ready_) ready = Ready{};
  if (measures_) {
    for (int wide = 0; wide < 2; ++wide) add_sums(ready_[kMeasure + wide].list, sized[wide]);
    for (const Launch k : {kMeasure, kMeasureWide})
      if (ready_[k].list.items > 0) {  // each is 0, and takes no launch of its own
        add_sums(ready_[k].list, others);
        break;
      }
  }
  for (int wide = 0; wide < 2; ++wide) {
    if (rule_.sums > 0)
      add_sums_and_updates(ready_[kUpdate + wide].list, sized[wide],
                           device_->l2_bytes() / std::max<int64_t>(tuning.norm_windows, 1));
    else
      add_updates(ready_[kUpdate + wide].list, sized[wide], args_.chunk);
  }
  for (int wide = 0; wide < 2; ++wide)
    for (const auto& [launch, purpose] : {std::pair{kMeasure, Purpose::measure}, {kUpdate, Purpose::update}})
      if (Ready& ready = ready_[launch + wide]; ready.list.items > 0)
        ready.program = device_->prepare(purpose, rule_, wide, kinds_[wide]);
  if (measures_) {
    ready_[kReduce].list.items = 1;
    ready_[kReduce].program = device_->prepare(Purpose::reduce, rule_, false, {});
  }
}

// The innermost dimension first; strides of operands that are not used are zeros.
int64_t GpuExecutor::add_layout(const Layout& l, Variant variant) {
  const int64_t start = static_cast<int64_t>(layouts_.size());
  layouts_.push_back(static_cast<int64_t>(l.sizes.size()));
  for (size_t d = l.sizes.size(); d-- > 0;) {
    layouts_.push_back(l.sizes[d]);
    for (int k = 0; k < kStrides; ++k) {
      const bool used = k < kFirstState || k == kIndex || rule_.uses_state(variant, k - kFirstState);
      layouts_.push_back(used && !l.strides[k].empty() ? l.strides[k][d] : 0);
    }
  }
  return start;
}

TableEntry GpuExecutor::table_entry(const Entry& e, size_t i) {
  TableEntry found{};
  if (!e.ready) return found;
  DeviceEntry& d = found.entry;
  d.kind = kind_of(e);
  for (int k = 0; k < kOperands; ++k)
    if (k == kParam || (k >= kFirstState && (d.kind.uses >> (k - kFirstState) & 1)))
      d.operand[k] = {e.operand[k].data, e.operand[k].extra};
  d.step = e.step;
  d.number = e.numbers[0];
  std::copy(e.numbers + 1, e.numbers + kMaxNumbers, found.more_numbers);
  d.id = e.id;
  d.first_index = e.first_index;
  d.row = e.row;
  d.numel = e.numel;
  found.whole_numel = e.whole_numel;
  // The same for both where there are both.
  const int64_t layout = e.sum_layout ? add_layout(*e.sum_layout, e.variant) : -1;
  d.layout = e.layout ? layout : -1;
  d.sum_layout = layout;
  d.partials = first_partial_[i];
  d.nodes = first_node_[i];
  d.group = e.group;
  const auto& kinds = kinds_[wide_[i] ? 1 : 0];
  d.kind_index = static_cast<int32_t>(std::lower_bound(kinds.begin(), kinds.end(), d.kind) - kinds.begin());
  return found;
}

// What blocks tell each other.
void GpuExecutor::make_control(const std::vector<Entry>& entries, void* stream) {
  first_partial_.assign(entries.size(), 0);
  first_node_.assign(entries.size(), 0);
  int64_t partials = 0, nodes = 0;
  for (size_t i = 0; (rule_.sums > 0 || measures_) && i < entries.size(); ++i) {
    first_partial_[i] = partials;
    first_node_[i] = static_cast<int32_t>(nodes);
    int64_t count = tiles(entries[i].numel);
    partials += count;
    while (parts_of(entries[i].numel) > 1 && count > 1) {
      count = tiles(count);
      nodes += count;
      if (count > 1) partials += count;
    }
  }
  tables_.partials_stride = partials;
  partials *= std::max(rule_.sums, 1);
  Packer packer;
  const int64_t at_launch = packer.add(std::vector<LaunchControl>(1));
  const int64_t at_control = packer.add(std::vector<EntryControl>(entries.size()));
  const int64_t at_nodes = packer.add(std::vector<uint32_t>(nodes)), at_partials = packer.size();
  const Memory memory = allocate(at_partials + partials * 8, stream);
  device_->upload(memory, 0, packer.data(), packer.size(), stream);
  if (captured_any_) captured_.push_back(std::move(control_memory_));
  control_memory_ = memory;
  control_measures_ = measures_;
  tables_.launch = reinterpret_cast<LaunchControl*>(control_memory_.at(at_launch));
  tables_.control = reinterpret_cast<EntryControl*>(control_memory_.at(at_control));
  tables_.nodes = reinterpret_cast<uint32_t*>(control_memory_.at(at_nodes));
  tables_.partials = reinterpret_cast<double*>(control_memory_.at(at_partials));
}

Memory GpuExecutor::allocate(int64_t bytes, void* stream) {
  Memory memory = device_->allocate(bytes);
  memory.stream = stream;
  return memory;
}

void GpuExecutor::make_tables(const StepTable& table, void* stream) {
  const std::vector<Entry>& entries = table.entries;
  if (capturing_)
    throw std::runtime_error(
        "this step cannot be captured in a CUDA graph, because it sets up tables: take a step before the "
        "capture, and none that changes dtypes or memory layouts in between");
  if (!tables_.control || (measures_ && !control_measures_)) make_control(entries, stream);
  if (captured_any_) captured_.push_back(std::move(table_memory_));
  find_kinds(entries);
  make_work_lists(entries);
  layouts_.clear();
  std::vector<TableEntry> table_entries;
  for (size_t i = 0; i < entries.size(); ++i) table_entries.push_back(table_entry(entries[i], i));
  Packer packer;
  const int64_t at_entries = packer.add(table_entries), at_layouts = packer.add(layouts_);
  int64_t at_first[kLaunches], at_segments[kLaunches], at_segment_of[kLaunches];
  for (int k = 0; k < kLaunches; ++k) {
    at_first[k] = packer.add(ready_[k].list.first_item);
    at_segments[k] = packer.add(ready_[k].list.segments);
    at_segment_of[k] = packer.add(ready_[k].list.segment_of);
  }
  table_memory_ = allocate(packer.size(), stream);
  device_->upload(table_memory_, 0, packer.data(), packer.size(), stream);
  tables_.entries = reinterpret_cast<TableEntry*>(table_memory_.at(at_entries));
  tables_.layouts = reinterpret_cast<int64_t*>(table_memory_.at(at_layouts));
  tables_.sums = table.sums;
  tables_.sums_stride = table.sums_stride;
  for (int k = 0; k < kLaunches; ++k) {
    ready_[k].first_item = reinterpret_cast<uint32_t*>(table_memory_.at(at_first[k]));
    ready_[k].segments = reinterpret_cast<Segment*>(table_memory_.at(at_segments[k]));
    ready_[k].segment_of = reinterpret_cast<uint32_t*>(table_memory_.at(at_segment_of[k]));
  }
  const int64_t words = static_cast<int64_t>(entries.size() + table.rows.size() * rule_.hypers());
  if (!device_->by_value())
    words_memory_ = allocate(words * 8 + kLaunches * sizeof(StepHeader), stream);
  else if (words > kInlineWords)
    words_memory_ = allocate(words * 8, stream);
  uploaded_grads_.clear();
  uploaded_rows_.clear();
  tables_valid_ = true;
}

}  // namespace fusedoptim::gpu
