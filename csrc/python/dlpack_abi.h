// The part of DLPack 1.x's binary interface that is used here (dmlc.github.io/dlpack). torch's copy of the header
// cannot be included together with its stable ABI.
#pragma once

#include <cstdint>

namespace fusedoptim::dlpack {

inline constexpr uint32_t kMajorVersion = 1;
inline constexpr int32_t kCpu = 1, kCuda = 2;
inline constexpr uint8_t kFloat = 2, kBfloat = 4;

struct Device {
  int32_t type, id;
  bool operator==(const Device& other) const { return type == other.type && id == other.id; }
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
// Fills a Tensor that borrows from the Python object; 0 on success, else a Python error is set.
using TensorFromPython = int (*)(void* object, Tensor* out);
struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void *allocate, *managed_from_python, *managed_to_python;
  TensorFromPython tensor_from_python;
  void* current_stream;
};

}  // namespace fusedoptim::dlpack
