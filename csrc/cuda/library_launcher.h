// The kernels of _C_cuda.
#pragma once

#include <functional>
#include <utility>

#include "api.h"
#include "launcher.h"

namespace fusedoptim::cuda {

// The functions of _C_cuda. Null until it was loaded.
extern const Api* api;

class LibraryLauncher : public Launcher {
 public:
  using Allocate = std::function<Memory(int64_t bytes)>;
  using UsedOn = std::function<void(const Memory& memory, void* stream)>;

  LibraryLauncher(int32_t device, Allocate allocate, UsedOn used_on);
  bool by_value() const override { return true; }
  Memory allocate(int64_t bytes) override { return allocate_(bytes); }
  void used_on(const Memory& memory, void* stream) override { used_on_(memory, stream); }
  void upload(const Memory& to, int64_t offset, const void* from, int64_t bytes, void* stream) override;
  void write(const Memory& to, const void* from, int64_t bytes, void* stream) override;
  bool capturing(void* stream) override { return api->capturing(stream); }
  int64_t l2_bytes() override { return api->l2_bytes(device_); }
  void prepare(int, const std::vector<uint64_t>&) override {}  // the check of the device has loaded all kernels
  void step(const Launch& launch, const StepArgs& args, const StepHeader*) override;

 private:
  const int32_t device_;
  const Allocate allocate_;
  const UsedOn used_on_;
};

}  // namespace fusedoptim::cuda
