#include "executor.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "tuning.h"

namespace fusedoptim::cuda {

namespace {

// The first of the grids that update.
constexpr size_t kUpdates = 2;

int64_t align16(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// Bytes of one table, section by section.
class Packer {
 public:
  // Returns where the section starts.
  template <class T>
  int64_t add(const std::vector<T>& section) {
    const int64_t start = static_cast<int64_t>(bytes.size());
    bytes.resize(start + align16(static_cast<int64_t>(section.size() * sizeof(T))));
    if (!section.empty()) std::memcpy(bytes.data() + start, section.data(), section.size() * sizeof(T));
    return start;
  }
  std::vector<char> bytes;
};

int64_t parts_of(int64_t numel) { return std::max<int64_t>((numel + kPart - 1) / kPart, 1); }

}  // namespace

void Grid::add(int32_t entry, Work work, int64_t count) {
  segments.push_back({entry, work});
  items += count;
  if (items > INT32_MAX) throw std::runtime_error("the parameters have too many elements for one launch");
  first_item.push_back(static_cast<uint32_t>(items));
  segment_of.resize(items, static_cast<uint32_t>(segments.size() - 1));
}

void Grid::add_kind(uint64_t kind) {
  const auto at = std::lower_bound(kinds.begin(), kinds.end(), kind);
  if (at == kinds.end() || *at != kind) kinds.insert(at, kind);
}

GpuExecutor::GpuExecutor(int rule, std::unique_ptr<Launcher> launcher, Settings settings)
    : rule_(rule), info_(rule_info(rule)), launcher_(std::move(launcher)), settings_(settings) {}

// ---- tables: when something changed ----

// Whether the entry has all that a step needs. Otherwise it has had no gradient yet.
bool GpuExecutor::steppable(const Entry& e, int variant) const {
  if (!e.param && e.numel > 0) return false;
  if (info_.has_step && !e.step) return false;
  if (info_.next_scalar_state && !e.scalar_state) return false;
  for (int k = 0; k < kStates; ++k)
    if (info_.uses(variant, k) && !e.state[k] && e.numel > 0) return false;
  return true;
}

bool GpuExecutor::mixed(const Entry& e, int variant) const {
  bool any = e.param_dtype == DType::f64 || e.grad_dtype == DType::f64;
  for (int k = 0; k < kStates; ++k) any = any || (info_.uses(variant, k) && e.state_dtype[k] == DType::f64);
  return any;
}

// The innermost dimension first; strides of operands that are not used are zeros.
int64_t GpuExecutor::add_layout(const Layout& l, int variant) {
  const int64_t start = static_cast<int64_t>(layouts_.size());
  layouts_.push_back(static_cast<int64_t>(l.sizes.size()));
  for (size_t d = l.sizes.size(); d-- > 0;) {
    layouts_.insert(layouts_.end(), {l.sizes[d], l.param[d], l.grad[d]});
    for (int k = 0; k < kStates; ++k) layouts_.push_back(info_.uses(variant, k) ? l.state[k][d] : 0);
  }
  return start;
}

// The larger, the fewer searches and powers; but every multiprocessor should get many.
void GpuExecutor::make_elementwise_grids(const std::vector<Entry>& entries) {
  constexpr int64_t kSmallest = 2048, kLargest = 16384, kChunksWanted = 132 * kBlocksPerSM * 8;
  int64_t total = 0;
  for (const Entry& e : entries) total += e.numel;
  int64_t chunk = kSmallest;
  while (chunk < kLargest && total / chunk > kChunksWanted) chunk *= 2;
  args_.chunk = chunk;
  for (size_t i = 0; i < entries.size(); ++i) {
    if (variant_[i] < 0) continue;
    grid_[kUpdates + mixed(entries[i], variant_[i])].add(static_cast<int32_t>(i), Work::update,
                                                         std::max<int64_t>((entries[i].numel + chunk - 1) / chunk, 1));
  }
}

// Window by window: the sums of a window's tensors come one window before their updates, so that hardly a block waits;
// two windows of gradients stay within half of the L2. Updates go through a window backwards.
void GpuExecutor::make_norm_grids(const std::vector<Entry>& entries) {
  const int64_t window_bytes = launcher_->l2_bytes() / std::max<int64_t>(tuning.norm_windows, 1);
  for (int g = 0; g < 2; ++g) {
    Grid& grid = grid_[kUpdates + g];
    std::vector<int32_t> before, window;
    int64_t bytes = 0;
    const auto updates = [&](const std::vector<int32_t>& of) {
      for (size_t k = of.size(); k-- > 0;) {
        const int64_t parts = parts_of(entries[of[k]].numel);
        grid.add(of[k], parts > 1 ? Work::apply : Work::sum_apply, parts);
      }
    };
    const auto close = [&] {
      for (int32_t i : window)
        if (const int64_t parts = parts_of(entries[i].numel); parts > 1) grid.add(i, Work::sum, parts);
      updates(before);
      before = std::move(window);
      window.clear();
      bytes = 0;
    };
    for (size_t i = 0; i < entries.size(); ++i) {
      const Entry& e = entries[i];
      if (variant_[i] < 0 || mixed(e, variant_[i]) != (g == 1)) continue;
      window.push_back(static_cast<int32_t>(i));
      bytes += e.numel * size_of(e.grad_dtype);
      if (bytes > window_bytes) close();
    }
    close();
    updates(before);
  }
}

// For the norm of all gradients: each tensor's sum in parts, whatever its rule does.
void GpuExecutor::make_global_norm_grids(const std::vector<Entry>& entries) {
  args_.entries = static_cast<int32_t>(entries.size());
  args_.tensors = 0;
  for (size_t i = 0; i < entries.size(); ++i) {
    if (variant_[i] < 0) continue;
    const Entry& e = entries[i];
    Grid& grid = grid_[mixed(e, variant_[i])];
    grid.add(static_cast<int32_t>(i), Work::sum, parts_of(e.numel));
    grid.add_kind(static_cast<uint64_t>(e.param_dtype) | static_cast<uint64_t>(e.grad_dtype) << 8);
    ++args_.tensors;
  }
}

// What blocks tell each other.
void GpuExecutor::make_control(const std::vector<Entry>& entries, void* stream) {
  first_partial_.assign(entries.size(), 0);
  first_node_.assign(entries.size(), 0);
  int64_t partials = 0, nodes = 0;
  for (size_t i = 0; (info_.needs_norm || sums_all_) && i < entries.size(); ++i) {
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
  std::vector<EntryControl> control(entries.size());
  Packer packer;
  const int64_t at_launch = packer.add(std::vector<LaunchControl>(1)), at_control = packer.add(control);
  const int64_t at_nodes = packer.add(std::vector<uint32_t>(nodes));
  const int64_t at_sums =
      packer.add(std::vector<double>(sums_all_ ? entries.size() : 0));  // of tensors never summed: 0
  const int64_t at_partials = static_cast<int64_t>(packer.bytes.size());
  const Memory memory = allocate(at_partials + partials * 8, stream);
  launcher_->upload(memory, 0, packer.bytes.data(), packer.bytes.size(), stream);
  if (captured_any_) captured_.push_back(std::move(control_memory_));
  control_memory_ = memory;
  control_sums_all_ = sums_all_;
  tables_.launch = reinterpret_cast<LaunchControl*>(control_memory_.at(at_launch));
  tables_.control = reinterpret_cast<EntryControl*>(control_memory_.at(at_control));
  tables_.nodes = reinterpret_cast<uint32_t*>(control_memory_.at(at_nodes));
  tables_.sums = reinterpret_cast<double*>(control_memory_.at(at_sums));
  tables_.partials = reinterpret_cast<double*>(control_memory_.at(at_partials));
}

Memory GpuExecutor::allocate(int64_t bytes, void* stream) {
  Memory memory = launcher_->allocate(bytes);
  memory.stream = stream;
  return memory;
}

// Called for every step: a step may come on another stream than the one before.
void GpuExecutor::note_use(Memory& memory, void* stream) {
  if (!memory.owner || memory.stream == stream) return;
  for (void* known : memory.elsewhere)
    if (known == stream) return;
  launcher_->used_on(memory, stream);
  memory.elsewhere.push_back(stream);
}

void GpuExecutor::make_tables(const std::vector<Entry>& entries, const std::vector<HyperRow>& rows, void* stream) {
  if (capturing_)
    throw std::runtime_error(
        "this step cannot be captured in a CUDA graph, because it sets up tables: take a step before the capture, and "
        "none that changes dtypes or memory layouts in between");
  if (!tables_.control || (sums_all_ && !control_sums_all_)) make_control(entries, stream);
  if (captured_any_) captured_.push_back(std::move(table_memory_));
  layouts_.clear();
  variant_.assign(entries.size(), -1);
  for (size_t g = 0; g < kGrids; ++g) {
    grid_[g] = Grid{};
    grid_[g].norms = g < kUpdates;
    grid_[g].mixed = g % 2 == 1;
  }
  std::vector<DeviceEntry> table(entries.size());
  for (size_t i = 0; i < entries.size(); ++i) {
    const Entry& e = entries[i];
    const int variant = info_.variant(rows[e.group].value);
    if (!steppable(e, variant)) continue;
    variant_[i] = variant;
    DeviceEntry& d = table[i];
    d.param = e.param;
    d.step = e.step;
    d.scalar_state = e.scalar_state;
    d.numel = e.numel;
    // The same for both where there are both.
    const int64_t layout = e.sum_layout ? add_layout(*e.sum_layout, variant) : -1;
    d.layout = e.layout ? layout : -1;
    d.sum_layout = layout;
    d.partials = first_partial_[i];
    d.nodes = first_node_[i];
    d.group = e.group;
    d.param_dtype = e.param_dtype;
    d.grad_dtype = e.grad_dtype;
    d.step_dtype = e.step_dtype;
    d.variant = static_cast<uint8_t>(variant % kWithEma);
    for (int k = 0; k < kStates; ++k) {
      if (!info_.uses(variant, k)) continue;
      d.state[k] = e.state[k];
      if (k < kMaxSlots) d.state_dtype[k] = e.state_dtype[k];
      d.uses |= 1 << k;
    }
    grid_[kUpdates + mixed(e, variant)].add_kind(d.kind());
  }
  if (info_.needs_norm)
    make_norm_grids(entries);
  else
    make_elementwise_grids(entries);
  if (sums_all_) make_global_norm_grids(entries);
  for (const Grid& grid : grid_)
    if (grid.items > 0) launcher_->prepare(grid.norms ? kNormOfAll : rule_, grid.kinds);
  Packer packer;
  const int64_t at_entries = packer.add(table), at_layouts = packer.add(layouts_);
  int64_t at_first[kGrids], at_segments[kGrids], at_segment_of[kGrids];
  for (size_t g = 0; g < kGrids; ++g) {
    at_first[g] = packer.add(grid_[g].first_item);
    at_segments[g] = packer.add(grid_[g].segments);
    at_segment_of[g] = packer.add(grid_[g].segment_of);
  }
  table_memory_ = allocate(static_cast<int64_t>(packer.bytes.size()), stream);
  launcher_->upload(table_memory_, 0, packer.bytes.data(), packer.bytes.size(), stream);
  tables_.entries = reinterpret_cast<DeviceEntry*>(table_memory_.at(at_entries));
  tables_.layouts = reinterpret_cast<int64_t*>(table_memory_.at(at_layouts));
  for (size_t g = 0; g < kGrids; ++g) {
    first_item_[g] = reinterpret_cast<uint32_t*>(table_memory_.at(at_first[g]));
    segments_[g] = reinterpret_cast<Segment*>(table_memory_.at(at_segments[g]));
    segment_of_[g] = reinterpret_cast<uint32_t*>(table_memory_.at(at_segment_of[g]));
  }
  const int64_t words = static_cast<int64_t>(entries.size() + rows.size() * info_.hypers);
  if (!launcher_->by_value())
    words_memory_ = allocate(words * 8 + kGrids * sizeof(StepHeader), stream);
  else if (words > kInlineWords)
    words_memory_ = allocate(words * 8, stream);
  uploaded_grads_.clear();
  uploaded_rows_.clear();
  tables_valid_ = true;
}

// ---- every step ----

void GpuExecutor::gather_words(const std::vector<Entry>& entries, const std::vector<HyperRow>& rows) {
  const int64_t n = static_cast<int64_t>(entries.size()), width = info_.hypers;
  words_.resize(n + static_cast<int64_t>(rows.size()) * width);
  for (int64_t i = 0; i < n; ++i) {
    const Entry& e = entries[i];
    words_[i] = e.active ? kActive | (e.first ? kFirst : 0) | reinterpret_cast<uintptr_t>(e.grad) : 0;
  }
  for (size_t r = 0; r < rows.size(); ++r) std::memcpy(&words_[n + r * width], rows[r].value, width * 8);
  args_.tables = tables_;
  args_.row_words = static_cast<int32_t>(width);
}

// Words too many for the arguments, in device memory. Uploaded if they changed; a captured step gets a table of its
// own, whose values the graph keeps.
const uint64_t* GpuExecutor::table_of_words(std::vector<uint64_t>& last, const uint64_t* words, int64_t count,
                                            int64_t offset, void* stream) {
  if (capturing_) {
    captured_.push_back(allocate(count * 8, stream));
    launcher_->write(captured_.back(), words, count * 8, stream);
    return reinterpret_cast<const uint64_t*>(captured_.back().at(0));
  }
  if (static_cast<int64_t>(last.size()) != count || std::memcmp(last.data(), words, count * 8) != 0) {
    last.clear();
    launcher_->upload(words_memory_, offset * 8, words, count * 8, stream);
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
  if (capturing_) captured_.push_back(allocate((count + kGrids * kHeaderWords) * 8, stream));
  const Memory& memory = capturing_ ? captured_.back() : words_memory_;
  args_.grads = reinterpret_cast<const uint64_t*>(memory.at(0));
  args_.rows = reinterpret_cast<const uint64_t*>(memory.at(entries * 8));
  words_.resize(count + kGrids * kHeaderWords);
  for (size_t g = 0; g < kGrids; ++g) {
    choose_grid(g);
    std::memcpy(words_.data() + count + g * kHeaderWords, static_cast<StepHeader*>(&args_), sizeof(StepHeader));
  }
  const int64_t bytes = static_cast<int64_t>(words_.size()) * 8;
  if (capturing_) {
    launcher_->write(memory, words_.data(), bytes, stream);
  } else if (words_ != uploaded_grads_) {
    uploaded_grads_.clear();
    launcher_->upload(memory, 0, words_.data(), bytes, stream);
    uploaded_grads_ = words_;
  }
  return reinterpret_cast<const StepHeader*>(memory.at(count * 8));
}

void GpuExecutor::choose_grid(size_t g) {
  args_.tables.first_item = first_item_[g];
  args_.tables.segments = segments_[g];
  args_.tables.segment_of = segment_of_[g];
  args_.items = static_cast<uint32_t>(grid_[g].items);
}

// A launch that fails may leave counters of the one before as no other step may find them.
void GpuExecutor::launch_all(const StepHeader* headers, void* stream) {
  try {
    for (size_t g = 0; g < kGrids; ++g) {
      const Grid& grid = grid_[g];
      if (grid.items == 0 || !(grid.norms || settings_.update)) continue;
      choose_grid(g);
      const Launch launch{grid.norms ? kNormOfAll : rule_, grid.mixed, static_cast<uint32_t>(grid.items), grid.kinds,
                          stream};
      launcher_->step(launch, args_, headers ? headers + g : nullptr);
    }
  } catch (...) {
    tables_valid_ = false;
    tables_.control = nullptr;
    throw;
  }
}

void GpuExecutor::run(std::vector<Entry>& entries, const std::vector<HyperRow>& rows, const OnDevice& on_device,
                      const std::function<void()>& on_caller) {
  void* stream = reinterpret_cast<void*>(on_device.stream);
  capturing_ = launcher_->capturing(stream);
  args_.grad_scale = reinterpret_cast<const float*>(on_device.grad_scale);
  args_.found_inf = reinterpret_cast<const float*>(on_device.found_inf);
  args_.norm_stats = settings_.norm_stats;
  const bool sums_all = needs_global_norm(rows, settings_);
  args_.flags = (settings_.skip_nonfinite ? kSkipNonfinite : 0) | (settings_.zero_grad ? kZeroGrad : 0) |
                (any_f64(entries) ? kNormInF64 : 0) | (tuning.overlap && sums_all && !capturing_ ? kOverlap : 0);
  tables_valid_ = tables_valid_ && sums_all == sums_all_;
  sums_all_ = sums_all;
  if (!tables_valid_) make_tables(entries, rows, stream);
  captured_any_ = captured_any_ || capturing_;
  for (Memory* memory : {&table_memory_, &control_memory_, &words_memory_}) {
    note_use(*memory, stream);
    if (capturing_) note_use(*memory, nullptr);  // where a graph is usually replayed
  }
  gather_words(entries, rows);
  const int64_t n = static_cast<int64_t>(entries.size());
  const StepHeader* headers = nullptr;
  if (launcher_->by_value())
    pack_by_value(n, stream);
  else
    headers = pack_in_memory(n, stream);
  launch_all(headers, stream);
  on_caller();
  for (Entry& e : entries)
    if (e.active) e.first = false;
}

}  // namespace fusedoptim::cuda
