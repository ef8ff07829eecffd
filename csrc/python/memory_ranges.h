// Whether gradients that a step writes to may share memory with each other or with parameters and states. In doubt it
// says so; Python then looks at every element.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "../core/dtype.h"
#include "tensor_facts.h"

namespace fusedoptim {

class MemoryRanges {
 public:
  // size: of an element.
  void add(const void* data, int64_t size, int ndim, const int64_t* sizes, const int64_t* strides) {
    int64_t elements = 1;
    for (int d = 0; d < ndim; ++d) {
      if (sizes[d] == 0) return;
      elements += (sizes[d] - 1) * strides[d];
    }
    dense_ = dense_ && dense(ndim, sizes, strides);
    const auto begin = reinterpret_cast<uintptr_t>(data);
    ranges_.push_back({begin, begin + static_cast<uintptr_t>(elements * size)});
  }
  void clear() {
    ranges_.clear();
    dense_ = true;
  }
  void sort() { std::sort(ranges_.begin(), ranges_.end()); }

  // Both sorted. Whether one of these lies apart from all others of them and from all of `others`, and has no gaps.
  bool apart_from(const MemoryRanges& others) const {
    if (!dense_) return false;
    for (size_t i = 1; i < ranges_.size(); ++i)
      if (ranges_[i].first < ranges_[i - 1].second) return false;
    size_t k = 0;
    uintptr_t reach = 0;  // of the others that begin before
    for (const auto& [begin, end] : ranges_) {
      for (; k < others.ranges_.size() && others.ranges_[k].first < end; ++k)
        reach = std::max(reach, others.ranges_[k].second);
      if (reach > begin) return false;
    }
    return true;
  }

 private:
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges_;
  bool dense_ = true;
};

}  // namespace fusedoptim
