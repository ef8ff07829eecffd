#include "executor.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fusedoptim::cuda {

const Api* api = nullptr;

namespace {

void require(const char* error) {
  if (error) throw std::runtime_error(std::string("CUDA: ") + error);
}

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

DeviceBuffer::DeviceBuffer(int32_t device, int64_t bytes) {
  using torch::headeronly::ScalarType;
  const torch::stable::Device where = api->on_host ? torch::stable::Device(torch::headeronly::DeviceType::CPU)
                                                   : torch::stable::Device(torch::headeronly::DeviceType::CUDA, device);
  const int64_t words = std::max<int64_t>(bytes, 16) / 8 + 1;
  tensor_ = torch::stable::empty({words}, ScalarType::Long, std::nullopt, where);
  address_ = static_cast<char*>(tensor_->mutable_data_ptr());
}

void Grid::add(int32_t entry, Work work, int64_t count) {
  segments.push_back({entry, work});
  items += count;
  if (items > INT32_MAX) throw std::runtime_error("the parameters have too many elements for one launch");
  first_item.push_back(static_cast<uint32_t>(items));
}

CudaExecutor::CudaExecutor(int rule, int32_t device) : rule_(rule), info_(rule_info(rule)), device_(device) {
  if (!api) throw std::runtime_error("the CUDA kernels are not loaded");
}

// ---- tables: when something changed ----

// Whether the entry has all that a step needs. Otherwise it has had no gradient yet.
bool CudaExecutor::steppable(const Entry& e, int variant) const {
  if (!e.param && e.numel > 0) return false;
  if (info_.has_step && !e.step) return false;
  if (info_.next_scalar_state && !e.scalar_state) return false;
  for (int k = 0; k < info_.slots; ++k)
    if (info_.uses(variant, k) && !e.state[k] && e.numel > 0) return false;
  return true;
}

bool CudaExecutor::mixed(const Entry& e, int variant) const {
  bool any = e.param_dtype == DType::f64 || e.grad_dtype == DType::f64;
  for (int k = 0; k < info_.slots; ++k) any = any || (info_.uses(variant, k) && e.state_dtype[k] == DType::f64);
  return any;
}

// Dimensions of size 1 are left out, and neighbours merged that every operand runs through as if they were one.
int64_t CudaExecutor::add_layout(const Entry& e, int variant) {
  const Layout& l = *e.layout;
  struct Dim {
    int64_t size, stride[kOperands];
  };
  std::vector<Dim> dims;  // the innermost first
  for (size_t d = l.sizes.size(); d-- > 0;) {
    if (l.sizes[d] == 1) continue;
    Dim dim{l.sizes[d], {l.param[d], l.grad[d]}};
    for (int k = 0; k < info_.slots; ++k)
      if (info_.uses(variant, k)) dim.stride[kFirstState + k] = l.state[k][d];
    bool merges = !dims.empty();
    for (int k = 0; merges && k < kOperands; ++k) merges = dim.stride[k] == dims.back().stride[k] * dims.back().size;
    if (merges)
      dims.back().size *= dim.size;
    else
      dims.push_back(dim);
  }
  const int64_t start = static_cast<int64_t>(layouts_.size());
  layouts_.push_back(static_cast<int64_t>(dims.size()));
  for (const Dim& dim : dims) {
    layouts_.push_back(dim.size);
    layouts_.insert(layouts_.end(), dim.stride, dim.stride + kOperands);
  }
  return start;
}

// The larger, the fewer searches and powers; but every multiprocessor should get many.
void CudaExecutor::make_elementwise_grids(const std::vector<Entry>& entries) {
  constexpr int64_t kSmallest = 2048, kLargest = 16384, kChunksWanted = 132 * kBlocksPerSM * 8;
  int64_t total = 0;
  for (const Entry& e : entries) total += e.numel;
  int64_t chunk = kSmallest;
  while (chunk < kLargest && total / chunk > kChunksWanted) chunk *= 2;
  args_.chunk = chunk;
  for (size_t i = 0; i < entries.size(); ++i) {
    if (variant_[i] < 0) continue;
    grid_[mixed(entries[i], variant_[i])].add(static_cast<int32_t>(i), Work::update,
                                              std::max<int64_t>((entries[i].numel + chunk - 1) / chunk, 1));
  }
}

// Window by window: the sums of a window's tensors come one window before their updates, so that hardly a block waits;
// two windows of gradients stay within half of the L2. Updates go through a window backwards.
void CudaExecutor::make_norm_grids(const std::vector<Entry>& entries) {
  const int64_t window_bytes = api->l2_bytes(device_) / 4;
  for (int g = 0; g < 2; ++g) {
    std::vector<int32_t> before, window;
    int64_t bytes = 0;
    const auto updates = [&](const std::vector<int32_t>& of) {
      for (size_t k = of.size(); k-- > 0;) {
        const int64_t parts = parts_of(entries[of[k]].numel);
        grid_[g].add(of[k], parts > 1 ? Work::apply : Work::sum_apply, parts);
      }
    };
    const auto close = [&] {
      for (int32_t i : window)
        if (const int64_t parts = parts_of(entries[i].numel); parts > 1) grid_[g].add(i, Work::sum, parts);
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

// What blocks tell each other. It outlives the tables: whether a tensor's first step was taken, only the device knows.
void CudaExecutor::make_control(const std::vector<Entry>& entries, void* stream) {
  first_partial_.assign(entries.size(), 0);
  first_node_.assign(entries.size(), 0);
  int64_t partials = 0, nodes = 0;
  for (size_t i = 0; info_.needs_norm && i < entries.size(); ++i) {
    first_partial_[i] = partials;
    first_node_[i] = static_cast<int32_t>(nodes);
    if (parts_of(entries[i].numel) == 1) continue;
    for (int64_t count = tiles(entries[i].numel); count > 1;) {
      partials += count;
      count = tiles(count);
      nodes += count;
    }
  }
  std::vector<EntryControl> control(entries.size());
  for (size_t i = 0; i < entries.size(); ++i) control[i].absent = entries[i].first;
  Packer packer;
  const int64_t at_launch = packer.add(std::vector<LaunchControl>(1)), at_control = packer.add(control);
  const int64_t at_nodes = packer.add(std::vector<uint32_t>(nodes));
  const int64_t at_partials = static_cast<int64_t>(packer.bytes.size());
  control_memory_ = DeviceBuffer(device_, at_partials + partials * 8);
  require(api->upload(device_, control_memory_.at(0), packer.bytes.data(), packer.bytes.size(), stream));
  tables_.launch = reinterpret_cast<LaunchControl*>(control_memory_.at(at_launch));
  tables_.control = reinterpret_cast<EntryControl*>(control_memory_.at(at_control));
  tables_.nodes = reinterpret_cast<uint32_t*>(control_memory_.at(at_nodes));
  tables_.partials = reinterpret_cast<double*>(control_memory_.at(at_partials));
}

void CudaExecutor::make_tables(const std::vector<Entry>& entries, const std::vector<HyperRow>& rows, void* stream) {
  if (api->capturing(stream))
    throw std::runtime_error(
        "this step cannot be captured in a CUDA graph, because it sets up tables: take a step before the capture, and "
        "none that changes dtypes or memory layouts in between");
  if (!tables_.control) make_control(entries, stream);
  if (captured_any_) {
    captured_.push_back(std::move(table_memory_));
    captured_.push_back(std::move(words_memory_));
  }
  layouts_.clear();
  variant_.assign(entries.size(), -1);
  grid_[0] = grid_[1] = Grid{};
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
    d.layout = e.layout ? add_layout(e, variant) : -1;
    d.partials = first_partial_[i];
    d.nodes = first_node_[i];
    d.group = e.group;
    d.param_dtype = e.param_dtype;
    d.grad_dtype = e.grad_dtype;
    d.step_dtype = e.step_dtype;
    d.variant = static_cast<uint8_t>(variant);
    for (int k = 0; k < kMaxSlots; ++k) {
      d.state[k] = e.state[k];
      d.state_dtype[k] = e.state_dtype[k];
    }
  }
  if (info_.needs_norm)
    make_norm_grids(entries);
  else
    make_elementwise_grids(entries);
  Packer packer;
  const int64_t at_entries = packer.add(table), at_layouts = packer.add(layouts_);
  int64_t at_first[2], at_segments[2];
  for (int g = 0; g < 2; ++g) {
    at_first[g] = packer.add(grid_[g].first_item);
    at_segments[g] = packer.add(grid_[g].segments);
  }
  table_memory_ = DeviceBuffer(device_, static_cast<int64_t>(packer.bytes.size()));
  require(api->upload(device_, table_memory_.at(0), packer.bytes.data(), packer.bytes.size(), stream));
  tables_.entries = reinterpret_cast<DeviceEntry*>(table_memory_.at(at_entries));
  tables_.layouts = reinterpret_cast<int64_t*>(table_memory_.at(at_layouts));
  for (int g = 0; g < 2; ++g) {
    first_item_[g] = reinterpret_cast<uint32_t*>(table_memory_.at(at_first[g]));
    segments_[g] = reinterpret_cast<Segment*>(table_memory_.at(at_segments[g]));
  }
  const int64_t words = static_cast<int64_t>(entries.size() + rows.size() * info_.hypers);
  if (words > kInlineWords) words_memory_ = DeviceBuffer(device_, words * 8);
  uploaded_grads_.clear();
  uploaded_rows_.clear();
  tables_valid_ = true;
}

// ---- every step ----

// Words too many for the arguments, in device memory. Uploaded if they changed; a captured step gets a table of its
// own, written by a kernel whose arguments the graph keeps.
const uint64_t* CudaExecutor::table_of_words(std::vector<uint64_t>& last, const uint64_t* words, int64_t count,
                                             int64_t offset, void* stream) {
  if (api->capturing(stream)) {
    captured_.emplace_back(device_, count * 8);
    require(api->write(device_, captured_.back().at(0), words, count * 8, stream));
    return reinterpret_cast<const uint64_t*>(captured_.back().at(0));
  }
  char* to = words_memory_.at(offset * 8);
  if (static_cast<int64_t>(last.size()) != count || std::memcmp(last.data(), words, count * 8) != 0) {
    last.clear();
    require(api->upload(device_, to, words, count * 8, stream));
    last.assign(words, words + count);
  }
  return reinterpret_cast<const uint64_t*>(to);
}

void CudaExecutor::pack(const std::vector<Entry>& entries, const std::vector<HyperRow>& rows, void* stream) {
  const int64_t n = static_cast<int64_t>(entries.size()), width = info_.hypers;
  const int64_t row_words = static_cast<int64_t>(rows.size()) * width;
  words_.resize(n + row_words);
  for (int64_t i = 0; i < n; ++i) {
    const Entry& e = entries[i];
    words_[i] = e.active ? kActive | reinterpret_cast<uintptr_t>(e.grad) : 0;
  }
  for (size_t r = 0; r < rows.size(); ++r) std::memcpy(&words_[n + r * width], rows[r].value, width * 8);
  args_.tables = tables_;
  args_.row_words = static_cast<int32_t>(width);
  // What is small goes by value, the gradients first: they change most often.
  int64_t used = 0;
  const auto place = [&](const uint64_t* from, int64_t count, int32_t& start, std::vector<uint64_t>& last,
                         int64_t offset) -> const uint64_t* {
    if (used + count > kInlineWords) return table_of_words(last, from, count, offset, stream);
    std::memcpy(args_.words + used, from, count * 8);
    start = static_cast<int32_t>(used);
    used += count;
    return nullptr;
  };
  args_.grads = place(words_.data(), n, args_.inline_grads, uploaded_grads_, 0);
  args_.rows = place(words_.data() + n, row_words, args_.inline_rows, uploaded_rows_, n);
}

void CudaExecutor::run(std::vector<Entry>& entries, const std::vector<HyperRow>& rows, const OnDevice& on_device,
                       const std::function<void()>& on_caller) {
  void* stream = reinterpret_cast<void*>(on_device.stream);
  args_.grad_scale = reinterpret_cast<const float*>(on_device.grad_scale);
  args_.found_inf = reinterpret_cast<const float*>(on_device.found_inf);
  if (!tables_valid_) make_tables(entries, rows, stream);
  captured_any_ = captured_any_ || api->capturing(stream);
  pack(entries, rows, stream);
  on_caller();
  for (int g = 0; g < 2; ++g) {
    if (grid_[g].items == 0) continue;
    args_.tables.first_item = first_item_[g];
    args_.tables.segments = segments_[g];
    args_.segments = static_cast<int32_t>(grid_[g].segments.size());
    require(api->step(device_, rule_, g, args_, static_cast<uint32_t>(grid_[g].items), stream));
  }
  for (Entry& e : entries)
    if (e.active) e.first = false;
}

}  // namespace fusedoptim::cuda
