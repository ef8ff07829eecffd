// Choices that wait for a measurement on a GPU: benchmarks/ab.py steps with each value in turn, in one process.
#pragma once

#include <cstdint>
#include <cstring>

namespace fusedoptim::cuda {

struct Tuning {
  int64_t norm_windows = 4;  // a window of gradients that are summed before their updates is such a part of the L2
  int64_t overlap = 0;       // the launch that updates begins while the one that sums for the norm ends

  int64_t* find(const char* name) {
    if (std::strcmp(name, "norm_windows") == 0) return &norm_windows;
    if (std::strcmp(name, "overlap") == 0) return &overlap;
    return nullptr;
  }
};

inline Tuning tuning;

}  // namespace fusedoptim::cuda
