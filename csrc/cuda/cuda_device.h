// The kernels of _C_cuda.
#pragma once

#include <functional>
#include <utility>

#include "../gpu/device.h"
#include "api.h"

namespace fusedoptim::cuda {

// The functions of _C_cuda. Null until it was loaded.
extern const Api* api;

class CudaDevice : public gpu::Device {
 public:
  using Allocate = std::function<gpu::Memory(int64_t bytes)>;
  using UsedOn = std::function<void(const gpu::Memory& memory, void* stream)>;

  CudaDevice(int32_t device, Allocate allocate, UsedOn used_on);
  bool by_value() const override { return true; }
  gpu::Memory allocate(int64_t bytes) override { return allocate_(bytes); }
  void used_on(const gpu::Memory& memory, void* stream) override { used_on_(memory, stream); }
  void upload(const gpu::Memory& to, int64_t offset, const void* from, int64_t bytes, void* stream) override;
  void write(const gpu::Memory& to, const void* from, int64_t bytes, void* stream) override;
  bool capturing(void* stream) override { return api->capturing(stream); }
  int64_t l2_bytes() override { return api->l2_bytes(device_); }
  int64_t multiprocessors() override { return api->multiprocessors(device_); }
  // The check of the device has loaded all kernels.
  gpu::Program prepare(gpu::Purpose, const RuleHandle&, bool wide, const std::vector<gpu::Kind>&) override;
  void launch(const gpu::Program&, uint32_t blocks, const gpu::StepArgs&, const gpu::StepHeader*, bool overlaps,
              void* stream) override;

 private:
  const int32_t device_;
  const Allocate allocate_;
  const UsedOn used_on_;
};

}  // namespace fusedoptim::cuda
