// How a step is cut into pieces for a GPU. Variables wait for a measurement there: benchmarks/ab.py steps with each
// value in turn, in one process.
#pragma once

#include <cstdint>
#include <cstring>

namespace fusedoptim::gpu {

// Elements of an item of an elementwise update: the larger, the fewer searches and powers; but every multiprocessor
// should get many.
inline constexpr int64_t kSmallestChunk = 2048, kLargestChunk = 16384, kChunksPerMultiprocessor = 40;

struct Tuning {
  int64_t norm_windows = 8;  // a window of gradients that are summed before their updates is such a part of the L2

  int64_t* find(const char* name) {
    if (std::strcmp(name, "norm_windows") == 0) return &norm_windows;
    return nullptr;
  }
};

inline Tuning tuning;

}  // namespace fusedoptim::gpu
