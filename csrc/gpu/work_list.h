// The work of one launch: segments of items, one after another.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "table.h"

namespace fusedoptim::gpu {

struct WorkList {
  std::vector<Segment> segments;
  std::vector<uint32_t> first_item{0}, segment_of;
  int64_t items = 0;

  void add(int32_t entry, Work work, int64_t count) {
    segments.push_back({entry, work});
    items += count;
    if (items > INT32_MAX) throw std::runtime_error("the parameters have too many elements for one launch");
    first_item.push_back(static_cast<uint32_t>(items));
    segment_of.resize(items, static_cast<uint32_t>(segments.size() - 1));
  }
};

inline int64_t parts_of(int64_t numel) { return std::max<int64_t>((numel + kPart - 1) / kPart, 1); }

// An entry as a work list needs it.
struct Sized {
  int32_t entry;
  int64_t numel, summed_bytes;  // of what a rule's sums look at
};

// Elementwise updates, in chunks.
inline void add_updates(WorkList& list, const std::vector<Sized>& entries, int64_t chunk) {
  for (const Sized& e : entries) list.add(e.entry, Work::update, std::max<int64_t>((e.numel + chunk - 1) / chunk, 1));
}

// Sums alone, of each entry.
inline void add_sums(WorkList& list, const std::vector<Sized>& entries) {
  for (const Sized& e : entries) list.add(e.entry, Work::sum, parts_of(e.numel));
}

// Sums and updates, window by window: the sums of a window's tensors come one window before their updates, so that
// few blocks wait; what is summed of two windows stays within half of the L2, more or less: a window ends with the
// tensor that exceeds it. Updates go through a window backwards.
inline void add_sums_and_updates(WorkList& list, const std::vector<Sized>& entries, int64_t window_bytes) {
  std::vector<Sized> before, window;
  int64_t bytes = 0;
  const auto updates = [&](const std::vector<Sized>& of) {
    for (size_t k = of.size(); k-- > 0;) {
      const int64_t parts = parts_of(of[k].numel);
      list.add(of[k].entry, parts > 1 ? Work::apply : Work::sum_apply, parts);
    }
  };
  const auto close = [&] {
    for (const Sized& e : window)
      if (const int64_t parts = parts_of(e.numel); parts > 1) list.add(e.entry, Work::sum, parts);
    updates(before);
    before = std::move(window);
    window.clear();
    bytes = 0;
  };
  for (const Sized& e : entries) {
    window.push_back(e);
    bytes += e.summed_bytes;
    if (bytes > window_bytes) close();
  }
  close();
  updates(before);
}

}  // namespace fusedoptim::gpu
