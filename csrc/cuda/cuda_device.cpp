#include "cuda_device.h"

#include <stdexcept>
#include <string>

namespace fusedoptim::cuda {

const Api* api = nullptr;

namespace {

void require(const char* error) {
  if (error) throw std::runtime_error(std::string("CUDA: ") + error);
}

}  // namespace

CudaDevice::CudaDevice(int32_t device, Allocate allocate, UsedOn used_on)
    : device_(device), allocate_(std::move(allocate)), used_on_(std::move(used_on)) {
  if (!api) throw std::runtime_error("the CUDA kernels are not loaded");
}

void CudaDevice::upload(const gpu::Memory& to, int64_t offset, const void* from, int64_t bytes, void* stream) {
  require(api->upload(device_, to.at(offset), from, bytes, stream));
}

void CudaDevice::write(const gpu::Memory& to, const void* from, int64_t bytes, void* stream) {
  require(api->write(device_, to.at(0), from, bytes, stream));
}

gpu::Program CudaDevice::prepare(gpu::Purpose purpose, const RuleHandle& rule, bool wide,
                                 const std::vector<gpu::Kind>& kinds) {
  const char* name = purpose == gpu::Purpose::measure  ? kMeasure
                     : purpose == gpu::Purpose::reduce ? kReduce
                                                       : rule.name.c_str();
  bool stored = false;
  for (const gpu::Kind& kind : kinds)
    for (Storage s : kind.storage) stored = stored || !is_dtype(s);
  // A rule that is compiled later may have any name.
  const void* kernel = purpose == gpu::Purpose::update && !rule.variant ? nullptr : api->find(name, wide, stored);
  if (!kernel) throw std::runtime_error(std::string("the CUDA kernels have none for the rule ") + name);
  return {kernel, [](const void*) {}};  // lives as long as the library
}

void CudaDevice::launch(const gpu::Program& program, uint32_t blocks, const gpu::StepArgs& args, const gpu::StepHeader*,
                        bool overlaps, void* stream) {
  require(api->launch(device_, program.get(), args, blocks, overlaps, stream));
}

}  // namespace fusedoptim::cuda
