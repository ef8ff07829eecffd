#include "library_launcher.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fusedoptim::cuda {

const Api* api = nullptr;

namespace {

void require(const char* error) {
  if (error) throw std::runtime_error(std::string("CUDA: ") + error);
}

}  // namespace

LibraryLauncher::LibraryLauncher(int32_t device) : device_(device) {
  if (!api) throw std::runtime_error("the CUDA kernels are not loaded");
}

Memory LibraryLauncher::allocate(int64_t bytes) {
  using torch::headeronly::DeviceType;
  using torch::stable::Device;
  const Device where = api->on_host ? Device(DeviceType::CPU) : Device(DeviceType::CUDA, device_);
  const int64_t words = std::max<int64_t>(bytes, 16) / 8 + 1;
  auto tensor = std::make_shared<torch::stable::Tensor>(
      torch::stable::empty({words}, torch::headeronly::ScalarType::Long, std::nullopt, where));
  char* const address = static_cast<char*>(tensor->mutable_data_ptr());
  return {std::move(tensor), address};
}

void LibraryLauncher::upload(const Memory& to, int64_t offset, const void* from, int64_t bytes, void* stream) {
  require(api->upload(device_, to.at(offset), from, bytes, stream));
}

void LibraryLauncher::write(const Memory& to, const void* from, int64_t bytes, void* stream) {
  require(api->write(device_, to.at(0), from, bytes, stream));
}

void LibraryLauncher::finish() { require(api->finish(device_)); }

void LibraryLauncher::step(const Launch& launch, const StepArgs& args, const StepHeader*) {
  require(api->step(device_, launch.rule, launch.mixed, args, launch.blocks, launch.stream));
}

}  // namespace fusedoptim::cuda
