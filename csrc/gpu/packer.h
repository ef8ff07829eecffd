// Bytes of one table, section by section.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace fusedoptim::gpu {

class Packer {
 public:
  // Returns where the section starts: at a multiple of 16.
  template <class T>
  int64_t add(const std::vector<T>& section) {
    const int64_t start = size();
    bytes_.resize((start + section.size() * sizeof(T) + 15) / 16 * 16);
    if (!section.empty()) std::memcpy(bytes_.data() + start, section.data(), section.size() * sizeof(T));
    return start;
  }
  const char* data() const { return bytes_.data(); }
  int64_t size() const { return static_cast<int64_t>(bytes_.size()); }

 private:
  std::vector<char> bytes_;
};

}  // namespace fusedoptim::gpu
