// Cuts the active tensors of a table into chunks of about equal cost, so that many small tensors share a chunk and a
// large one is shared by many threads. Chunk borders never affect results.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../core/sum_of_squares.h"
#include "../core/tensor_table.h"
#include "tuning.h"

namespace fusedoptim {

struct Mark {
  int64_t entry, offset;
};

// Entries [entry_begin, entry_end), cut into chunks [chunk_begin, chunk_end). A rule that needs a norm reads every
// gradient twice; it goes through the table window by window, so that the second reading finds it in the cache.
struct Window {
  int64_t entry_begin, entry_end, chunk_begin, chunk_end;
};

struct Schedule {
  std::vector<Mark> marks;  // chunk k runs from marks[k] to marks[k+1]
  std::vector<Window> windows;
  int64_t cost = 0;

  static int64_t factor_of(const Entry& e) { return e.layout ? tuning::kStridedFactor : 1; }

  void build(const std::vector<Entry>& entries, int64_t threads, int64_t window_elements) {
    const int64_t n = static_cast<int64_t>(entries.size());
    marks.clear();
    windows.clear();
    cost = 0;
    for (const Entry& e : entries)
      if (e.active) cost += tuning::kTensorCost + e.numel * factor_of(e);
    const int64_t chunk = std::clamp(std::min(cost, window_elements) / (threads * tuning::kChunksPerThread),
                                     tuning::kMinChunk, tuning::kMaxChunk);
    int64_t in_chunk = 0, in_window = 0;
    Window window{0, 0, 0, 0};
    marks.push_back({0, 0});
    const auto close_chunk = [&](int64_t entry, int64_t offset) {
      if (marks.back().entry != entry || marks.back().offset != offset) marks.push_back({entry, offset});
      in_chunk = 0;
    };
    const auto close_window = [&](int64_t entry) {
      close_chunk(entry, 0);
      window.entry_end = entry;
      window.chunk_end = static_cast<int64_t>(marks.size()) - 1;
      if (window.entry_end > window.entry_begin) windows.push_back(window);
      window = {entry, entry, window.chunk_end, window.chunk_end};
      in_window = 0;
    };
    for (int64_t i = 0; i < n; ++i) {
      const Entry& e = entries[i];
      if (!e.active) continue;
      if (in_window > 0 && in_window + e.numel > window_elements) close_window(i);
      in_window += e.numel;
      in_chunk += tuning::kTensorCost;
      const int64_t factor = factor_of(e);
      for (int64_t offset = 0; offset < e.numel;) {
        const int64_t room = tiles(std::max<int64_t>(chunk - in_chunk, 1) / factor + 1) * kTile;
        const int64_t take = std::min(room, e.numel - offset);
        offset += take;
        in_chunk += take * factor;
        if (in_chunk >= chunk) close_chunk(offset == e.numel ? i + 1 : i, offset == e.numel ? 0 : offset);
      }
      if (in_chunk >= chunk) close_chunk(i + 1, 0);
    }
    close_window(n);
  }
};

}  // namespace fusedoptim
