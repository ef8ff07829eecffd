// Stands for _C_cuda and launches nothing: what remains of a step is the host's part. Tensors on the CPU stand for
// those on a GPU. Compiled by no_launch.py.
#include <cstring>

#include "../../csrc/cuda/api.h"

namespace {

using namespace fusedoptim;
using namespace fusedoptim::cuda;
using namespace fusedoptim::gpu;

const char* copy(int32_t, void* to, const void* from, size_t bytes, void*) {
  std::memcpy(to, from, bytes);
  return nullptr;
}

Api make() {
  Api api{};
  api.version = kApiVersion;
  api.on_host = 1;
  api.argument_bytes = sizeof(StepArgs);
  api.entry_bytes = sizeof(TableEntry);
  api.check = [](int32_t) -> const char* { return nullptr; };
  api.find = [](const char* rule, int32_t, int32_t) -> const void* { return rule; };  // anything but null
  api.launch = [](int32_t, const void*, const StepArgs&, uint32_t, int32_t, void*) -> const char* { return nullptr; };
  api.upload = api.write = copy;
  api.capturing = [](void*) -> int32_t { return 0; };
  api.l2_bytes = [](int32_t) -> int64_t { return 50 << 20; };
  api.multiprocessors = [](int32_t) -> int64_t { return 132; };
  return api;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const Api* fusedoptim_cuda_api() {
  static const Api api = make();
  return &api;
}
