// The kernels of _C_cuda.
#pragma once

#include "api.h"
#include "launcher.h"

namespace fusedoptim::cuda {

// The functions of _C_cuda. Null until it was loaded.
extern const Api* api;

class LibraryLauncher : public Launcher {
 public:
  explicit LibraryLauncher(int32_t device);
  bool by_value() const override { return true; }
  Memory allocate(int64_t bytes) override;
  void upload(const Memory& to, int64_t offset, const void* from, int64_t bytes, void* stream) override;
  void write(const Memory& to, const void* from, int64_t bytes, void* stream) override;
  bool capturing(void* stream) override { return api->capturing(stream); }
  int64_t l2_bytes() override { return api->l2_bytes(device_); }
  void finish() override;
  void prepare(int, const std::vector<uint64_t>&) override {}  // the check of the device has loaded all kernels
  void step(const Launch& launch, const StepArgs& args, const StepHeader*) override;

 private:
  const int32_t device_;
};

}  // namespace fusedoptim::cuda
